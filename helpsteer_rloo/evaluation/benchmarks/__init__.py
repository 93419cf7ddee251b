"""Offline benchmarks of reward models, read from local files in their published formats."""
