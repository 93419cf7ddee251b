"""Wrong model directories: reward models without their parts or of another rendering, and bases that cannot be read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.broken.corpus import Broken, Place, changed_json, cut_short

RECORD, HELDOUT, ADAPTER = "reward_model.json", "heldout_prompts.txt", "adapter_model.safetensors"
OTHER = "was trained with another rendering than the policy's"
TRAIN_ONE = "Train one with reward_model_training.py"


def reward(
    name: str,
    break_it: Callable[[Path], object],
    *says: str,
    full: bool = False,
    where: str = "{root}/reward",
    **changes: Any,
) -> Broken:
    """RLOO against a reward model that was broken so."""

    def make(place: Place) -> list[str]:
        directory = place.copy(place.world.full_reward if full else place.world.reward, "reward")
        break_it(directory)
        return place.rloo(reward_model_path=directory, **changes)

    return Broken(name, "rloo", make, (where, *says))


def record(name: str, change: Callable[[dict], object], *says: str, **changes: Any) -> Broken:
    """RLOO against a reward model whose record was changed so."""
    return reward(name, lambda path: changed_json(path / RECORD, change), *says, **changes)


def base(name: str, command: str, break_it: Callable[[Path], object], *says: str) -> Broken:
    """Training from a model that was broken so."""

    def make(place: Place) -> list[str]:
        directory = place.copy(place.world.base, "base")
        break_it(directory)
        arguments = place.rloo if command == "rloo" else place.training
        return arguments(model_name_or_path=directory)

    return Broken(f"base_{name}", command, make, ("{root}/base", *says))


def pickled(weights: str, target: str) -> Callable[[Path], None]:
    """Weights that are there as a pickle only."""

    def change(directory: Path) -> None:
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(directory / weights), directory / target)
        (directory / weights).unlink()

    return change


def without_tensor(weights: str, part: str) -> Callable[[Path], None]:
    """Weights from which a tensor was left out."""

    def change(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        kept = {name: tensor for name, tensor in load_file(directory / weights).items() if part not in name}
        save_file(kept, directory / weights, {"format": "pt"})

    return change


def wider(weights: str) -> Callable[[Path], None]:
    """Weights of another shape than the configuration says."""

    def change(directory: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        doubled = {name: torch.cat([tensor, tensor], -1) for name, tensor in load_file(directory / weights).items()}
        save_file(doubled, directory / weights, {"format": "pt"})

    return change


def escaping_index(directory: Path) -> None:
    weights = {"model.embed_tokens.weight": "../elsewhere.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    shutil.move(directory / "model.safetensors", directory.parent / "elsewhere.safetensors")


def template(text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / "chat_template.jinja").write_text(text)


def put(file: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / file).write_text(content)


def remove(file: str) -> Callable[[Path], None]:
    return lambda directory: (directory / file).unlink()


def absent_reward(place: Place) -> list[str]:
    return place.rloo(reward_model_path=place.root / "reward")


def base_for_reward(place: Place) -> list[str]:
    return place.rloo(reward_model_path=place.copy(place.world.base, "reward"))


def other_tokenizer(place: Place) -> list[str]:
    directory = place.copy(place.world.base, "base")
    changed_json(directory / "tokenizer.json", lambda content: content["added_tokens"][-1].update(content="<other>"))
    return place.rloo(model_name_or_path=directory)


def other_template(place: Place) -> list[str]:
    directory = place.copy(place.world.base, "base")
    with (directory / "chat_template.jinja").open("a") as file:
        file.write(" ")
    return place.rloo(model_name_or_path=directory)


REWARD_MODELS = [
    Broken(
        "no_directory",
        "rloo",
        absent_reward,
        ("--reward_model_path {root}/reward: no finished reward model", TRAIN_ONE),
    ),
    Broken(
        "a_base_for_a_reward_model", "rloo", base_for_reward, ("{root}/reward: no finished reward model", TRAIN_ONE)
    ),
    Broken(
        "no_directory_in_the_pipeline",
        "pipeline",
        lambda place: place.pipeline("--rloo_only", f"--reward_model_dir={place.root}/reward"),
        ("--reward_model_dir {root}/reward: no finished reward model", TRAIN_ONE),
    ),
    reward("without_its_record", remove(RECORD), "reward_model.json is missing", TRAIN_ONE),
    reward("without_its_heldout_prompts", remove(HELDOUT), "heldout_prompts.txt is missing"),
    reward("no_heldout_prompts", put(HELDOUT, ""), f"{HELDOUT} is damaged"),
    reward("heldout_prompts_of_other_text", put(HELDOUT, "Name two trees.\n"), f"{HELDOUT} is damaged"),
    reward("heldout_prompts_of_bytes", lambda path: (path / HELDOUT).write_bytes(b"\xff\xfe"), f"{HELDOUT} is damaged"),
    reward("record_cut_short", lambda path: cut_short(path / RECORD), f"{RECORD} is damaged"),
    reward("record_of_bytes", lambda path: (path / RECORD).write_bytes(b"\x80"), f"{RECORD} is damaged"),
    reward("record_that_is_a_list", put(RECORD, "[]"), f"{RECORD} is damaged: expected a JSON object"),
    reward("record_nested_too_deeply", put(RECORD, "[" * 100_000), f"{RECORD} is damaged"),
    reward(
        "record_without_anything", put(RECORD, "{}"), f"{RECORD} lacks base, adapter, thinking, rendering, base_model"
    ),
    record("record_without_its_rendering", lambda content: content.pop("rendering"), f"{RECORD} lacks rendering"),
    record("record_with_a_list_as_base", lambda content: content.update(base=[]), f"{RECORD}: base is [], expected"),
    record(
        "record_with_an_unknown_key_of_the_base",
        lambda content: content["base"].update(code="x"),
        f"{RECORD}: base has unknown",
        "'code'",
    ),
    record("record_with_an_unknown_type", lambda content: content["base"].update(dtype="float31"), "'float31'"),
    record("record_with_a_function_as_type", lambda content: content["base"].update(dtype="load"), "'load'"),
    record(
        "record_with_a_word_for_a_switch", lambda content: content.update(adapter="yes"), "adapter is 'yes', expected"
    ),
    record(
        "record_without_a_limit", lambda content: content["rendering"].pop("max_length"), "rendering lacks max_length"
    ),
    record(
        "record_with_a_word_as_limit",
        lambda content: content["rendering"].update(max_length="96"),
        "rendering.max_length is '96', expected",
    ),
    record(
        "record_that_trusts_for_the_user",
        lambda content: content["base"].update(trust_remote_code=True),
        "runs code of its own",
        "--trust_remote_code true",
    ),
    record(
        "limit_below_the_completions",
        lambda content: content["rendering"].update(max_length=16),
        "--response_length 90 leaves 0 tokens",
        "Lower --response_length",
        response_length=90,
        where="--response_length",
    ),
    record(
        "rendering_of_another_template",
        lambda content: content["rendering"].update(chat_template="x"),
        "chat_template differ",
        "train a reward model for this policy",
        where=OTHER,
    ),
    record(
        "rendering_of_another_end_of_turn",
        lambda content: content["rendering"].update(end_of_turn_id=1),
        "end_of_turn_id differ",
        where=OTHER,
    ),
    record(
        "rendering_with_another_keyword",
        lambda content: content["rendering"].update(template_kwargs="{}"),
        "template_kwargs differ",
        where=OTHER,
    ),
    record("trained_with_thinking", lambda content: content.update(thinking=True), "was trained with --thinking"),
    reward(
        "thinking_asked_for",
        lambda path: None,
        "was trained without --thinking; give the same setting",
        thinking="true",
    ),
    Broken("policy_of_another_tokenizer", "rloo", other_tokenizer, (OTHER, "tokenizer differ")),
    Broken("policy_of_another_template", "rloo", other_template, (OTHER, "chat_template differ")),
    reward("without_its_weights", remove(ADAPTER), "no weights here", ADAPTER),
    reward("weights_as_a_pickle", pickled(ADAPTER, "adapter_model.bin"), "adapter_model.bin", "safetensors"),
    reward("weights_cut_short", lambda path: cut_short(path / ADAPTER), f"{ADAPTER} cannot be read"),
    reward("weights_of_nothing", put(ADAPTER, ""), f"{ADAPTER} cannot be read"),
    reward("without_its_head", without_tensor(ADAPTER, "score"), f"{ADAPTER} has no scalar head"),
    reward("weights_of_another_shape", wider(ADAPTER), "do not fit the base"),
    reward("without_its_configuration", remove("adapter_config.json"), "adapter_config.json"),
    reward("configuration_of_nothing", put("adapter_config.json", "{}"), "adapter_config.json"),
    reward(
        "configuration_of_another_kind", put("adapter_config.json", '{"peft_type": "STEAM"}'), "adapter_config.json"
    ),
    reward("configuration_cut_short", lambda path: cut_short(path / "adapter_config.json"), "adapter_config.json"),
    reward(
        "whole_weights_as_a_pickle",
        pickled("model.safetensors", "pytorch_model.bin"),
        "pytorch_model.bin",
        "safetensors",
        full=True,
    ),
    reward(
        "whole_weights_cut_short",
        lambda path: cut_short(path / "model.safetensors"),
        "model.safetensors cannot be read",
        full=True,
    ),
    reward(
        "whole_weights_without_a_head",
        without_tensor("model.safetensors", "score"),
        "model.safetensors has no scalar head",
        full=True,
    ),
    record("base_that_is_gone", lambda content: content["base"].update(name="./gone"), "./gone", use_peft="false"),
]
BASES = [
    Broken(
        "no_model",
        "reward-model",
        lambda place: place.training(model_name_or_path="./absent"),
        ("Could not fetch the tokenizer './absent'", "--model_name_or_path PATH"),
    ),
    base("tokenizer_cut_short", "reward-model", lambda path: cut_short(path / "tokenizer.json"), "tokenizer"),
    base("tokenizer_that_is_a_list", "reward-model", put("tokenizer.json", "[]"), "tokenizer"),
    base("tokenizer_without_a_model", "reward-model", put("tokenizer.json", "{}"), "tokenizer"),
    base("no_tokenizer", "reward-model", remove("tokenizer.json"), "tokenizer"),
    base("no_chat_template", "reward-model", remove("chat_template.jinja"), "has no chat template"),
    base("template_that_is_none", "reward-model", template("{% for %}"), "chat template", "cannot be used"),
    base(
        "template_that_refuses_a_turn",
        "reward-model",
        template("{% if messages|length == 1 %}{{ raise_exception('one turn only') }}{% endif %}x<|im_end|>"),
        "one turn only",
    ),
    base(
        "template_that_reads_files",
        "reward-model",
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "chat template",
        "cannot be used",
    ),
    base("no_configuration", "reward-model", remove("config.json"), "config.json"),
    base("configuration_cut_short", "reward-model", lambda path: cut_short(path / "config.json"), "config.json"),
    base("configuration_of_an_unknown_model", "reward-model", put("config.json", '{"model_type": "qwen9"}'), "qwen9"),
    base("no_weights", "reward-model", remove("model.safetensors"), "no weights here"),
    base("weights_as_a_pickle", "reward-model", pickled("model.safetensors", "pytorch_model.bin"), "pytorch_model.bin"),
    base("weights_cut_short", "reward-model", lambda path: cut_short(path / "model.safetensors"), "cannot be read"),
    base("weights_outside_of_it", "reward-model", escaping_index, "model.safetensors.index.json", "'../elsewhere"),
    base("weights_of_another_shape", "reward-model", wider("model.safetensors"), "the weights do not fit config.json"),
    base("weights_cut_short_of_a_policy", "rloo", lambda path: cut_short(path / "model.safetensors"), "cannot be read"),
    base(
        "fewer_embeddings_than_tokens",
        "reward-model",
        lambda path: changed_json(path / "config.json", lambda content: content.update(vocab_size=100)),
        "100",
        "vocabulary",
    ),
]
CASES = [*REWARD_MODELS, *BASES]
