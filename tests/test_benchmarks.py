import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness, models, precision, profile, qwen3_8b, rloo_step, tables, vocabulary

ROOT = Path(__file__).resolve().parents[1]
KEYS = {
    "name",
    "ours",
    "trl",
    "ratio",
    "peak_bytes_ours",
    "peak_bytes_trl",
    "tokens_ours",
    "tokens_trl",
    "flops_fraction_of_gemm_peak",
    "gemm_flops",
    "fastest_gemm_flops",
    "flops_fraction_of_fastest_gemm",
    "pair_ratios",
    "seed",
    "threads",
    "versions",
}


# ---- lengths --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    return profile.distinct_pairs(40_000, seed=3)


def test_the_longer_sequences_are_over_the_limits_as_often_as_published(pairs):
    longer = np.array([pair.longer for pair in pairs])
    for limit, share in profile.LIMITS.items():
        assert (longer > limit).mean() == pytest.approx(share, abs=0.002)


def test_chosen_conversations_have_the_published_quantiles(pairs):
    chosen = [pair.prompt + pair.chosen for pair in pairs]
    assert np.median(chosen) == pytest.approx(profile.CHOSEN_MEDIAN, rel=0.02)
    assert np.percentile(chosen, 95) == pytest.approx(profile.CHOSEN_95, rel=0.03)


def test_responses_are_as_long_as_assumed_and_correlated(pairs):
    responses = np.array([[pair.chosen, pair.rejected] for pair in pairs])
    assert np.median(responses) == pytest.approx(350, rel=0.05)
    assert np.corrcoef(np.log(responses.T))[0, 1] > 0.8
    assert (responses[:, 0] >= responses[:, 1]).mean() == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("limit", [1024, 2048, 4096])
def test_a_small_sample_below_a_limit_has_the_lengths_of_a_large_one(pairs, limit):
    below = [pair.longer for pair in pairs if pair.longer <= limit]
    small = [pair.longer for pair in profile.distinct_pairs(48, 0, limit)]
    assert max(small) <= limit
    assert np.mean(small) == pytest.approx(np.mean(below), rel=0.03)


def test_prompts_repeat_as_in_helpsteer3():
    rows = profile.repeated_pairs(20_000, seed=0, max_length=100_000)
    assert len(rows) / len({row.group for row in rows}) == pytest.approx(38_459 / 24_018, rel=0.01)
    for step in profile.whole_groups(profile.repeated_pairs(48, 0, 2048), 16):
        assert len(step) == 16
        assert all(row.longer <= 2048 for row in step)


def test_ids_of_a_prompt_are_the_same_in_all_its_rows_and_depend_on_the_seed_alone():
    lengths = [profile.Pair(7, prompt=5, chosen=3, rejected=2), profile.Pair(7, prompt=5, chosen=1, rejected=4)]
    first, second = profile.fill(lengths, vocabulary=50, seed=1)
    assert first["chosen_ids"][:5] == first["rejected_ids"][:5] == second["chosen_ids"][:5]
    assert [len(row[key]) for row in (first, second) for key in ("chosen_ids", "rejected_ids")] == [8, 7, 6, 9]
    assert profile.fill(lengths, 50, 1) == [first, second] != profile.fill(lengths, 50, 2)


@pytest.mark.parametrize("mean", [250, 500])
def test_prompts_have_the_mean_asked_for(mean):
    assert np.mean(profile.prompt_lengths(8, mean, seed=0)) == pytest.approx(mean, rel=0.002)


