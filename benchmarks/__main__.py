"""All benchmarks, one after the other: `python -m benchmarks --output results.jsonl`, or `make bench`."""

from benchmarks import demo_engines, growth, harness, precision, qwen3_8b, reward_training, rloo_step, vocabulary
from benchmarks.harness import Options

ALL = (reward_training, rloo_step, vocabulary, growth, qwen3_8b, precision, demo_engines)


def benchmark(options: Options) -> None:
    """Run every benchmark with the same options."""
    for module in ALL:
        harness.say(f"{module.__name__}:")
        module.benchmark(options)


if __name__ == "__main__":
    harness.main("All benchmarks", benchmark)
