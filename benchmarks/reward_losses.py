"""The losses `margin` and `scaled` against `bt`, on the demo world, several seeds.

    python -m benchmarks.reward_losses [--seeds 1 2 3 4 5] [--directory DIR] [--base DIR]

Each seed is a world of rows and a reward model a loss, which differ in the loss alone. They are judged on the same
held-out pairs: the difference of accuracy is paired, by pair within a seed (cluster bootstrap by prompt) and by seed
over all (Student's t).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import demo_world as world
from helpsteer_rloo.settings.knobs import LOSSES
from helpsteer_rloo.statistics import mean


def trial(directory: Path, base: Path, seed: int) -> dict[str, Any]:
    """The comparison of the losses in one world; `bt` is the first of each two."""
    rows = world.write_faulty(directory / "rows.jsonl", seed, world.sound)
    models = {loss: world.train_reward_model(directory / loss, base, rows, seed, loss=loss) for loss in LOSSES}
    others = ",".join(str(models[loss]) for loss in LOSSES[1:])
    result = world.judged(models["bt"], rows, directory / "comparison.json", compare_with=others)
    named = {str(directory): loss for loss, directory in models.items()}
    judged = {"bt": result, **{named[name]: other for name, other in result["others"].items()}}
    return {
        "name": f"reward_losses/seed {seed}",
        "accuracy": {loss: judged[loss]["heldout_accuracy"] for loss in LOSSES},
        "log_loss": {loss: judged[loss]["calibration"]["log_loss_with_temperature"]["value"] for loss in LOSSES},
        "pairs": result["heldout_pairs"],
        "difference": {
            named[pair["second"]]: pair["difference"]
            for pair in result["comparison"]["compared"]
            if named[pair["first"]] == "bt"
        },
    }


def main() -> None:
    """Run the trials and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="worlds")
    parser.add_argument("--directory", type=Path, help="where everything is kept (default: nowhere)")
    parser.add_argument("--base", type=Path, help="a base of the demo to go on from (default: it is built)")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file as well")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.directory or Path(scratch)
        base = world.built_base(options.base or directory / "base", 1)
        for seed in options.seeds:
            rows.append(trial(directory / f"seed-{seed}", base, seed))
            row = rows[-1]
            accuracies = ", ".join(f"{loss} {row['accuracy'][loss]:.4f}" for loss in LOSSES)
            differences = ", ".join(f"{loss} {_shown(part)}" for loss, part in row["difference"].items())
            print(f"seed {seed}: accuracy {accuracies}; against bt: {differences}; {row['pairs']} pairs", flush=True)
    for loss in LOSSES[1:]:
        for measure in ("accuracy", "log_loss"):
            over_seeds = mean([row[measure][loss] - row[measure]["bt"] for row in rows])
            print(f"{loss} - bt, {measure} over {len(rows)} seeds: {_shown(over_seeds.to_json())}")
    if options.output:
        with options.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _shown(part: dict[str, Any]) -> str:
    low, high = ("?" if end is None else f"{end:+.4f}" for end in part["interval"])
    return f"{part['value']:+.4f} [{low}, {high}]"


if __name__ == "__main__":
    main()
