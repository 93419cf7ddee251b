"""`helpsteer-rloo demo`: what its command sees to before the pipeline runs."""

import os

import pytest

from helpsteer_rloo import cli
from helpsteer_rloo.commands import demo


@pytest.mark.parametrize(("processors", "asked", "threads"), [(64, None, "2"), (1, None, "1"), (64, "8", "8")])
def test_the_demo_takes_few_threads_of_a_large_machine(processors, asked, threads, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.setenv("OMP_NUM_THREADS", asked or "")
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    seen = []
    monkeypatch.setattr(demo, "run_demo", lambda settings: seen.append(os.environ["OMP_NUM_THREADS"]))
    cli.run_demo([])
    assert seen == [threads]
