"""Faults that are planted in the data of a reward model, and what its judgement says of them.

    python -m benchmarks.reward_faults [--seed 1] [--directory DIR] [--base DIR]

Every reward model is trained by the command on the demo world's rows with a fault, and judged by the command on its
held-out prompts: on sound rows, but for the noise, which is in the held-out labels too, as in a data set that has it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import demo_world as world

Row = dict[str, Any]

TRIALS = {
    "sound": (world.sound, world.sound),
    "length bias": (world.length_biased, world.sound),
    "sound, markdown": (world.in_markdown, world.in_markdown),
    "markdown bias": (world.markdown_biased, world.in_markdown),
    "inverted in stem": (world.inverted_in_stem, world.sound),
    "30 % noise": (world.noisy, world.noisy),
}
"""What a reward model is trained on, and what it is judged on."""

EXPECTED = {
    "length bias": ("bias/length", "above zero", lambda part: part["interval"][0] > 0),
    "markdown bias": ("bias/markdown", "above zero", lambda part: part["interval"][0] > 0),
    "inverted in stem": ("accuracy/stem", "below a half", lambda part: part["interval"][1] < 0.5),
    "30 % noise": (
        "most_certain",
        "around 0.7",
        lambda part: part["interval"][0] <= 0.72 and part["interval"][1] < 0.8,
    ),
}
"""The finding that each fault is to be known by."""


def trial(name: str, directory: Path, base: Path, seed: int) -> Row:
    """Train, judge, and say what was found."""
    trained_on, judged_on = TRIALS[name]
    place = directory / name.replace(" ", "_").replace(",", "").replace("%", "percent")
    rows = world.write_faulty(place / "rows.jsonl", seed, trained_on)
    judged_rows = world.write_faulty(place / "judged.jsonl", seed, judged_on)
    model = world.train_reward_model(place / "model", base, rows, seed)
    result = world.judged(model, judged_rows, place / "judgement.json")
    print(f"\n{name}: accuracy {result['heldout_accuracy']:.3f} on {result['heldout_pairs']} pairs", flush=True)
    for finding in result["findings"]:
        print(f"  {'LOOK' if finding['concern'] else 'ok  '} {finding['name']}: {finding['sentence']}", flush=True)
    return {"name": f"reward_faults/{name}", "result": result}


def main() -> None:
    """Run the trials; exit status 1 if a fault was not found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the world, the base and the reward models")
    parser.add_argument("--directory", type=Path, help="where everything is kept (default: nowhere)")
    parser.add_argument("--base", type=Path, help="a base of the demo to go on from (default: it is built)")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.directory or Path(scratch)
        base = world.built_base(options.base or directory / "base", options.seed)
        rows = {name: trial(name, directory, base, options.seed) for name in TRIALS}
    if options.output:
        with options.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows.values())
    missed = 0
    print()
    for name, (finding, where, holds) in EXPECTED.items():
        part = {f["name"]: f for f in rows[name]["result"]["findings"]}.get(finding)
        found = part is not None and holds(part)
        missed += not found
        low, high = part["interval"] if part else (float("nan"),) * 2
        value = part["value"] if part else float("nan")
        print(f"{name}: {finding} {value:+.3f} [{low:+.3f}, {high:+.3f}], {where}: {'found' if found else 'MISSED'}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
