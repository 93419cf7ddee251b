"""The small world that the documents' commands are run in, and how they are run there.

Names of the documents lead to small things of the same kind, so that commands are run as they are written: the hub's
data set and model are directories of these names, the finished models are those of a demo of seconds.
"""

import contextlib
import io
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import yaml

from helpsteer_rloo import cli
from helpsteer_rloo.data.demo import write_rows
from tests.data.rows import make_row, write_jsonl
from tests.docs.commands import SCRIPTS, TOOLS, Command
from tests.docs.pages import ROOT

DEMO = {
    "name": "demo",
    "output_dir": "runs/demo",
    "seed": 1,
    "validation_fraction": 0.2,
    "max_length": 96,
    "guard": True,
    "allow_weak_reward_model": True,
    "evaluation_prompts": 8,
    "evaluation_batch_size": 32,
    "demo": {
        "rows": 260,
        # the tokenizer is that of `make demo`, so that counts of tokens in the documents are true here
        "base": {
            "hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "key_value_heads": 1, "head_dim": 16,
            "clean_steps": 0, "mixed_steps": 1,
        },
    },
    "reward": {
        "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "num_train_epochs": 1,
        "gradient_checkpointing": False, "disable_tqdm": True,
    },
    "rloo": {
        "use_peft": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "total_episodes": 16,
        "response_length": 8, "gradient_checkpointing": False, "disable_tqdm": True, "watch_steps": 1,
        "watch_prompts": 4, "save_steps": 1,
    },
}  # fmt: skip
"""A demo of seconds."""

_TRAINING = ("--gradient_checkpointing=false", "--disable_tqdm=true")
SMALLER: dict[str, tuple[str, ...]] = {
    "reward-model": ("--max_length=96", "--num_train_epochs=1", "--per_device_train_batch_size=32", *_TRAINING),
    "rloo": ("--max_length=96", "--response_length=8", "--total_episodes=16", *_TRAINING),
    "pipeline": (
        "--max_length=96", "--rloo.response_length=8", "--total_episodes=16", "--reward_epochs=1",
        "--reward_batch_size=32", "--evaluation_prompts=8", "--allow_weak_reward_model",
        *(flag.replace("--", f"--{stage}.") for stage in ("reward", "rloo") for flag in _TRAINING),
    ),
}  # fmt: skip
"""Flags that are added to commands that would take hours; the last of a flag wins."""


@dataclass
class DocsWorld:
    """The directory where commands are run; the server that one of them may have started."""

    root: Path
    server: subprocess.Popen[str] | None = None
    port: int = field(default_factory=lambda: _free_port())

    def run(self, command: Command, smaller: bool = False) -> str:
        """Run a command in the world and return what it printed.

        Raises:
            AssertionError: it ended with another code than 0.
        """
        program = command.simple[0][0]
        if program in TOOLS or command.is_shells:
            return self._shell(command.text)
        words = command.simple[0]
        if words[:2] == ["helpsteer-rloo", "serve"]:
            return self._serve(words)
        if program == "accelerate":
            return self._shell(command.text)
        return self._in_process(words, smaller)

    def _in_process(self, words: Sequence[str], smaller: bool) -> str:
        """By the very entry point of the program, without the seconds that importing torch takes."""
        if words[0] == "helpsteer-rloo":
            argv, start = list(words[1:]), cli.main
        else:
            assert words[0] == "python", words
            argv, start = list(words[2:]), lambda: runpy.run_path(words[1], run_name="__main__")
            argv += SMALLER[SCRIPTS[words[1]]] if smaller else ()
        printed = io.StringIO()
        code: object = 0
        with (
            contextlib.chdir(self.root),
            patch.object(sys, "argv", [words[0], *argv]),
            patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO())),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(io.StringIO()) as errors,
        ):
            try:
                start()
            except SystemExit as ended:
                code = ended.code
        assert code in (0, None), f"{shlex.join(words)} ended with {code}: {errors.getvalue()}"
        return printed.getvalue()

    def _shell(self, text: str) -> str:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", "-c", text.replace("localhost:8000", f"localhost:{self.port}")],
            cwd=self.root, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        return done.stdout

    def _serve(self, words: Sequence[str]) -> str:
        """Start a server and wait until it answers; it runs on for the commands that ask it."""
        self.close()
        program = str(Path(sys.executable).parent / "helpsteer-rloo")
        self.server = subprocess.Popen(
            [program, *words[1:], "--port", str(self.port)], cwd=self.root, stdout=subprocess.PIPE, text=True
        )
        for _ in range(600):
            assert self.server.poll() is None, f"{shlex.join(words)} ended with {self.server.returncode}"
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health")
                return ""
            time.sleep(0.1)
        raise AssertionError(f"{shlex.join(words)} does not answer")

    def close(self) -> None:
        """End the server, if there is one."""
        if self.server is not None:
            self.server.terminate()
            assert self.server.wait(timeout=60) == 0
            assert self.server.stdout is not None
            self.server.stdout.close()
            self.server = None


def make_world(root: Path) -> DocsWorld:
    """Make everything that the documents' commands read."""
    for name in ("configs", "benchmarks", *SCRIPTS):
        (root / name).symlink_to(ROOT / name)
    (root / "demo.yaml").write_text(yaml.safe_dump(DEMO))
    with contextlib.chdir(root), contextlib.redirect_stdout(io.StringIO()):
        cli.run_demo(["--config=demo.yaml"])
    demo = root / "runs" / "demo"
    shutil.copytree(demo, root / "runs" / "demo2")
    for name, source in {
        "models/qwen3_8b_reward_model": "reward_model",
        "models/rloo_helpsteer3": "policy",
        "Qwen/Qwen3-8B": "base",
        "A": "reward_model",
        "B": "guard_model",
        "C": "reward_model",
    }.items():
        shutil.copytree(demo / source, root / name)
    for split, seed in (("train", 2), ("validation", 3)):
        (root / "nvidia" / "HelpSteer3" / "preference").mkdir(parents=True, exist_ok=True)
        write_rows(root / "nvidia" / "HelpSteer3" / "preference" / f"{split}.jsonl", seed, 200)
    write_rows(root / "my_preferences.jsonl", 4, 60)
    write_jsonl(root / "judgebench" / "data" / "pairs.jsonl", [_judged(number) for number in range(6)])
    rows = [{"messages": [{"role": "user", "content": "Name a tree."}], "responses": ["Oak.", "7"]}, make_row()]
    write_jsonl(root / "answers.jsonl", rows)
    write_jsonl(root / "prompts.jsonl", [{"messages": row["messages"]} for row in rows[:1]])
    return DocsWorld(root)


def _judged(number: int) -> dict[str, object]:
    """A pair in JudgeBench's format."""
    texts = {"question": f"Name {number} trees.", "response_A": "oak", "response_B": "7"}
    return {"pair_id": f"p{number}", "source": "mmlu-pro-law", "response_model": "gpt-4o", "label": "A>B", **texts}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
