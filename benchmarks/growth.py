"""How the cost of an RLOO step grows: K from 2 to 16, prompts from 64 to 2,048 tokens, groups from 1 to 16.

One of the three varies, the others stay at K 4, 256 tokens and 4 groups; prompts are of equal length, completions have
64 tokens. Every row is a comparison like those of `rloo_step`; `phase_seconds_*` and `phase_tokens_*` tell how
sampling, the reference, reward and policy passes and the backward pass grow on both sides.
"""

from benchmarks import harness, rloo_step
from benchmarks.harness import Options, Spec

BASE = {"k": 4, "prompt": 256, "groups": 4, "completion": 64, "equal_prompts": True}
VARIED = {"k": (2, 4, 8, 16), "prompt": (64, 256, 512, 1024, 2048), "groups": (1, 2, 4, 8, 16)}


def rows() -> list[Spec]:
    """All points; the one that the three series share is measured in each of them."""
    return [
        rloo_step.make_row(f"growth-{name}", **BASE | {name: value}, varied=name)
        for name, values in VARIED.items()
        for value in values
    ]


def benchmark(options: Options) -> None:
    """Measure all rows, or with `--quick` one of them at a tiny size."""
    rloo_step.compare(rows(), options)


if __name__ == "__main__":
    harness.main("Growth of an RLOO step, ours against TRL", benchmark)
