"""Offline benchmarks: results worked out by hand, files in their published formats, scores from elsewhere."""

import gzip
import json
import math
import re

import pyarrow
import pyarrow.parquet
import pytest
import torch

from helpsteer_rloo import cli, events
from helpsteer_rloo.data.sources import BadRowError
from helpsteer_rloo.evaluation.benchmarks.helpsteer3 import HELPSTEER3
from helpsteer_rloo.evaluation.benchmarks.items import Item
from helpsteer_rloo.evaluation.benchmarks.judgebench import JUDGEBENCH
from helpsteer_rloo.evaluation.benchmarks.rewardbench2 import REWARDBENCH2
from helpsteer_rloo.evaluation.benchmarks.rm_bench import RM_BENCH
from helpsteer_rloo.evaluation.benchmarks.scores import read_scores, score_items, write_scores
from helpsteer_rloo.groups import Message
from helpsteer_rloo.model.forward import score_sequences
from helpsteer_rloo.model.loading import load_reward_model, load_tokenizer
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.statistics import mean_of_means
from tests.broken.conftest import world
from tests.data.rows import make_row, write_jsonl

__all__ = ["world"]


def judge_row(number, label="A>B", source="mmlu-pro-law", model="gpt-4o"):
    return {
        "pair_id": f"p{number}",
        "original_id": number,
        "source": source,
        "question": f"Question {number}?",
        "response_model": model,
        "response_A": "yes",
        "response_B": "no",
        "label": label,
    }


def rm_row(number, domain):
    sides = {side: [f"{side} {style}" for style in range(3)] for side in ("chosen", "rejected")}
    return {"id": number, "prompt": f"Prompt {number}", "domain": domain, **sides}


def best_row(own_id, subset, right=1, wrong=3):
    return {
        "id": own_id,
        "prompt": f"Prompt {own_id}",
        "subset": subset,
        "chosen": [f"right {n}" for n in range(right)],
        "rejected": [f"wrong {n}" for n in range(wrong)],
        "num_correct": right,
    }


def scored(items, values):
    """Scores by id, given in the order of an item's fields."""
    return {item.id: dict(zip(item.responses, values[item.id], strict=True)) for item in items}


# ---- JudgeBench -----------------------------------------------------------------------------------------------------


def test_judgebench_by_hand(tmp_path):
    rows = [
        judge_row(1, "A>B"),
        judge_row(2, "B>A"),
        judge_row(3, "A>B", "livebench-math-x"),
        judge_row(4, "B>A", "livebench-math-x", "claude"),
        judge_row(5, "B>A", "elsewhere", "claude"),
    ]
    found = JUDGEBENCH.read(write_jsonl(tmp_path / "pairs.jsonl", rows))
    # Right, wrong, a tie that is no A>B, a tie that is B>A, right.
    values = {"p1": [2.0, 1.0], "p2": [0.5, 0.0], "p3": [1.0, 1.0], "p4": [1.0, 1.0], "p5": [-2.0, -1.0]}
    result = JUDGEBENCH.result(found.items, scored(found.items, values))
    assert result["accuracy"]["value"] == pytest.approx(3 / 5)
    assert result["equal_scores"] == 2
    models = result["by_response_model"]
    assert models["gpt-4o"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert models["gpt-4o"]["by_source"]["mmlu-pro"]["value"] == pytest.approx(1 / 2)
    assert models["gpt-4o"]["by_source"]["livebench-math"] == {
        "value": 0.0,
        "interval": [0.0, pytest.approx(0.793, abs=1e-3)],
        "count": 1,
    }
    assert models["claude"]["by_source"] == {
        "elsewhere": models["claude"]["by_source"]["elsewhere"],
        "livebench-math": models["claude"]["by_source"]["livebench-math"],
    }
    assert models["claude"]["accuracy"]["value"] == 1.0


def test_judgebench_reads_a_directory_with_both_response_models(tmp_path):
    for model, numbers in (("gpt-4o", (1, 2)), ("claude", (3,))):
        write_jsonl(
            tmp_path / f"dataset=judgebench,response_model={model}.jsonl", [judge_row(n, model=model) for n in numbers]
        )
    assert sorted(item.labels["response_model"] for item in JUDGEBENCH.read(tmp_path).items) == [
        "claude",
        "gpt-4o",
        "gpt-4o",
    ]


# ---- RM-Bench -------------------------------------------------------------------------------------------------------


def rm_items(tmp_path, domains):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([rm_row(number, domain) for number, domain in enumerate(domains)]))
    return RM_BENCH.read(path).items


