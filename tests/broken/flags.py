"""Wrong flags of the three scripts and of `helpsteer-rloo`: names, values, types, and what does not go together."""

from importlib.util import find_spec
from typing import Any

from tests.broken.corpus import Broken
from tests.broken.corpus import flag_case as case


def later(name: str, command: str, *says: str, **flags: Any) -> Broken:
    """Flags that only the libraries can refuse, once they are loaded."""

    def make(place: Any) -> list[str]:
        return (place.rloo if command == "rloo" else place.training)(**flags)

    return Broken(name, command, make, says)


CASES = [
    case("unknown", "reward-model", ["--frobnicate", "1"], "unknown flag 'frobnicate'", "--help"),
    case("misspelt", "reward-model", ["--lora_alfa", "8"], "unknown flag 'lora_alfa'; did you mean 'lora_alpha'?"),
    case("misspelt_with_dashes", "rloo", ["--kl-coeff=1"], "unknown flag 'kl_coeff'; did you mean 'kl_coef'?"),
    case("misspelt_in_a_stage", "pipeline", ["--rloo.rlo_k", "4"], "unknown flag 'rlo_k'; did you mean 'rloo_k'?"),
    case(
        "misspelt_without_its_stage", "pipeline", ["--lerning_rate=1"], "give --reward.learning_rate or --rloo.learning"
    ),
    case("of_no_stage", "pipeline", ["--reword.seed", "4"], "unknown flag 'reword.seed'"),
    case("of_a_stage_without_its_name", "pipeline", ["--learning_rate", "1"], "give --reward.learning_rate"),
    case("misspelt_for_the_data", "data", ["--langauge", "all"], "did you mean 'language'?"),
    case("misspelt_for_the_demo", "demo", ["--sed", "3"], "did you mean 'seed'?"),
    case("without_a_name", "rloo", ["--", "4"], "unexpected argument '--'"),
    case("a_stray_word", "reward-model", ["rows.jsonl"], "unexpected argument 'rows.jsonl'"),
    case("no_value", "reward-model", ["--max_length"], "--max_length: expected one argument"),
    case("empty_value", "reward-model", ["--max_length="], "--max_length: expected int, got ''"),
    case("a_word_for_a_number", "reward-model", ["--max_length", "ten"], "--max_length: expected int, got 'ten'"),
    case("a_part_of_a_whole_number", "reward-model", ["--max_length", "99.5"], "--max_length: expected int"),
    case("infinity_for_a_whole_number", "reward-model", ["--seed", "1e400"], "--seed: expected int, got '1e400'"),
    case("a_word_for_a_switch", "rloo", ["--use_peft", "maybe"], "--use_peft: expected bool, got 'maybe'"),
    case("a_word_for_a_list", "rloo", ["--reward_weights", "heavy"], "--reward_weights: expected list[float]"),
    case("no_yaml_for_a_mapping", "rloo", ["--model_init_kwargs", "{a: ["], "expected YAML or JSON"),
    case("a_mapping_nested_too_deeply", "rloo", ["--model_init_kwargs", "[" * 50_000], "nested too deeply"),
    case("a_word_for_the_demos_seed", "demo", ["--seed", "first"], "argument --seed: invalid int value: 'first'"),
    case("an_unknown_engine", "reward-model", ["--engine", "steam"], "--engine is 'steam'; expected packed or trl"),
    case("max_length_too_small", "reward-model", ["--max_length", "3"], "--max_length is 3; expected at least 16"),
    case("a_fraction_over_one", "reward-model", ["--validation_fraction", "2"], "expected between 0 and 1"),
    case("no_data_set", "data", ["--dataset_name="], "--dataset_name is ''; expected a hub id, a directory"),
    case("no_language", "data", ["--language=,"], "--language is ','; expected names separated by commas"),
    case("a_negative_count_of_pairs", "data", ["--show", "-1"], "--show is -1; expected 0 or more"),
    case("no_directory", "reward-model", ["--output_dir="], "--output_dir is ''; expected a directory"),
    case("the_root_as_directory", "reward-model", ["--output_dir", "/"], "--output_dir is '/'; expected a directory"),
    case("no_directory_of_the_policy", "pipeline", ["--policy_dir="], "--policy_dir is ''; expected a directory"),
    case("a_run_outside_of_runs", "pipeline", ["--name", "../../x"], "--name is '../../x'; expected a name"),
    case(
        "a_subset_outside_of_the_data",
        "data",
        ["--dataset_subset", "../../etc"],
        "--dataset_subset is '../../etc'; expected a folder inside the data set",
    ),
    case("an_absolute_subset", "data", ["--dataset_subset", "/etc"], "--dataset_subset is '/etc'; expected a folder"),
    case(
        "a_negative_learning_rate", "rloo", ["--learning_rate", "-1"], "--learning_rate is -1.0; expected more than 0"
    ),
    case(
        "an_infinite_learning_rate", "rloo", ["--learning_rate", "inf"], "--learning_rate is inf; expected more than 0"
    ),
    case("no_batch", "reward-model", ["--per_device_train_batch_size", "0"], "expected at least 1"),
    case(
        "a_seed_too_large", "reward-model", ["--seed", "99999999999"], "--seed is 99999999999; expected", "4294967295"
    ),
    case(
        "a_type_of_whole_numbers", "reward-model", ["--dtype", "int8"], "--dtype is 'int8'; expected float32, bfloat16"
    ),
    case("an_unknown_type", "rloo", ["--dtype", "float31"], "--dtype is 'float31'; expected float32, bfloat16"),
    case("one_sample", "rloo", ["--rloo_k", "1"], "--rloo_k is 1; expected at least 2"),
    case("an_infinite_penalty", "rloo", ["--missing_eos_penalty", "inf"], "--missing_eos_penalty is inf; expected"),
    case("an_infinite_kl_weight", "rloo", ["--kl_coef", "inf"], "--kl_coef is inf; expected"),
    case("half_a_range", "rloo", ["--reward_clip_range", "5"], "--reward_clip_range", "two numbers, the lower first"),
    case("a_range_upside_down", "rloo", ["--reward_clip_range", "5", "-5"], "two numbers, the lower first"),
    case(
        "a_weight_too_few",
        "rloo",
        ["--reward_functions", "math:sqrt", "--reward_weights", "1"],
        "--reward_weights has 1 weights for 2 rewards",
    ),
    case("a_weight_that_is_no_number", "rloo", ["--reward_weights", "nan"], "--reward_weights", "finite"),
    case("groups_that_are_cut", "rloo", ["--rloo_k", "3"], "no multiple of --rloo_k 3"),
    case("two_names_of_one_setting", "rloo", ["--beta", "1", "--kl_coef", "1"], "two names of one setting"),
    case("a_flag_that_another_decides", "rloo", ["--max_steps", "9"], "it follows from --total_episodes"),
    case("a_template_of_ones_own", "reward-model", ["--chat_template_path", "x"], "is the tokenizer's own"),
    case("k1_in_the_loss", "rloo", ["--kl_in", "loss"], "--kl_in is 'loss'; expected reward with k1"),
    case("both_stages_alone", "pipeline", ["--reward_model_only", "--rloo_only"], "exclude each other"),
    case("two_thinking_modes", "pipeline", ["--reward.thinking"], "--reward.thinking cannot differ from --thinking"),
    case("a_shared_setting_for_one_stage", "pipeline", ["--rloo.dataset_name", "x"], "the stages share it"),
    case(
        "one_directory_in_the_other",
        "pipeline",
        ["--reward_model_dir", "m", "--policy_dir", "m/p"],
        "directories apart",
    ),
    case("no_room_for_a_prompt", "pipeline", ["--rloo.response_length", "1024"], "leaves 0 tokens for the prompt"),
    case("four_bits_and_eight", "rloo", ["--load_in_4bit", "--load_in_8bit"], "--load_in_8bit exclude each other"),
    case("four_bits_without_lora", "reward-model", ["--load_in_4bit"], "by LoRA alone: give --use_peft"),
    case("two_precisions", "reward-model", ["--bf16", "--fp16"], "--bf16 and --fp16 exclude each other"),
    case("a_level_of_logs_that_is_none", "rloo", ["--log_level", "loud"], "--log_level is 'loud'; expected one of"),
    case("no_checkpoint_kept", "rloo", ["--save_total_limit", "-1"], "--save_total_limit is -1; expected at least 1"),
    case("a_negative_norm", "rloo", ["--max_grad_norm", "-1"], "--max_grad_norm is -1.0; expected 0 or more"),
    case(
        "a_decay_that_is_no_number", "reward-model", ["--weight_decay", "nan"], "--weight_decay is nan; expected 0 or"
    ),
    case("a_tracker_that_is_not_there", "reward-model", ["--report_to", "comet_ml"], "needs the package comet_ml"),
    case("parallelism_from_a_flag", "rloo", ["--parallelism_config", "{a: 1}"], "accelerate's own configuration"),
    case("top_p_over_one", "rloo", ["--top_p", "1.5"], "--top_p is 1.5; expected more than 0 and at most 1"),
    case("an_optimizers_setting_without_a_value", "rloo", ["--optim_args", "foo"], "--optim_args is 'foo'; expected n"),
    case("an_unknown_backend", "reward-model", ["--ddp_backend", "pigeon"], "--ddp_backend is 'pigeon'; expected one"),
    case("a_negative_top_k", "rloo", ["--top_k", "-5"], "--top_k is -5; expected 0 or more"),
    case("logging_never", "rloo", ["--logging_steps", "-1"], "--logging_steps is -1.0; expected more than 0"),
    later("an_unknown_setting_of_the_model", "rloo", "'steam'", "--model_init_kwargs", model_init_kwargs="{steam: 1}"),
    later("no_setting_of_the_schedule", "reward-model", "--lr_scheduler_kwargs", lr_scheduler_kwargs="{steam: 1}"),
    later("no_setting_of_accelerate", "reward-model", "--accelerator_config", accelerator_config="{steam: 1}"),
    later("no_setting_of_generate", "rloo", "that generate does not know: 'steam'", generation_kwargs="{steam: 1}"),
    later("a_word_for_beams", "rloo", "--generation_kwargs {'num_beams': 'two'}", generation_kwargs="{num_beams: two}"),
    later("an_unknown_attention", "reward-model", 'attn_implementation="steam"', attn_implementation="steam"),
    later("an_unknown_optimizer", "reward-model", "steam is not a valid OptimizerNames, please select", optim="steam"),
    later("an_unknown_schedule", "rloo", "steam is not a valid SchedulerType, please", lr_scheduler_type="steam"),
    later("layers_that_are_not_there", "rloo", "Please check the target modules", lora_target_modules="steam"),
    later("a_reference_that_lora_has_not", "rloo", "`sync_ref_model=True` while using a PEFT", sync_ref_model="true"),
    later("bfloat16_on_a_cpu", "reward-model", "--bf16 true needs a GPU", "give --use_cpu true", bf16="true"),
]

_WITHOUT_PACKAGE = {
    "bitsandbytes": ("pipeline", ["--use_peft", "--rloo.load_in_4bit"]),
    "liger-kernel": ("reward-model", ["--use_liger_kernel"]),
    "flash-attn": ("reward-model", ["--attn_implementation", "flash_attention_2"]),
}
CASES += [
    case(f"no_{package}", command, flags, f"pip install {package}")
    for package, (command, flags) in _WITHOUT_PACKAGE.items()
    if find_spec(package.replace("-", "_")) is None
]
