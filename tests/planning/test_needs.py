"""What stages hold, from settings: arithmetic of weights and optimizer, sharing, and growth with every setting."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_rloo.commands.plan import parse_plan
from helpsteer_rloo.pipeline import stage_names
from helpsteer_rloo.planning.memory import Adapter, Net, holes_of_copies
from helpsteer_rloo.planning.needs import drawings, needs_of
from helpsteer_rloo.planning.request import Rig, unfinished
from helpsteer_rloo.planning.requesting import request_of_pipeline, request_of_reward
from helpsteer_rloo.planning.search import KNOBS, fits, largest, remedies, room_of
from helpsteer_rloo.planning.shapes import QWEN3, Shape
from helpsteer_rloo.settings.config import REWARD, flags_named_of
from helpsteer_rloo.settings.parsing import parse_command, parse_pipeline

GIB = 2**30
SHAPE = QWEN3["Qwen/Qwen3-8B"]
GPU = Rig()


def request(*argv, rig=GPU):
    return request_of_pipeline(parse_pipeline(list(argv)), rig)


def planned(*argv):
    """As the command plans it, which needs no package that the run does."""
    return request_of_pipeline(parse_plan(list(argv)), GPU)


def items(found, stage, moment):
    need = next(need for need in needs_of(found) if need.stage == stage)
    return next(phase.items for phase in need.phases if phase.name == moment)


def test_full_training_holds_sixteen_bytes_a_weight():
    held = items(request(), "reward model", "pass and backward")
    weights = SHAPE.classifier_parameters()
    assert held["trained weights"] == held["gradients"] == 4 * weights
    assert held["optimizer"] == 8 * weights
    policy = items(request(), "RLOO", "pass and backward")
    assert policy["reference model"] == 4 * SHAPE.causal_parameters()
    assert policy["reward models"] == 4 * weights


def test_adapters_are_trained_in_float32_on_one_base_in_half_precision():
    held = items(request("--use_peft"), "RLOO", "pass and backward")
    adapter = SHAPE.lora_parameters(16)
    assert held["base weights"] == 2 * SHAPE.causal_parameters()
    assert held["trained weights"] == held["gradients"] == held["reward adapters"] == 4 * adapter
    assert held["optimizer"] == 8 * adapter
    assert "reward models" not in held


def test_reward_models_of_another_kind_are_models_of_their_own():
    for argv in (["--rloo.use_peft"], ["--use_peft", "--rloo.dtype=float32"], ["--use_peft", "--rloo.engine=trl"]):
        held = items(request(*argv), "RLOO", "scores")
        width = 4 if argv == ["--rloo.use_peft"] else 2
        assert held["reward models"] == width * SHAPE.classifier_parameters()
    guarded = items(request("--use_peft", "--guard"), "RLOO", "scores: guard")
    assert guarded["reward adapters"] == 2 * 4 * SHAPE.lora_parameters(16)


def test_more_gpus_share_what_they_are_told_to_share():
    alone = items(request(), "reward model", "pass and backward")
    ddp = items(request(rig=Rig(processes=8)), "reward model", "pass and backward")
    assert (ddp["trained weights"], ddp["optimizer"]) == (alone["trained weights"], alone["optimizer"])
    assert ddp["gradients"] == 2 * alone["gradients"]  # with the buckets of their exchange
    fsdp = items(request(rig=Rig(processes=8, sharding="fsdp")), "reward model", "pass and backward")
    for kind in ("trained weights", "optimizer", "gradients"):
        assert fsdp[kind] == alone[kind] / 8
    sampling = items(request(rig=Rig(processes=8, sharding="fsdp")), "RLOO", "sampling")
    assert sampling["gathered weights"] == 2 * SHAPE.causal_parameters()  # as they are computed with, bfloat16
    zero = items(request(rig=Rig(processes=8, sharding="zero2")), "reward model", "pass and backward")
    weights = SHAPE.classifier_parameters()
    assert (zero["trained weights"], zero["optimizer"]) == (2 * weights, 12 * weights / 8)


@pytest.mark.parametrize(
    ("flag", "states"), [("adamw_torch", 8), ("sgd", 0), ("adamw_8bit", 2), ("lion_32bit", 8), ("adafactor", 0)]
)
def test_the_optimizers_states_are_counted(flag, states):
    held = items(request(f"--reward.optim={flag}"), "reward model", "pass and backward")
    assert held.get("optimizer", 0) == states * SHAPE.classifier_parameters()


def test_trls_own_passes_are_said_to_need_more():
    notes = [note for need in needs_of(request("--use_peft", "--engine=trl")) for note in need.notes]
    assert len(notes) == 2
    assert all("this is the least" in note for note in notes)
    assert any(
        "DeepSpeed" in n for need in needs_of(request(rig=Rig(processes=8, sharding="zero3"))) for n in need.notes
    )


@pytest.mark.parametrize(
    ("flags", "width"),
    [
        (["load_in_8bit"], 1),
        (["load_in_4bit"], 0.5 + 4 / 64),
        (["load_in_4bit", "use_bnb_nested_quant"], 0.5 + 1 / 64 + 4 / 64 / 256),
    ],
)
def test_a_base_in_few_bits_is_counted_as_it_is_held(flags, width):
    linear, rest = SHAPE.body_parameters(), SHAPE.causal_parameters() - SHAPE.body_parameters()
    both = planned("--use_peft", *(f"--{stage}.{flag}=true" for stage in ("reward", "rloo") for flag in flags))
    held = items(both, "RLOO", "pass and backward")
    assert held["base weights"] == pytest.approx(2 * rest + width * linear)
    assert "reward models" not in held
    assert all(
        "this is the least" in need.notes[0] for need in needs_of(both) if need.stage in ("reward model", "RLOO")
    )
    policy = items(planned("--use_peft", *(f"--rloo.{flag}=true" for flag in flags)), "RLOO", "pass and backward")
    assert policy["base weights"] == held["base weights"]
    assert policy["reward models"] == 2 * SHAPE.classifier_parameters()  # which is not in few bits


def test_weights_in_few_bits_are_not_copied_for_sampling():
    small = ["--model_name_or_path=Qwen/Qwen3-0.6B", "--use_peft"]
    assert "copies for sampling" in items(planned(*small), "RLOO", "sampling")
    assert "copies for sampling" not in items(planned(*small, "--rloo.load_in_4bit=true"), "RLOO", "sampling")


def test_an_ensemble_and_a_guard_are_stages_and_judges():
    found = request("--use_peft", "--reward.ensemble=2", "--guard")
    assert [stage.name for stage in found.rewards] == ["reward model", "reward model 2", "guard"]
    assert [judge.name for judge in found.rloo.judges] == ["reward model", "reward model 2"]
    assert found.rloo.guard.name == "guard"
    assert all(judge.shared for judge in found.rloo.scoring)
    assert [judge.name for judge in found.evaluation.judges] == ["reward model", "guard"]
    assert not any(judge.shared for judge in found.evaluation.judges)
    assert found.rewards[2].half


def test_a_script_of_one_stage_plans_that_stage():
    settings = parse_command(REWARD, ["--use_peft"])
    assert [need.stage for need in needs_of(request_of_reward(settings, GPU))] == [
        "reward model",
        "reward model: verification",
    ]
    assert [need.stage for need in needs_of(request("--reward_model_only"))] == [
        "reward model",
        "reward model: verification",
    ]


# ---- growth and search -----------------------------------------------------------------------------------------------

REQUESTS = [
    request("--use_peft"),
    request(),
    request("--use_peft", "--guard", rig=Rig(cpu=True)),
    request(rig=Rig(processes=4, sharding="fsdp")),
]


GROWING = [knob for knob in KNOBS if knob.flag not in ("rloo.response_length", "rloo.rloo_k")]


@given(st.sampled_from(REQUESTS), st.sampled_from(GROWING), st.integers(0, 4000), st.integers(0, 4000))
def test_memory_grows_with_every_setting_but_two(found, knob, place, more):
    values = knob.values(found)
    small, large = (needs_of(knob.put(found, values[min(at, len(values) - 1)])) for at in (place, place + more))
    for one, other in zip(small, large, strict=True):
        assert one.worst.total <= other.worst.total * (1 + 1e-12)


@pytest.mark.parametrize("limit", [23.5 * GIB, 28 * GIB, 40 * GIB])
def test_the_largest_settings_fit_and_larger_ones_do_not(limit):
    found = request("--use_peft")
    knobs = {knob.flag: knob for knob in KNOBS}
    for room in room_of(found, limit):
        assert fits(knobs[room.flag].put(found, room.largest), limit)
        assert room.largest >= room.value
        values = knobs[room.flag].values(found)
        changed = needs_of(knobs[room.flag].put(found, room.largest))
        assert max(need.worst.total for need in changed) <= 0.85 * limit  # a prediction may be off by 15 %
        following = values[values.index(room.largest) + 1 :][:1]
        assert not any(fits(knobs[room.flag].put(found, value), limit) for value in following)
        assert room.capped == (room.largest == knobs[room.flag].highest)


def test_where_nothing_fits_every_setting_says_so():
    assert {room.largest for room in room_of(request(), 24 * GIB)} == {None}
    assert remedies(request(), 2 * GIB) == []
    assert remedies(request("--use_peft"), 40 * GIB) == []


def test_what_is_proposed_fits_and_adapters_come_to_one_base():
    found = remedies(request(), 24 * GIB)
    assert dict(found[0].flags) == {"use_peft": "true"}
    asked = request("--use_peft")
    assert [need.worst.total for need in found[0].needs] == [need.worst.total for need in needs_of(asked)]
    long = request("--use_peft", "--max_length=8192", "--rloo.response_length=2048")
    for remedy in remedies(long, 24 * GIB):
        assert max(need.worst.total for need in remedy.needs) <= 0.85 * 24 * GIB
    assert remedies(long, 24 * GIB)


def test_a_bisection_finds_the_last_that_holds():
    for last in range(1, 40):
        assert largest(lambda n, last=last: n <= last, 1, 100) == last


def test_prompts_take_the_room_that_the_longest_response_leaves():
    found = request("--use_peft", "--max_length=2048", "--rloo.response_length=512")
    assert (found.rloo.prompt, found.rloo.response, found.evaluation.prompt) == (1536, 512, 1536)
    with pytest.raises(ValueError, match=r"--rloo.response_length"), flags_named_of("rloo"):
        request_of_pipeline(replace_length(parse_pipeline([]), 1024), GPU)


def replace_length(settings, response):
    rloo = replace(settings.rloo, own=replace(settings.rloo.own, response_length=response))
    return replace(settings, rloo=rloo)


def largest_need(argv, rig):
    return max(need.worst.total for need in needs_of(request_of_pipeline(parse_plan(argv), rig)))


LONG = ["--use_peft", "--max_length=8192", "--rloo.response_length=4096"]
SMALL = ["--model_name_or_path=Qwen/Qwen3-0.6B"]
UNCHECKED = ["--model_name_or_path=Qwen/Qwen3-1.7B", "--max_length=4096", "--rloo.gradient_checkpointing=false"]


@pytest.mark.parametrize(
    ("argv", "rig", "limit"),
    [
        (LONG, GPU, 23.5),
        ([*SMALL, "--use_peft"], GPU, 3.7),
        ([*SMALL, "--use_peft", "--rloo_batch_size=16", "--rloo.rloo_k=16"], Rig(cpu=True), 5),
        ([*UNCHECKED, "--use_peft"], GPU, 12),
        ([*UNCHECKED, "--reward.use_peft", "--rloo.optim=adamw_8bit", "--rloo.lora_r=64"], GPU, 14),
        ([*UNCHECKED, "--reward.dtype=float32", "--rloo.dtype=float32", "--engine=trl"], GPU, 20),
        (UNCHECKED, Rig(processes=2, sharding="zero2"), 12),
        (["--guard", "--reward.ensemble=2"], GPU, 28),
        (["--reward_model_only", "--reward.gradient_checkpointing=false", "--max_length=8192"], GPU, 24),
    ],
)
def test_every_remedy_is_a_command_that_needs_what_it_says(argv, rig, limit):
    found = remedies(request_of_pipeline(parse_plan(argv), rig), limit * GIB)
    assert found
    for remedy in found:
        flags = dict(remedy.flags)
        given = [f"--{name}={value}" for name, value in flags.items()]
        shared = replace(
            rig, processes=int(flags.get("gpus", rig.processes)), sharding=flags.get("sharding", rig.sharding)
        )
        said = max(need.worst.total for need in remedy.needs)
        assert largest_need([*argv, *given], shared) == pytest.approx(said, rel=1e-9)
        assert said <= 0.85 * limit * GIB


def test_every_largest_value_is_one_that_the_command_takes():
    argv = [*SMALL, "--use_peft"]
    for room in room_of(request(*argv), 6 * GIB):
        assert largest_need([*argv, f"--{room.flag}={room.largest}"], GPU) <= 6 * GIB
    k = next(room for room in room_of(request(*argv), 100 * GIB) if room.flag == "rloo.rloo_k")
    assert k.largest == request(*argv).rloo.rollouts


def test_several_settings_are_lowered_where_one_is_not_enough():
    found = remedies(request(*LONG), 22.5 * GIB)
    assert max(len(remedy.flags) for remedy in found) > 1


def test_what_is_finished_is_not_counted_and_not_changed():
    whole = request("--rloo.use_peft", "--guard")
    names = [need.stage for need in needs_of(unfinished(whole, ["data", "reward_model", "verification"]))]
    assert names == ["guard", "guard: verification", "RLOO", "evaluation"]
    verified = unfinished(whole, ["data", "reward_model", "guard", "guard_verification"])
    assert [need.stage for need in needs_of(verified)] == ["reward model: verification", "RLOO", "evaluation"]
    assert needs_of(unfinished(whole, stage_names(parse_pipeline(["--guard"])))) == []
    for remedy in remedies(unfinished(request(), ["reward_model", "verification"]), 60 * GIB):
        assert not {"max_length", "use_peft", "reward.use_peft"} & {name for name, _ in remedy.flags}


def recorded(directory, base):
    directory.mkdir()
    record = {
        "base_model": base, "base": {"name": base, "dtype": "bfloat16"}, "adapter": True,
        "rendering": {"max_length": 1024}, "thinking": False,
    }  # fmt: skip
    (directory / "reward_model.json").write_text(json.dumps(record))
    (directory / "adapter_config.json").write_text(json.dumps({"r": 16, "target_modules": "all-linear"}))
    return str(directory)


def test_reward_models_that_a_run_is_given_are_judges_beside_its_own(tmp_path):
    first, second = (recorded(tmp_path / name, "Qwen/Qwen3-8B") for name in "ab")
    found = request("--use_peft", f"--rloo.guard_reward_model={first}", f"--rloo.reward_ensemble={second}")
    assert [judge.stage for judge in found.rloo.scoring] == ["reward model", None, None]
    assert [judge.name for judge in found.rloo.scoring] == ["reward model", "reward model 2", "guard"]
    assert all(judge.shared for judge in found.rloo.scoring)
    whole = request(f"--rloo.guard_reward_model={first}")
    adapted = remedies(whole, 30 * GIB)[0]
    assert dict(adapted.flags) == {"use_peft": "true"}
    assert largest_need(["--use_peft", f"--rloo.guard_reward_model={first}"], GPU) == pytest.approx(
        max(need.worst.total for need in adapted.needs)
    )


def test_short_rows_on_a_cpu_are_said_to_need_more():
    def notes(cpu, *argv):
        found = request("--use_peft", "--rloo.response_length=16", *argv, rig=Rig(cpu=cpu))
        return [note for need in needs_of(found) for note in need.notes if "128 tokens" in note]

    assert len(notes(True, "--max_length=128")) == 2
    assert notes(True, "--max_length=129") == notes(False, "--max_length=128") == []


# ---- what watches the policy -----------------------------------------------------------------------------------------


def test_a_guard_scores_and_has_its_prompts_sampled_one_by_one():
    alone, guarded = request("--use_peft"), request("--use_peft", "--guard", "--rloo.watch_steps=25")
    assert (alone.rloo.watch, alone.rloo.watched_at_once) == (None, 0)
    assert (guarded.rloo.watch.prompts, guarded.rloo.watch.every, guarded.rloo.watched_at_once) == (128, 25, 8)
    cache = 36 * 2 * 8 * 128 * 2  # bytes a token: keys and values of 36 layers
    for found, prompts in ((alone, 2), (guarded, 8)):  # of 8 completions at once, 4 of a prompt, or one
        sampling = items(found, "RLOO", "sampling")
        assert sampling["key and value caches"] == cache * (prompts * 512 + 8 * 512)


def test_a_watch_samples_itself_where_vllm_samples_rollouts():
    vllm = replace(request("--use_peft").rloo, vllm=True)
    assert drawings(vllm) == []
    watched = replace(request("--use_peft", "--guard").rloo, vllm=True)
    assert [(drawn.prompts, drawn.rows) for drawn in drawings(watched)] == [(8, 8)]


def test_intervals_of_the_watch_are_those_of_checkpoints_unless_they_are_given():
    every = {
        argv: request("--use_peft", "--guard", *argv).rloo.watch.every
        for argv in ((), ("--rloo.save_steps=7",), ("--rloo.save_steps=0.1",), ("--rloo.watch_steps=3",))
    }
    assert list(every.values()) == [50, 7, 313, 3]  # a tenth of 3,125 steps, rounded up


SMALL_SHAPE = Shape(768, 12, 12, 4, 64, 2048, 16_384, tied=True)


def test_what_sampling_leaves_in_the_heap_is_there_in_every_pass_behind_it(monkeypatch):
    monkeypatch.setattr("helpsteer_rloo.planning.requesting.shape_of", lambda *_: SMALL_SHAPE)
    cpu, gpu = (request("--use_peft", "--rloo.packed_tokens=1024", rig=rig) for rig in (Rig(cpu=True), GPU))
    phases = {phase.name: phase.items for phase in needs_of(cpu)[2].phases}
    left = holes_of_copies(Net(SMALL_SHAPE, 4, 4, Adapter(16), cpu=True), 512 + 4 * 512)
    assert left > 100 * 2**20
    assert "holes in the heap" not in phases["sampling"]
    assert phases["reference"]["holes in the heap"] == left
    assert phases["pass and backward"]["holes in the heap"] > left  # its own besides
    assert not any("holes in the heap" in phase.items for phase in needs_of(gpu)[2].phases)
    beyond = replace(cpu, rloo=replace(cpu.rloo, vllm=True))
    assert "holes in the heap" not in {p.name: p.items for p in needs_of(beyond)[2].phases}["reference"]


def test_settings_far_from_any_run_are_planned_in_no_time():
    found = request("--use_peft", "--rloo_batch_size=1000000000", "--rloo.rloo_k=4")
    k = next(room for room in room_of(found, 100 * GIB) if room.flag == "rloo.rloo_k")
    assert k.largest is None or k.largest <= 4096
