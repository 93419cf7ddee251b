"""Benchmarks: this project and TRL 1.16, interleaved, on identical work. `python -m benchmarks` runs them all."""
