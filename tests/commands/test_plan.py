"""`helpsteer-rloo plan`, and the check of it before a run: tables, the JSON document, refusals, and bad input."""

import json
import os
import re
import threading

import numpy as np
import pytest
from rich.console import Console

from helpsteer_rloo import cli
from helpsteer_rloo.commands.demo import parse_demo
from helpsteer_rloo.data.demo import write_rows
from helpsteer_rloo.display.console import speaking_to
from helpsteer_rloo.fitting import refuse_what_cannot_fit
from helpsteer_rloo.identity import effective_settings
from helpsteer_rloo.planning import machine
from helpsteer_rloo.planning.gpus import rate_of
from helpsteer_rloo.planning.lengths import counted, helpsteer3
from helpsteer_rloo.planning.machine import Memory, available_memory
from helpsteer_rloo.planning.needs import needs_of
from helpsteer_rloo.planning.request import Rig
from helpsteer_rloo.planning.requesting import request_of_pipeline
from helpsteer_rloo.planning.shapes import Shape
from helpsteer_rloo.planning.time import parts_of
from helpsteer_rloo.processes import launched_sharding
from helpsteer_rloo.settings.parsing import parse_pipeline

GIB = 2**30


def planned(capsys, *argv):
    cli.plan([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_document_has_every_stage_moment_part_and_setting(capsys):
    found = planned(capsys, "--use_peft", "--gpu_memory_gb=24", "--gpu_name=rtx4090")
    assert found["memory"] == {"bytes": 24 * GIB, "of": "a GPU of 24 GiB"}
    assert (found["fits"], found["refused_by_the_pipeline"], found["near_the_limit"]) == (True, False, False)
    assert [s["stage"] for s in found["stages"]] == [
        "reward model", "reward model: verification", "RLOO", "evaluation",
    ]  # fmt: skip
    for stage in found["stages"]:
        sums = {moment["moment"]: sum(moment["items"].values()) for moment in stage["moments"]}
        assert all(moment["bytes"] == pytest.approx(sums[moment["moment"]]) for moment in stage["moments"])
        assert stage["bytes"] == max(moment["bytes"] for moment in stage["moments"])
        assert stage["fits"] is True
    moments = [moment["moment"] for moment in found["stages"][2]["moments"]]
    assert moments == ["sampling", "scores", "reference", "pass and backward"]
    parts = {(part["stage"], part["part"]): part for part in found["time"]}
    assert parts["RLOO", "training"]["steps"] == 3125
    assert parts["reward model", "training"]["steps"] == pytest.approx(22_380 * 0.943 * 3 / 16, abs=1)
    assert all(part["seconds"] > 0 for part in found["time"])
    assert found["largest_that_fit"]["max_length"]["largest"] > found["largest_that_fit"]["max_length"]["now"] == 1024
    assert found["fitting_changes"] == []
    assert (found["processes"], found["sharding"]) == (1, "ddp")


def test_what_does_not_fit_comes_with_what_does(capsys):
    found = planned(capsys, "--gpu_memory_gb=24")
    assert (found["fits"], found["refused_by_the_pipeline"]) == (False, True)
    assert found["fitting_changes"][0]["flags"] == {"use_peft": "true"}
    assert found["fitting_changes"][0]["bytes"] < 24 * GIB
    assert {part["seconds"] for part in found["time"]} == {None}


def test_the_tables_say_whether_it_fits_and_what_would(capsys):
    cli.plan(["--gpu_memory_gb=24", "--gpus=2"])
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("base weights", "optimizer", "activations", "pass and backward", "no rate is known", "--rloo.rloo_k"):
        assert part in shown or part == "base weights"
    assert "It does not fit: RLOO needs" in shown
    assert "The pipeline refuses to start (--force)." in shown
    assert "This fits with the 15 % to spare that a prediction may be off: --use_peft true" in shown
    cli.plan(["--use_peft", "--gpu_memory_gb=80", "--gpu_name=a100"])
    assert "It fits: RLOO needs" in " ".join(capsys.readouterr().out.split())


WIDEST = ["--use_peft", "--guard", "--reward.ensemble=5", "--gpu_name=RTX 4090", "--gpus=2", "--sharding=fsdp"]
SMALLEST = ["--tflops=0.001", "--bandwidth_gbs=0.001", "--reward_epochs=1e-300", "--gpu_memory_gb=0.01"]
LARGEST = [
    "--reward_epochs=1e6", "--total_episodes=1e9", "--evaluation_prompts=1e9", "--best_of=1e9", "--max_length=1e9",
    "--tflops=0.001", "--bandwidth_gbs=0.001", "--packed_tokens=1e9", "--rloo_batch_size=1e9", "--gpu_memory_gb=1e6",
]  # fmt: skip


@pytest.mark.parametrize("argv", [WIDEST, SMALLEST, LARGEST], ids=["widest", "smallest", "largest"])
def test_tables_fit_on_a_page_and_have_numbers_alone(argv, capsys):
    with speaking_to(Console(width=100)):
        cli.plan(argv)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines() if line and line[0] in "┏┃┡│├└") <= 100
    assert not re.search(r"\b(inf|nan)\b|-0\.0|\de[+-]\d|\b0\.00\b", shown)


def test_work_is_in_the_largest_unit_that_it_has_one_of(capsys, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": "qwen3", **sizes, "head_dim": 16, "intermediate_size": 128, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cli.plan(["--use_peft", "--gpu_memory_gb=24"])
    assert "PFLOP" in capsys.readouterr().out
    cli.plan([f"--model_name_or_path={tmp_path}", "--gpu_memory_gb=24", "--total_episodes=16", "--reward_epochs=0.01"])
    shown = capsys.readouterr().out
    assert "TFLOP" in shown
    assert "PFLOP" not in shown


def test_about_the_limit_there_is_what_fits_with_a_margin(capsys):
    argv = ["--use_peft", "--gpu_memory_gb=22"]  # RLOO needs 19.6 GiB, and 15 % of 22 are 3.3
    cli.plan(argv)
    shown = " ".join(capsys.readouterr().out.split())
    assert "It fits, barely: RLOO needs 19.6 GiB" in shown
    assert "A prediction may be off by 15 %. > This fits with the 15 % to spare that a prediction may be off:" in shown
    found = planned(capsys, *argv)
    assert (found["fits"], found["near_the_limit"], found["tolerance"]) == (True, True, 0.15)
    assert found["fitting_changes"]
    for change in found["fitting_changes"]:
        assert change["bytes"] <= 0.85 * 22 * GIB
    for room in found["largest_that_fit"].values():
        assert room["largest"] is None or room["largest"] < room["now"]


def test_a_gpu_by_its_name_has_what_a_program_is_told_and_one_by_its_memory_what_is_given(capsys):
    named = planned(capsys, "--use_peft", "--gpu_name=NVIDIA H100 80GB HBM3")
    assert named["memory"]["bytes"] == 79.1 * GIB
    assert named["memory"]["of"] == "what a program has of the 80 GB of a GPU: h100"
    assert planned(capsys, "--use_peft", "--gpu_name=h100", "--gpu_memory_gb=80")["memory"]["bytes"] == 80 * GIB
    assert named["rate"]["half_flops"] == pytest.approx(0.4 * 989e12)


def test_without_a_gpu_that_is_named_the_plan_is_for_this_machine(capsys, monkeypatch):
    monkeypatch.setattr(machine, "memory_here", lambda *, use_cpu: Memory(30 * GIB, "free main memory", cpu=True))
    found = planned(capsys, "--use_peft")
    assert found["memory"] == {"bytes": 30 * GIB, "of": "free main memory"}
    base = found["stages"][0]["moments"][0]["items"]["base weights"]
    assert base == 4 * Shape(4096, 36, 32, 8, 128, 12_288, 151_936).classifier_parameters()  # float32 on a CPU


def test_rates_can_be_given_or_measured(capsys, monkeypatch):
    given = planned(capsys, "--use_peft", "--gpu_memory_gb=24", "--tflops=100", "--bandwidth_gbs=500")
    training = next(part for part in given["time"] if (part["stage"], part["part"]) == ("reward model", "training"))
    assert training["seconds"] == pytest.approx(training["flops"] / 1e14)
    four = planned(capsys, "--use_peft", "--gpus=4", "--tflops=100", "--bandwidth_gbs=500")
    shared = next(part for part in four["time"] if (part["stage"], part["part"]) == ("reward model", "training"))
    assert shared["seconds"] == pytest.approx(training["seconds"] / 4)
    monkeypatch.setattr(machine, "_MEASURED_SIZE", 64)
    monkeypatch.setattr(machine, "_COPIED_BYTES", 4096)
    measured = machine.measured_rate(use_cpu=True)
    assert min(measured.half, measured.single, measured.reading) > 0
    assert "measured on this cpu" in measured.source


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--gpu_memory_gb=0"], "--gpu_memory_gb is 0.0; expected from 0.01 to 1,000,000"),
        (["--gpus=0"], "--gpus is 0; expected from 1 to 100,000"),
        (["--sharding=other", "--gpus=2"], "--sharding is 'other'; expected ddp, fsdp, zero2, zero3"),
        (["--sharding=fsdp"], "expected more than one of --gpus"),
        (["--tflops=1", "--measure"], "exclude each other"),
        (["--bandwidth_gbs=1"], "--tflops beside it"),
        (["--gpu_memori_gb=3"], "did you mean 'gpu_memory_gb'?"),
        (["--max_length=1"], "expected at least 16"),
        (["--reward_epochs=1e308"], "--reward_epochs is 1e+308; expected more than 0 and at most 1,000,000"),
        (["--reward_epochs=nan"], "--reward_epochs is nan; expected more than 0"),
        (["--reward.num_train_epochs=1e9"], "num_train_epochs is 1000000000.0; expected at most 1,000,000"),
        (["--gpu_memory_gb=1e300"], "expected from 0.01 to 1,000,000"),
        (["--gpu_memory_gb=inf"], "--gpu_memory_gb is inf; expected from 0.01 to 1,000,000"),
        (["--tflops=1e-300", "--bandwidth_gbs=1"], "--tflops is 1e-300; expected from 0.001 to 1,000,000"),
        (["--tflops=1", "--bandwidth_gbs=nan"], "--bandwidth_gbs is nan; expected from 0.001"),
        (["--gpus=99999999999999999999"], "--gpus is 99999999999999999999; expected at most 1,000,000,000"),
        (["--max_length=9999999999"], "--max_length is 9999999999; expected at most 1,000,000,000"),
        (["--total_episodes=1e30"], "expected at most 1,000,000,000"),
        (["--evaluation_prompts=1e12"], "--evaluation_prompts is 1000000000000; expected at most 1,000,000,000"),
        (["--packed_tokens=1e12"], "--packed_tokens is 1000000000000; expected at most"),
        (["--reward.lora_r=1e12"], "lora_r is 1000000000000; expected at most 1,000,000,000"),
        (["--rloo_batch_size=1e12"], "--rloo_batch_size is 1000000000000; expected at most"),
        (["--reward.ensemble=1000"], "ensemble is 1000; expected at most 100"),
    ],
)
def test_a_mistake_is_named(argv, says, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.plan(argv)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--gpu_name=h1000"], "did you mean 'h100'?"),
        (["--tflops=1"], "--bandwidth_gbs beside it"),
        (["--gpu_memory_gb=24", "--data_json=none.json"], "none.json: no such file"),
        (["--gpu_memory_gb=24", "--model_name_or_path=."], "config.json cannot be read"),
        (["--gpu_memory_gb=24", "--rloo_only", "--reward_model_dir=nowhere"], "nowhere: no reward_model.json"),
    ],
)
def test_what_cannot_be_planned_is_named(argv, says, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.plan(argv)
    assert ended.value.code == 1
    assert says in " ".join(capsys.readouterr().err.split())


# ---- before a run ----------------------------------------------------------------------------------------------------


def here(monkeypatch, size):
    monkeypatch.setattr(machine, "memory_here", lambda *, use_cpu: Memory(size, "a small machine", cpu=True))


@pytest.fixture
def arguments(tiny_base, tmp_path):
    write_rows(tmp_path / "rows.jsonl", 0, 40)
    return [
        f"--model_name_or_path={tiny_base}", f"--dataset_name={tmp_path / 'rows.jsonl'}", "--max_length=96",
        f"--output_dir={tmp_path / 'out'}",
    ]  # fmt: skip


def test_a_run_that_cannot_fit_is_refused_before_anything_is_made(arguments, tmp_path, monkeypatch, capsys):
    here(monkeypatch, 40 * 2**20)
    for command, more in ((cli.train_reward_model, []), (cli.run_pipeline, ["--rloo.response_length=16"])):
        with pytest.raises(SystemExit) as ended:
            command([*arguments, *more])
        assert ended.value.code == 1
        error = " ".join(capsys.readouterr().err.split())
        assert "The run cannot fit into memory" in error
        assert "there are 0.04 GiB: a small machine" in error
        assert "allocator and libraries" in error
        assert "--force starts it all the same" in error
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("**/*.safetensors"))