def test_rm_bench_by_hand(tmp_path):
    items = rm_items(tmp_path, ["chat", "chat", "code", "math", "safety-refuse", "safety-response"])
    better, worse = [1.0, 2.0, 3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 2.0]
    values = {
        # The wrong answers gain by their style: chosen 1, 2, 3 against 0, 2, 2.5.
        "0": [1.0, 2.0, 3.0, 0.0, 2.0, 2.5],
        "1": better,
        "2": worse,
        "3": better,
        "4": better,
        "5": worse,
    }
    result = RM_BENCH.result(items, scored(items, values))
    # Row 0: M = [[1,0,0],[1,0,0],[1,1,1]]: hard 0/3, normal 2/3, easy 3/3, and a tie is wrong.
    chat = {name: found["value"] for name, found in result["by_domain"]["chat"].items()}
    assert chat == pytest.approx({"hard": 1 / 2, "normal": 5 / 6, "easy": 1.0, "accuracy": (1 / 2 + 5 / 6 + 1) / 3})
    safety = result["by_domain"]["safety"]["accuracy"]
    assert (safety["value"], safety["count"]) == (pytest.approx(1 / 2), 2)
    assert result["by_domain"]["code"]["accuracy"]["value"] == 0.0
    expected = (chat["accuracy"] + 0.0 + 1.0 + 0.5) / 4
    assert result["overall"]["accuracy"]["value"] == pytest.approx(expected)
    assert result["missing_domains"] == []


def test_without_a_domain_rm_bench_has_no_overall(tmp_path):
    items = rm_items(tmp_path, ["chat", "safety-refuse"])
    result = RM_BENCH.result(items, scored(items, {item.id: [1.0] * 3 + [0.0] * 3 for item in items}))
    assert result["overall"] is None
    assert result["missing_domains"] == ["code", "math"]
    assert result["by_domain"]["chat"]["hard"]["value"] == 1.0


def test_rm_benchs_total_is_read_instead_of_its_parts(tmp_path):
    for name, numbers in (
        ("chat_filtered.json", (1,)),
        ("math_filtered.json", (2,)),
        ("total_dataset.json", (1, 2, 3)),
    ):
        (tmp_path / name).write_text(json.dumps([rm_row(number, "chat") for number in numbers]))
    assert len(RM_BENCH.read(tmp_path).items) == 3
    (tmp_path / "total_dataset.json").unlink()
    assert len(RM_BENCH.read(tmp_path).items) == 2


# ---- RewardBench 2 --------------------------------------------------------------------------------------------------


def best_items(tmp_path, rows):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return REWARDBENCH2.read(path).items


def test_rewardbench2_shares_credit_among_the_best(tmp_path):
    items = best_items(tmp_path, [best_row(str(n), "Math") for n in range(4)])
    values = {
        "0": [2.0, 1.0, 0.0, 0.0],  # the best alone
        "1": [2.0, 2.0, 0.0, 0.0],  # one of two
        "2": [2.0, 2.0, 2.0, 2.0],  # one of four
        "3": [1.0, 2.0, 0.0, 0.0],  # not among them
    }
    result = REWARDBENCH2.result(items, scored(items, values))
    assert result["by_subset"]["Math"]["value"] == pytest.approx((1 + 1 / 2 + 1 / 4) / 4)
    assert result["overall"] is None
    assert "Ties" in result["missing_subsets"]


