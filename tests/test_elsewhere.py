"""Training on a device that is not the CPU: nothing is left behind, and the results are those of the CPU."""

import os
import re
import subprocess
import sys

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device from Python",
)
FILES = ("test_pairs", "test_rloo_packed", "test_exact_resume", "test_watch", "test_bad_steps")
SOME = (
    "test_tensors or test_trainers or test_passes or three_steps_equal_trls_in_float64[changes0] or evaluation_equals "
    "or (test_training_equals_trls and (num_iterations or (lora and checkpointing))) "
    "or (rloo_goes_on_exactly and k3) or goes_back_to_its_best_step[True]"
)
SOME_COUNT = 10


def run_elsewhere(files, chosen):
    """Run tests in a process of their own; how many passed, if none failed."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.elsewhere", "-q", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, "-m", "not slow", *(f"tests/{file}.py" for file in files)],
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.findall(r"(\d+) passed", done.stdout)[-1])


def test_trainings_run_there():
    assert run_elsewhere(["on_elsewhere", *(f"training/{name}" for name in FILES)], SOME) == SOME_COUNT


# Plain references of the tests' own are computed on the CPU.
@pytest.mark.slow
@pytest.mark.parametrize("file", [*(f"training/{name}" for name in FILES), "test_pipeline"])
def test_all_of_them_run_there(file):
    assert run_elsewhere([file], "not plain") > 1