# ---- operations -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted():
    """Forward and backward FLOPs of a tiny body with LoRA, counted by torch; its attention is the full square."""
    import peft
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    policy = models.make_policy(models.TINY, torch.float32, 0)
    adapted = peft.get_peft_model(policy, models.make_lora("CAUSAL_LM"))
    adapted.enable_input_require_grads()
    policy.set_attn_implementation("eager")
    input_ids = torch.arange(2, 50)[None]
    with FlopCounterMode(display=False) as forward:
        hidden = policy.model(input_ids=input_ids, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_flops_are_those_that_torch_counts(counted):
    work = models.Work(tokens=48, attended=48 * 48)
    # torch also counts the product that makes the rotary angles, which is no part of the model's work
    assert models.forward_flops(models.TINY, work) == pytest.approx(counted[0], rel=0.005)
    assert models.backward_flops(models.TINY, work) == pytest.approx(counted[1], rel=0.005)


def test_a_shared_prompt_is_computed_once():
    alone = models.Work.of_group(10, [4]) + models.Work.of_group(10, [6])
    shared = models.Work.of_group(10, [4, 6])
    assert alone.tokens - shared.tokens == 10
    assert alone.attended - shared.attended == 10 * 11 // 2


def test_sizes_of_the_models_are_counted_as_transformers_makes_them():
    import torch

    policy = models.make_policy(models.TINY, torch.float32, 0)
    linears = [m for m in policy.model.modules() if isinstance(m, torch.nn.Linear)]
    assert models.TINY.body_parameters() == sum(linear.weight.numel() for linear in linears)
    assert models.QWEN3_8B.body_parameters() == pytest.approx(6.95e9, rel=0.01)


def test_text_of_ids_becomes_the_same_ids():
    tokenizer = models.make_tokenizer(models.TINY)
    ids = [2, 20, 200, 511]
    assert tokenizer(models.as_text(ids)).input_ids == ids
    assert tokenizer(models.as_text(ids) + tokenizer.decode([3, 30])).input_ids == [*ids, 3, 30]
    assert tokenizer.eos_token_id == models.TINY.vocabulary


def test_qwen3_8b_is_made_in_place_without_anything_left_out():
    import torch
    from transformers import Qwen3ForCausalLM

    model = qwen3_8b.materialized(Qwen3ForCausalLM, models.make_config(models.TINY), seed=0)
    stock = Qwen3ForCausalLM(models.make_config(models.TINY))
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert model(torch.arange(2, 9)[None]).logits.isfinite().all()


def test_trl_needs_two_models_for_rloo_at_8b():
    reward, rloo = (qwen3_8b.trl_bytes(models.QWEN3_8B, step) / 2**30 for step in ("reward", "rloo"))
    assert reward == pytest.approx(14.1 + 0.65 + 0.2, abs=0.5)
    assert rloo > 24  # gibibytes of the machine that ours runs on


def test_tied_heads_count_once():
    untied = replace(models.TINY, tied=False)
    assert qwen3_8b.trl_bytes(untied, "rloo") > qwen3_8b.trl_bytes(replace(untied, tied=True), "rloo")


# ---- checks and tables ----------------------------------------------------------------------------------------------


def test_sides_that_differ_are_refused():
    assert harness.require_equal("Losses", [1.0, 2.0], [1.0, 2.5], 0.5) == 0.5
    with pytest.raises(ValueError, match=r"differ by 0\.5"):
        harness.require_equal("Losses", [1.0, 2.0], [1.0, 2.5], 0.1)
    with pytest.raises(ValueError, match="cannot be compared"):
        harness.require_equal("Losses", [1.0], [], 0.1)
    with pytest.raises(ValueError, match="differ by nan"):
        harness.require_equal("Losses", [float("nan")], [1.0], 0.1)


def line(name, **changes):
    row = {
        "name": name,
        "ours": 2.0,
        "trl": 7.0,
        "ratio": 3.5,
        "pair_ratios": [3.4, 3.5, 3.75],
        "peak_bytes_ours": 2**30,
        "peak_bytes_trl": 5 * 2**29,
        "tokens_ours": 12_345.0,
        "tokens_trl": 45_678.0,
        "flops_fraction_of_gemm_peak": 0.471,
        "flops_fraction_with_recomputation": 0.671,
        "flops_fraction_of_fastest_gemm": 0.298,
        "phase_flops_fraction_of_gemm_peak": {"policy": 0.75},
        "phase_flops_fraction_of_fastest_gemm": {"policy": 0.5},
        "gemm_flops_range": [140e9, 150e9],
        "fastest_gemm_flops_range": [210e9, 240e9],
        "threads": 2,
        "seed": 0,
        "quick": False,
        "versions": {"python": "3.11.7", "trl": "1.16.0"},
    }
    return json.dumps(row | changes)


ROW = "| 2048-distinct | 2.00 | 7.00 | 3.50× | 3.40–3.75 | 1.00 | 2.50 | 12,345 | 45,678 | 47.1 % | 67.1 % | 29.8 % |"


def test_tables_are_put_between_their_markers(tmp_path):
    results, document = tmp_path / "results.jsonl", tmp_path / "performance.md"
    lines = [
        line("reward_training/2048-distinct", ours=9.0),
        line("reward_training/2048-distinct"),
        line("reward_training/4096-distinct", quick=True),
    ]
    results.write_text("\n".join(lines) + "\n", encoding="utf-8")
    marks = "<!-- benchmarks: {} -->\nold\n<!-- end -->\n"
    text = f"Before\n\n{marks.format('reward_training')}\nbetween\n\n{marks.format('growth-k')}after\n"
    document.write_text(text, encoding="utf-8")
    tables.main([str(results), str(document)])
    filled = document.read_text(encoding="utf-8")
    first, second = filled.split("between")
    assert first.startswith("Before\n\n<!-- benchmarks: reward_training -->\n| ")
    assert [cells for cells in first.splitlines() if "2048" in cells or "4096" in cells] == [ROW]
    rates = "GEMM 140–150 GFLOP/s; fastest GEMM 210–240 GFLOP/s"
    assert f"Threads 2; seed 0; python 3.11.7, trl 1.16.0; {rates}.\n<!-- end -->" in first
    assert second == f"\n\n{marks.format('growth-k')}after\n"
    tables.main([str(results), str(document)])
    assert document.read_text(encoding="utf-8") == filled


@pytest.mark.parametrize("name", ["rloo_step", "vocabulary", "qwen3_8b"])
def test_every_benchmark_has_a_table(name):
    rows = tables.read_rows([line(f"{name}/row", phase_seconds_ours={"backward": 1.0})])
    assert "| row |" in tables.table(name, rows[name])


def test_the_share_of_the_gemm_rate_is_given_by_pass():
    rows = tables.read_rows([line("rloo_step/row")])
    assert "policy 75 % (50 %)" in tables.table("rloo_step", rows["rloo_step"])


def test_a_document_without_markers_and_unknown_markers_are_refused():
    rows = tables.read_rows([line("rloo_step/row"), line("precision/row")])
    with pytest.raises(ValueError, match=r"no markers for any of \['precision', 'rloo_step'\]"):
        tables.fill("nothing\n", rows)
    assert "| row |" in tables.fill("<!-- benchmarks: rloo_step -->\n<!-- end -->\n", rows)
    with pytest.raises(ValueError, match=r"unknown benchmarks: \['rlo'\]"):
        tables.fill("<!-- benchmarks: rlo -->\n<!-- end -->\n", rows)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (None, "No such file"),
        ([line("rloo_step/row"), "{"], "Line 2 of the results is no row"),
        ([line("rloo_step/row", quick=True)], "no measured row"),
    ],
)
def test_results_that_are_none_are_told(lines, told, tmp_path, capsys):
    if lines is not None:
        (tmp_path / "results.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(SystemExit):
        tables.main([str(tmp_path / "results.jsonl")])
    assert told in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit):
        harness.parse("Benchmark", ["--output", str(tmp_path / "nowhere" / "x.jsonl")])
    assert "--output: nothing can be written there" in capsys.readouterr().err