def test_rewardbench2s_ties_by_hand(tmp_path):
    rows = [
        *(best_row(f"ref:{n}", "Ties", right=1, wrong=2) for n in range(3)),
        *(best_row(f"tied:{n}", "Ties", right=2, wrong=2) for n in (0, 1, 3)),
    ]
    items = best_items(tmp_path, rows)
    values = {
        "ref:0": [3.0, 0.0, 1.0],  # gap 2
        "ref:1": [1.0, 2.0, 0.0],  # gap -1: inaccurate
        "ref:2": [1.0, 0.0, 0.0],  # no tied row: counts in the accuracy only
        "tied:0": [5.0, 4.0, 1.0, 0.0],  # spread 1, gap 3: preferred, and hard by min(2, 3) > 1
        "tied:1": [2.0, 2.0, 1.0, 0.0],  # spread 0, gap 1: preferred, not hard: min(-1, 1) is not above 0
        "tied:3": [1.0, 3.0, 2.0, 0.0],  # gap -1: inaccurate; no ref row
    }
    ties = REWARDBENCH2.result(items, scored(items, values))["by_subset"]["Ties"]
    margin = (math.tanh(2 / 1 - 1) + -1.0) / 2  # the second is tanh(-1 / 0 - 1)
    assert ties["ref_accuracy"] == pytest.approx(2 / 3)
    assert ties["tied_accuracy"] == pytest.approx(2 / 3)
    assert ties["prompts_in_both"] == 2
    assert (ties["correctness_preferred"], ties["correctness_preferred_hard"]) == (1.0, 0.5)
    assert ties["value"] == pytest.approx(0.3 * 2 / 3 + 0.3 * 2 / 3 + 0.2 * 1 + 0.2 * 0.5 + 0.01 * margin)


def test_zero_over_zero_counts_zero_and_no_common_prompt_gives_no_score(tmp_path):
    items = best_items(tmp_path, [best_row("ref:7", "Ties", 1, 1), best_row("tied:7", "Ties", 2, 1)])
    values = {"ref:7": [1.0, 1.0], "tied:7": [1.0, 1.0, 1.0]}
    assert REWARDBENCH2.result(items, scored(items, values))["by_subset"]["Ties"]["value"] == 0.0
    result = REWARDBENCH2.result(items[:1], scored(items, values))
    assert result["by_subset"]["Ties"]["value"] is None


def test_rewardbench2_overall_is_the_mean_of_six(tmp_path):
    names = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    rows = [best_row(name, name) for name in names]
    rows += [best_row("ref:0", "Ties", 1, 1), best_row("tied:0", "Ties", 2, 1)]
    items = best_items(tmp_path, rows)
    values = {name: [1.0, 0.0, 0.0, 0.0] for name in names[:4]} | {"Focus": [0.0, 1.0, 0.0, 0.0]}
    values |= {"ref:0": [1.0, 0.0], "tied:0": [1.0, 1.0, 0.0]}
    result = REWARDBENCH2.result(items, scored(items, values))
    ties = 0.3 + 0.3 + 0.2 + 0.2 + 0.01  # the margin is tanh(1 / 0 - 1) = 1
    assert result["by_subset"]["Ties"]["value"] == pytest.approx(ties)
    assert result["overall"] == pytest.approx((4 * 1.0 + 0.0 + ties) / 6)


# ---- HelpSteer3 -----------------------------------------------------------------------------------------------------


def test_helpsteer3_by_hand(tmp_path):
    rows = [
        make_row("a", overall_preference=-2),
        make_row("b", overall_preference=3),
        make_row("c", overall_preference=0),
        make_row("d", overall_preference=1, domain="stem"),
    ]
    found = HELPSTEER3.read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert found.left_out == {"tie": 1}
    assert [item.id for item in found.items] == ["0", "1", "3"]
    values = {"0": [2.0, 1.0], "1": [2.0, 1.0], "3": [1.0, 1.0]}  # right, inverted, and a tie is wrong
    result = HELPSTEER3.result(found.items, scored(found.items, values))
    assert result["accuracy"]["value"] == pytest.approx(1 / 3)
    assert result["by_domain"]["stem"]["value"] == 0.0
    assert result["by_strength"]["2"]["value"] == 1.0


# ---- scores ---------------------------------------------------------------------------------------------------------


ITEMS = [Item("7", (Message("user", "?"),), {"response1": "a", "response2": "b"}, {})]


def test_scores_come_back_as_they_were_written(tmp_path):
    scores = {"7": {"response1": 1.25, "response2": -3e-9}}
    write_scores(tmp_path / "s.jsonl", scores)
    assert read_scores(tmp_path / "s.jsonl", ITEMS) == (scores, 0)
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress((tmp_path / "s.jsonl").read_bytes()))
    assert read_scores(tmp_path / "s.jsonl.gz", ITEMS) == (scores, 0)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            ['{"id": 7, "field": "response1", "score": 1}'],
            "1 of 2 responses have no score, 'response2' of id '7' the f",
        ),
        (
            ['{"id": 7, "field": "response1", "score": "1"}'],
            "line 1, field 'score': expected a finite number, got '1'",
        ),
        (['{"id": 7, "field": "response1", "score": NaN}'], "expected a finite number, got nan"),
        (['{"id": 7, "field": "response1", "score": true}'], "expected a finite number, got True"),
        (['{"id": 7, "field": "response1"}'], "line 1, field 'score': missing"),
        (['{"id": 7.5, "field": "response1", "score": 1}'], "field 'id': expected a string, got float"),
        (['{"id": 7, "field": "x", "score": 1}'] * 2, "line 2, field 'field': 'x' of id '7' has a score in an earlier"),
        (["nonsense"], "line 1, field '(row)': not JSON"),
    ],
)
def test_scores_that_are_not_as_they_should_be(tmp_path, lines, says):
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=re.escape(says)):
        read_scores(path, ITEMS)