def asked(rig):
    return request_of_pipeline(parse_pipeline(["--use_peft"]), rig)


def refused(**more):
    refuse_what_cannot_fit(asked, use_cpu=False, **{"force": False, **more})


def test_force_goes_on_and_about_the_limit_there_is_a_warning(monkeypatch, capsys):
    need = max(need.worst.total for need in needs_of(asked(Rig(cpu=True))))
    here(monkeypatch, need / 2)
    with pytest.raises(ValueError, match="cannot fit into memory"):
        refused()
    refused(force=True)
    assert "goes on as --force says" in " ".join(capsys.readouterr().out.split())
    for share, warned in ((0.9, True), (1.1, True), (1.3, False)):
        here(monkeypatch, need * share)
        refused()
        assert ("memory may run out" in " ".join(capsys.readouterr().out.split())) == warned


def test_what_fits_is_named_with_the_flags_of_the_script(monkeypatch):
    here(monkeypatch, 24 * GIB)
    with pytest.raises(ValueError, match="This fits with the 15 % to spare") as whole:
        refuse_what_cannot_fit(
            lambda rig: request_of_pipeline(parse_pipeline(["--use_peft", "--max_length=30000"]), Rig()),
            use_cpu=False,
            force=False,
        )
    assert "--max_length" in str(whole.value)