def test_a_name_that_no_row_has_is_told():
    for benchmark in (vocabulary.benchmark, precision.benchmark, rloo_step.benchmark):
        with pytest.raises(SystemExit, match="--only 'nonsense' is in no row's name"):
            harness.main("Benchmark", benchmark, ["--only", "nonsense"])


# ---- the whole thing ------------------------------------------------------------------------------------------------


def run_quick(module, tmp_path):
    output = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--threads", "1", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert output.read_text(encoding="utf-8") == done.stdout
    (row,) = map(json.loads, done.stdout.splitlines())
    assert set(row) >= KEYS
    assert row["ratio"] == row["trl"] / row["ours"] > 0
    for side in harness.SIDES:
        assert 0 < row[f"peak_above_imports_bytes_{side}"] < row[f"peak_bytes_{side}"]
        assert sum(row[f"phase_seconds_{side}"].values()) == pytest.approx(row[side])
        assert sum(row[f"phase_tokens_{side}"].values()) == row[f"tokens_{side}"]
    return row


@pytest.mark.slow
def test_reward_training_runs_and_both_sides_have_the_same_losses(tmp_path):
    row = run_quick("reward_training", tmp_path)
    assert row["largest_loss_difference"] < 1e-4
    assert len(row["losses_trl"]) == 2
    assert row["tokens_ours"] <= row["tokens_trl"]


@pytest.mark.slow
def test_rloo_step_runs_and_both_sides_agree_on_forced_completions(tmp_path):
    row = run_quick("rloo_step", tmp_path)
    assert row["forced_gradient_difference"] < 1e-4
    assert (row["completions"], row["completion_tokens"]) == (16, 16 * 8)
    assert row["sampling_floor_seconds"] > 0


@pytest.mark.slow
def test_the_demo_runs_with_both_engines(tmp_path):
    output = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks.demo_engines", "--quick", "--threads", "1", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    row = json.loads(output.read_text(encoding="utf-8"))
    assert row["ratio"] == row["trl"] / row["ours"] > 0
    assert row["gold_before_ours"] == row["gold_before_trl"]
    assert "seed1" in tables.table("demo", [row])