def test_scores_of_no_item_are_counted(tmp_path):
    write_scores(tmp_path / "s.jsonl", {"7": {"response1": 1.0, "response2": 2.0}, "8": {"response1": 0.0}})
    assert read_scores(tmp_path / "s.jsonl", ITEMS)[1] == 1


@pytest.mark.parametrize(
    ("benchmark", "row", "says"),
    [
        (JUDGEBENCH, judge_row(1) | {"label": "A=B"}, "field 'label': expected A>B or B>A, got 'A=B'"),
        (JUDGEBENCH, {"pair_id": "p"}, "field 'label': missing"),
        (RM_BENCH, rm_row(1, "chat") | {"chosen": ["a"]}, "field 'chosen': expected 3 responses, got 1"),
        (RM_BENCH, rm_row(1, "cooking"), "field 'domain': expected one of chat, code"),
        (REWARDBENCH2, best_row("1", "Ties"), "field 'id': expected ref:NUMBER or tied:NUMBER in the subset Ties"),
        (REWARDBENCH2, best_row("1", "Math", right=0), "field 'chosen': expected at least one response"),
        (
            REWARDBENCH2,
            best_row("1", "Math") | {"rejected": ["a", 2]},
            "field 'rejected[1]': expected a string, got int",
        ),
    ],
)
def test_rows_that_are_not_as_they_should_be(tmp_path, benchmark, row, says):
    with pytest.raises(BadRowError) as error:
        benchmark.read(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert says in str(error.value)


def test_two_rows_with_one_id_are_refused(tmp_path):
    with pytest.raises(BadRowError, match="line 2, field 'id': 'p1' is the id of an earlier row as well"):
        JUDGEBENCH.read(write_jsonl(tmp_path / "rows.jsonl", [judge_row(1), judge_row(1)]))


@pytest.mark.parametrize("name", ["missing", "rows.txt", "empty"])
def test_paths_without_rows_are_refused(tmp_path, name):
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--benchmark_path .*: no "):
        JUDGEBENCH.read(tmp_path / name)


def test_the_mean_of_means_has_the_interval_of_its_strata():
    found = mean_of_means([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0]])
    error = math.sqrt((1 / 3) / 4 + 0.0) / 2
    assert (found.value, found.count) == (0.75, 6)
    assert found.high - found.value == pytest.approx(1.959964 * error, rel=1e-6)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_reward_model_is_judged_and_its_scores_judged_again(world, tmp_path):
    rows = [
        make_row(f"prompt {n}", overall_preference=(-1) ** n, response1=f"{n} oaks", response2="none") for n in range(6)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    common = ["--benchmark=helpsteer3", f"--benchmark_path={data}"]
    cli.evaluate(
        [
            *common,
            f"--reward_model_dir={world.reward}",
            f"--dump_scores={tmp_path / 's.jsonl'}",
            f"--output={tmp_path / 'r.json'}",
        ]
    )
    cli.evaluate([*common, f"--scores={tmp_path / 's.jsonl'}", f"--output={tmp_path / 'again.json'}"])
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("r.json", "again.json"))
    assert first["result"] == second["result"]
    assert first["scored"] == 6
    model, record = load_reward_model(world.reward)
    renderer = Renderer(load_tokenizer(str(world.reward)), thinking=record["thinking"])
    items = HELPSTEER3.read(data).items
    scores, counts = score_items(model, renderer, items, 96, batch_size=4)
    assert not counts
    for item in items:
        plain = [
            (*renderer.prompt_ids(item.prompt), *renderer.continuation_ids(text, ended=True))
            for text in item.responses.values()
        ]
        assert list(scores[item.id].values()) == pytest.approx(score_sequences(model, plain, 1), abs=1e-5)