def test_force_makes_no_stage_run_again():
    alone, forced = (parse_pipeline(argv) for argv in ([], ["--force"]))
    assert forced.own.force
    assert not alone.own.force
    for stage in ("reward", "rloo"):
        assert effective_settings(getattr(alone, stage)) == effective_settings(getattr(forced, stage))


def test_an_unknown_model_or_memory_is_said_and_passed_over(monkeypatch, capsys):
    here(monkeypatch, GIB)

    def unknown(rig):
        raise ValueError("The dimensions of 'x' are not known.")

    refuse_what_cannot_fit(unknown, use_cpu=False, force=False)
    assert "is not checked: The dimensions of 'x' are not known." in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(machine, "memory_here", lambda *, use_cpu: None)
    refused()
    assert "cannot be told" in capsys.readouterr().out


def test_only_the_main_process_decides(monkeypatch):
    here(monkeypatch, GIB)
    monkeypatch.setenv("RANK", "1")
    refused()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="cannot fit into memory"):
        refused()


def test_what_is_finished_does_not_count(monkeypatch):
    def whole(rig):
        return request_of_pipeline(parse_pipeline(["--rloo.use_peft"]), rig)

    rloo = [need.worst.total for need in needs_of(whole(Rig(cpu=True))) if need.stage in ("RLOO", "evaluation")]
    here(monkeypatch, 1.2 * max(rloo))
    with pytest.raises(ValueError, match="reward model needs"):
        refuse_what_cannot_fit(whole, use_cpu=False, force=False)
    refuse_what_cannot_fit(whole, use_cpu=False, force=False, finished=["reward_model", "verification"])
    here(monkeypatch, 1)
    refuse_what_cannot_fit(
        whole, use_cpu=False, force=False, finished=["reward_model", "verification", "rloo", "evaluation"]
    )


