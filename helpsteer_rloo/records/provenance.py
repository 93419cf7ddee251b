"""What a result was made with: versions of the libraries that matter, and the commit of this project."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from helpsteer_rloo.settings.config import SECRETS

_KEY = re.compile(rf"""(["']?\b(?:{"|".join(SECRETS)})["']?\s*:\s*)[^\s,}}]+""")
"""A token in a mapping that is given as YAML or JSON."""
PACKAGES = ("helpsteer-rloo", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


def provenance() -> dict[str, Any]:
    """Python and package versions, and the commit if this is a checkout; `None` for what is not there."""
    return {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}, "commit": _commit()}


def command_line(argv: Sequence[str]) -> str:
    """A command as it can be given again, from the program's name on, its access tokens left out.

    >>> command_line(["/usr/bin/helpsteer-rloo", "demo", "--seed", "2", "--hub_token=abc"])
    'helpsteer-rloo demo --seed 2 --hub_token=...'
    """
    name = Path(argv[0]).name if argv else ""
    words = ["python", name] if name.endswith(".py") else [name]
    secret = False
    for word in argv[1:]:
        flag, equals, _ = word.partition("=")
        names_one = flag.startswith("--") and flag.lstrip("-").rpartition(".")[2] in SECRETS
        if secret and not word.startswith("--"):
            words.append("...")
        elif names_one and equals:
            words.append(f"{flag}=...")
        else:
            words.append(_KEY.sub(r"\1...", word))
        secret = names_one and not equals
    return shlex.join(words)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
