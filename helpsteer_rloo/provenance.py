"""What a result was made with: versions of the libraries that matter, and the commit of this project."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("helpsteer-rloo", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


def provenance() -> dict[str, Any]:
    """Python and package versions, and the commit if this is a checkout; `None` for what is not there."""
    return {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}, "commit": _commit()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
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