def test_a_refused_run_downloads_and_records_nothing(arguments, tmp_path, monkeypatch):
    def looked_for(knobs):
        raise AssertionError("the data set was looked for")

    monkeypatch.setattr("helpsteer_rloo.steps.locate", looked_for)
    here(monkeypatch, 40 * 2**20)
    for command, more in ((cli.train_reward_model, []), (cli.run_pipeline, ["--rloo.response_length=16"])):
        with pytest.raises(SystemExit):
            command([*arguments, *more])
    assert not list(tmp_path.glob("**/run.json"))


def test_a_launch_that_is_not_planned_is_passed_over(monkeypatch, capsys):
    here(monkeypatch, GIB)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    refused()
    assert "is not checked: FSDP with weights in main memory" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "zero2"),
        ({"ZERO_STAGE": "3"}, "zero3"),
        ({"ZERO_STAGE": "3", "OFFLOAD_PARAM_DEVICE": "none", "OFFLOAD_OPTIMIZER_DEVICE": "none"}, "zero3"),
        ({"ZERO_STAGE": "3", "OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer_device"),
        ({"CONFIG_FILE": "zero3.json"}, "deepspeed_config_file"),
        ({"ZERO_STAGE": "1"}, "zero_stage 1"),
    ],
)
def test_how_deepspeed_shares_is_read_or_said_not_to_be_planned(environment, says, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    if says.startswith("zero") and " " not in says:
        assert launched_sharding() == says
        return
    with pytest.raises(ValueError, match=f"{says}.* is not planned"):
        launched_sharding()


def test_the_demo_is_not_refused_on_a_machine_of_two_gib(monkeypatch, tiny_base):
    settings = parse_demo([]).pipeline
    shape = Shape(128, 3, 4, 2, 32, 384, 1280, tied=True)
    monkeypatch.setattr("helpsteer_rloo.planning.requesting.shape_of", lambda *_: shape)
    here(monkeypatch, 2 * GIB)
    refuse_what_cannot_fit(lambda rig: request_of_pipeline(settings, rig), use_cpu=False, force=False)


# ---- the machine -----------------------------------------------------------------------------------------------------


def written(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_memory_is_what_the_system_and_every_control_group_leave(tmp_path):
    written(tmp_path, "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert available_memory(tmp_path) == 8000 * 1024
    written(tmp_path, "proc/self/cgroup", "0::/outer/inner\n")
    group = "sys/fs/cgroup/outer"
    written(tmp_path, f"{group}/memory.max", "4000000\n")
    written(tmp_path, f"{group}/memory.current", "1500000\n")
    written(tmp_path, f"{group}/memory.stat", "anon 5\ninactive_file 500000\n")
    written(tmp_path, f"{group}/inner/memory.max", "max\n")
    assert available_memory(tmp_path) == 3_000_000
    written(tmp_path, "proc/self/cgroup", "5:cpu,memory:/box\n0::/\n")
    written(tmp_path, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", "2000")
    written(tmp_path, "sys/fs/cgroup/memory/box/memory.usage_in_bytes", "1500")
    assert available_memory(tmp_path) == 500


def test_this_machines_memory_is_found(monkeypatch):
    alone = machine.memory_here(use_cpu=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shared = machine.memory_here(use_cpu=True)
    assert alone.cpu
    assert "shared by 2 processes" in shared.what
    assert shared.bytes == pytest.approx(alone.bytes / 2, rel=0.2)


# ---- time ------------------------------------------------------------------------------------------------------------


def test_tokens_and_steps_follow_from_the_settings():
    corpus = helpsteer3(1024, 512, english=True)
    found = request_of_pipeline(parse_pipeline(["--use_peft", "--total_episodes=1600", "--reward_epochs=1"]), Rig())
    parts = {(part.stage, part.name): part for part in parts_of(found, corpus, rate_of("a100"))}
    reward = parts["reward model", "training"]
    assert reward.tokens == pytest.approx(corpus.pairs * corpus.work_a_pair.tokens)
    rloo = parts["RLOO", "training"]
    assert rloo.steps == 100
    assert rloo.tokens == pytest.approx(400 * (round(corpus.prompt) + 4 * 512))
    assert parts["RLOO", "scores"].tokens == parts["RLOO", "reference"].tokens == rloo.tokens
    twice = request_of_pipeline(
        parse_pipeline(["--use_peft", "--total_episodes=1600", "--rloo.num_ppo_epochs=2"]), Rig()
    )
    again = {(part.stage, part.name): part for part in parts_of(twice, corpus, None)}
    assert again["RLOO", "training"].flops == pytest.approx(2 * rloo.flops)
    assert again["RLOO", "sampling"].flops == pytest.approx(parts["RLOO", "sampling"].flops)


def test_lengths_of_a_run_replace_those_of_helpsteer3(tmp_path, capsys):
    tokens = {"p50": 30.0, "p90": 40.0, "p95": 45.0, "p99": 50.0, "p100": 60.0}
    split = {"pairs": 600, "prompts": 300, "tokens": dict.fromkeys(("prompt", "chosen", "rejected"), tokens)}
    report = {"splits": {"train": split, "validation": {**split, "pairs": 60}}}
    corpus = counted(report, 1024, 512, "data.json")
    assert (corpus.pairs, corpus.heldout_pairs) == (600, 60)
    assert corpus.prompt == pytest.approx(30, rel=0.05)
    assert corpus.work_a_pair.tokens == pytest.approx(30 / 2 + 60, rel=0.05)  # two pairs share a prompt
    (tmp_path / "data.json").write_text(json.dumps(report))
    found = planned(capsys, "--gpu_memory_gb=24", f"--data_json={tmp_path / 'data.json'}")
    assert found["lengths"]["pairs"] == 600
    os.mkfifo(tmp_path / "pipe")  # as `<(…)` is one
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(json.dumps(report)))
    writer.start()
    assert planned(capsys, "--gpu_memory_gb=24", f"--data_json={tmp_path / 'pipe'}")["lengths"]["pairs"] == 600
    writer.join()
    several = {"splits": {"train": {**split, "pairs": 480}, "validation": split}}  # 1.6 pairs a prompt
    assert counted(several, 1024, 512, "").work_a_pair.tokens == pytest.approx(30 / 1.6 + 60, rel=0.05)
    with pytest.raises(ValueError, match="holds no counts of tokens"):
        counted({"splits": {}}, 1024, 512, "data.json")
    for damaged in (-1, 1e308, {"p50": -5.0}, {"p50": 1e308}):
        broken = {**split, "tokens": {**split["tokens"], "prompt": damaged}}
        with pytest.raises(ValueError, match=r"data\.json holds no counts of tokens"):
            counted({"splits": {"train": broken, "validation": split}}, 1024, 512, "data.json")


def test_prompts_of_a_run_are_no_longer_where_its_responses_are():
    """All in one order, long prompts would meet long responses, and the limit would cut far more."""
    tokens = {"p50": 100.0, "p100": 900.0}
    split = {"pairs": 300, "prompts": 300, "tokens": dict.fromkeys(("prompt", "chosen", "rejected"), tokens)}
    report = {"splits": {"train": split, "validation": split}}
    free, cut = (counted(report, limit, 4096, "").work_a_pair for limit in (4096, 1024))
    lengths = np.interp(np.linspace(0, 1, 501), [0, 0.5, 1], [1, 100, 900])
    apart = lengths[:, None] * 2 * lengths
    assert free.attended == pytest.approx(apart.mean() + 1.5 * (lengths**2 + lengths).mean(), rel=0.05)
    assert cut.tokens < free.tokens


def test_an_ensemble_scores_every_rollout_and_a_guard_what_is_measured(capsys):
    argv = ["--use_peft", "--total_episodes=1600", "--reward.ensemble=2", "--guard", "--rloo.watch_steps=30"]
    found = planned(capsys, *argv, "--gpu_name=a100")
    parts = {part["part"]: part for part in found["time"] if part["stage"] == "RLOO"}
    assert list(parts) == [
        "sampling", "scores: reward model", "scores: reward model 2", "reference", "training", "watch: sampling",
        "watch: scores: reward model", "watch: scores: reward model 2", "watch: guard", "watch: log-probabilities",
    ]  # fmt: skip
    for name in ("scores: reward model", "scores: reward model 2"):
        assert parts[name]["tokens"] == parts["training"]["tokens"]
    # of 100 steps at 0, 30, 60, 90 and 100, on 128 prompts with a completion each
    measured = 5 * 128 * (round(found["lengths"]["prompt_tokens"]) + 512)
    assert parts["watch: guard"]["tokens"] == parts["watch: sampling"]["tokens"] == measured
    assert parts["watch: log-probabilities"]["tokens"] == 2 * measured
    alone = [part["part"] for part in planned(capsys, *argv[:2])["time"] if part["stage"] == "RLOO"]
    assert alone == ["sampling", "scores", "reference", "training"]


def test_of_few_prompts_a_quarter_is_watched():
    tokens = {part: {"p50": 30.0, "p100": 60.0} for part in ("prompt", "chosen", "rejected")}
    split = {"pairs": 80, "prompts": 40, "tokens": tokens}
    corpus = counted({"splits": {"train": split, "validation": split}}, 1024, 512, "data.json")
    assert corpus.prompts == pytest.approx(40)
    request = request_of_pipeline(parse_pipeline(["--guard", "--total_episodes=16"]), Rig())
    guard = next(part for part in parts_of(request, corpus, None) if part.name == "watch: guard")
    assert guard.tokens == pytest.approx(2 * 10 * (round(corpus.prompt) + 512))


def test_lengths_that_cannot_be_read_are_refused_with_what_to_give(monkeypatch, capsys):
    def no_file(path, advice, **_):
        raise ValueError(f"{path} is no regular file; {advice}")

    monkeypatch.setattr("helpsteer_rloo.commands.plan.read_json", no_file)
    with pytest.raises(SystemExit) as ended:
        cli.plan(["--gpu_memory_gb=24", "--data_json=/dev/zero"])
    assert ended.value.code == 1
    assert "error: /dev/zero is no regular file; Give the data.json of a run." in capsys.readouterr().err
