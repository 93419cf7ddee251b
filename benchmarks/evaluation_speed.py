"""Evaluation of 2,000 pairs: packed rows with shared prompts, against each side on its own in padded batches.

    python -m benchmarks.evaluation_speed [--reward_model_dir DIR] [--pairs 2000] [--rounds 5] [--threads 2]

The two are timed in turn in one process, on the demo's reward model and rows. The other side is what a script would do:
the stock model, chosen and rejected sequences apart, 64 at a time, padded to the longest, in the order of the data or,
as a second baseline, sorted by length. Scores must agree.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import demo_world as world
from helpsteer_rloo.data.preparation import prepare
from helpsteer_rloo.evaluation.preference import judge
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import pad_right
from helpsteer_rloo.model.loading import load_reward_model, load_tokenizer
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.settings.knobs import DataKnobs

BATCH = 64
LARGEST_DIFFERENCE = 1e-4


def some_pairs(reward_model: Path, rows: Path, count: int) -> list[TokenGroup]:
    """Groups of the demo's rows with that many pairs, in the order of the data."""
    knobs = DataKnobs(dataset_name=str(rows), validation_fraction=0.15, max_length=96)
    prepared = prepare(knobs, Renderer(load_tokenizer(str(reward_model))))
    groups, pairs = [], 0
    for group in [g for groups in prepared.groups.values() for g in groups]:
        if pairs < count:
            groups.append(group)
            pairs += len(group.preferences)
    return groups


@torch.no_grad()
def padded(model: Any, sequences: Sequence[Sequence[int]], order: Sequence[int]) -> list[float]:
    """Scores of sequences by the stock model, `BATCH` at a time in an order."""
    scores = [0.0] * len(sequences)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        ids_BT, mask_BT = pad_right([sequences[place] for place in chosen], torch.device("cpu"))
        ids_BT = ids_BT.masked_fill(mask_BT == 0, model.config.get_text_config().pad_token_id)  # by which it finds ends
        logits_B = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0]
        for place, value in zip(chosen, logits_B.tolist(), strict=True):
            scores[place] = value
    return scores


def main() -> None:
    """Time the sides in turn and print the ratios; exit status 1 if scores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward_model_dir", type=Path, help="of a finished demo (default: one is trained)")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        rows = world.write_faulty(Path(scratch) / "rows.jsonl", 1, world.sound)
        directory = options.reward_model_dir
        if directory is None:
            base = world.built_base(Path(scratch) / "base", 1)
            directory = world.train_reward_model(Path(scratch) / "model", base, rows, 1)
        groups = some_pairs(directory, rows, options.pairs)
        ours, stock = load_reward_model(directory)[0], load_reward_model(directory)[0].eval()
    sides = [[g.sequence(getattr(p, side)) for g in groups for p in g.preferences] for side in ("chosen", "rejected")]
    in_order = list(range(len(sides[0])))
    seconds: dict[str, list[float]] = {"ours": [], "padded": [], "padded, sorted": []}
    for _ in range(options.rounds):
        begin = time.perf_counter()
        found = judge(ours, groups, BATCH)
        seconds["ours"].append(time.perf_counter() - begin)
        for name in ("padded", "padded, sorted"):
            begin = time.perf_counter()
            scores = [
                padded(stock, side, in_order if name == "padded" else sorted(in_order, key=lambda i: len(side[i])))
                for side in sides
            ]
            seconds[name].append(time.perf_counter() - begin)
    pairs = zip(found, *scores, strict=True)
    largest = max(max(abs(j.chosen.score - a), abs(j.rejected.score - b)) for j, a, b in pairs)
    ratios = {
        name: [theirs / own for theirs, own in zip(values, seconds["ours"], strict=True)]
        for name, values in seconds.items()
        if name != "ours"
    }
    for name, values in ratios.items():
        print(
            f"{name}: {statistics.median(seconds[name]):.2f} s, ours {statistics.median(seconds['ours']):.2f} s, "
            f"{statistics.median(values):.2f} times ({min(values):.2f} to {max(values):.2f})"
        )
    print(json.dumps({"name": "evaluation_speed", "pairs": len(found), "seconds": seconds, "difference": largest}))
    if largest > LARGEST_DIFFERENCE:
        raise SystemExit(f"Scores differ by {largest:.2g}.")


if __name__ == "__main__":
    main()