def test_what_is_cut_or_cannot_be_scored_is_counted(world):
    model, record = load_reward_model(world.reward)
    renderer = Renderer(load_tokenizer(str(world.reward)), thinking=record["thinking"])
    long = Item("long", (Message("user", "oak " * 200),), {"a": "b"}, {})
    wordy = Item("wordy", (Message("user", "?"),), {"a": "oak " * 200, "b": "elm"}, {})
    scores, counts = score_items(model, renderer, [long, wordy], 48, batch_size=4)
    assert counts == {"prompt_over_max_length": 1, "response_cut": 1}
    assert scores.keys() == {"wordy"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "Give either --reward_model_dir or --scores"),
        (["--benchmark=hellaswag"], "--benchmark is 'hellaswag'; expected one of judgebench"),
        (["--scores=s"], "--benchmark is missing; --scores needs one of judgebench"),
        (["--benchmark=judgebench", "--dataset_name=x"], "--dataset_name cannot be used with --benchmark"),
        (["--benchmark=judgebench"], "--benchmark_path is missing"),
        (["--benchmark=judgebench", "--benchmark_path=x"], "Give either --reward_model_dir or --scores"),
        (
            ["--benchmark=judgebench", "--benchmark_path=x", "--scores=s", "--reward_model_dir=r"],
            "Give either --reward_model_dir or --scores",
        ),
    ],
)
def test_flags_that_do_not_go_together(argv, says, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.evaluate(argv)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_scores_that_are_no_numbers_are_no_scores(world, monkeypatch):
    model, record = load_reward_model(world.reward)
    torch.nn.init.constant_(model.base_model.model.score.modules_to_save.default.weight, float("nan"))
    renderer = Renderer(load_tokenizer(str(world.reward)), thinking=record["thinking"])
    item = Item("one", (Message("user", "?"),), {"a": "oak", "b": "elm"}, {})
    with pytest.raises(ValueError, match="scores of id 'one' are not finite"):
        score_items(model, renderer, [item], 48, batch_size=4)


@pytest.mark.parametrize("score", ["9" * 400, '"0.5"', "true", "NaN"])
def test_a_score_that_is_no_finite_number_names_its_line(tmp_path, score):
    (tmp_path / "s.jsonl").write_text(f'{{"id": "x", "field": "a", "score": {score}}}\n')
    with pytest.raises(ValueError, match="line 1, field 'score': expected a finite number"):
        read_scores(tmp_path / "s.jsonl", [Item("x", (), {"a": ""}, {})])


def test_what_is_read_is_not_written_over(tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", [make_row("prompt", overall_preference=1)])
    common = ["--benchmark=helpsteer3", f"--benchmark_path={data}", "--reward_model_dir=x"]
    for flags in ([f"--output={data}"], [f"--output={tmp_path / 's.jsonl'}", f"--dump_scores={tmp_path / 's.jsonl'}"]):
        with pytest.raises(SystemExit):
            cli.evaluate([*common, *flags])
        assert "is a file that is read or written already" in capsys.readouterr().err
    for flags, says in (
        (["--scores=s.jsonl", "--max_length=64"], "--max_length has no effect with --scores"),
        (["--reward_model_dir=x", "--dump_scores=s.jsonl.gz"], "expected a name that ends in .jsonl"),
    ):
        with pytest.raises(SystemExit):
            cli.evaluate([*common[:2], *flags])
        assert says in capsys.readouterr().err


def test_the_tasks_of_scoring_have_names_of_their_own(world, monkeypatch):
    """What shows them tells the outer task from the inner one by that."""
    monkeypatch.setattr(events, "PATIENCE", 0.0)
    model, record = load_reward_model(world.reward)
    renderer = Renderer(load_tokenizer(str(world.reward)), thinking=record["thinking"])
    item = Item("i", (Message("user", "?"),), {"a": "oak", "b": "elm"}, {})
    open_tasks, deepest = [], []

    def hear(event):
        if event.ended:
            open_tasks.remove(event.task)
        elif event.task not in open_tasks:
            open_tasks.append(event.task)
        deepest.append(tuple(open_tasks))

    with events.subscribed(hear):
        score_items(model, renderer, [item], 48, batch_size=4)
    assert max(deepest, key=len) == ("scoring responses", "scoring")
    assert open_tasks == []
