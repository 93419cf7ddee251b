"""Where the files of a run lie, and how they are written: atomically, with the completion marker last."""

import fcntl
import gzip
import hashlib
import json
import os
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

REWARD_MODEL_RECORD = "reward_model.json"
"""In a reward model's directory: what it was trained on and how it scores. Its presence marks a finished model."""

HELDOUT_PROMPTS = "heldout_prompts.txt"
"""In a reward model's directory: keys of the prompts it was verified on, one a line; no policy may train on them."""

POLICY_RECORD = "policy.json"
"""In a policy's directory: how it was trained. Its presence marks a finished policy."""


METRICS = "metrics.jsonl"
"""In the directory that a training writes to: what it logged, one JSON line a time, for as long as it goes on."""

WATCH = "watch"
"""In a policy's directory: the measurements along its training, a file a step."""

_ATTEMPTS = 4
"""To take a lock; those who only look at it hold it for less than the time between two."""
_MEND = "delete it and run the command again."

STAGE_MARKER = "stage.json"
"""In a directory that a stage owns: which execution of which stage made its content."""

_OTHER_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True, slots=True)
class RunDir:
    """The record of one run.

    >>> RunDir(Path("runs/demo")).stage("data").as_posix()
    'runs/demo/stages/data.json'
    """

    root: Path

    def stage(self, name: str) -> Path:
        """Completion marker of a stage: its inputs, outputs and seconds."""
        return self.root / "stages" / f"{name}.json"

    def stage_started(self, name: str) -> Path:
        """Inputs of a stage that has begun; tells a restart whether what is half done can be gone on with."""
        return self.root / "stages" / f"{name}.started.json"

    @property
    def lock(self) -> Path:
        """Held by the process that works on the run."""
        return self.root / ".lock"

    @property
    def heartbeat(self) -> Path:
        """Touched by that process for as long as it lives, where others wait for it."""
        return self.root / ".heartbeat"

    @property
    def data_report(self) -> Path:
        """Counts of the data, by split, domain, strength and reason."""
        return self.root / "data.json"

    @property
    def samples(self) -> Path:
        """Held-out prompts with the answers of the untrained and the trained policy, one JSON line a prompt."""
        return self.root / "samples.jsonl"

    def pairs(self, of: str) -> Path:
        """Held-out pairs with the scores of a reward model (named as its stage is), one JSON line a pair."""
        return self.root / ("pairs.jsonl" if of == "reward_model" else f"pairs-{of}.jsonl")

    @property
    def summary(self) -> Path:
        """All results of the run."""
        return self.root / "summary.json"

    @property
    def start(self) -> Path:
        """What the run was started with: the command, its settings, the versions of the libraries."""
        return self.root / "run.json"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.root / "report.html"

    @property
    def report_lock(self) -> Path:
        """Held by the process that writes it."""
        return self.root / ".report.lock"


def reward_stage_name(number: int) -> str:
    """The stage that trains the reward model of this number in an ensemble, from 1."""
    return "reward_model" if number == 1 else f"reward_model_{number}"


def verification_name(of: str) -> str:
    """The stage that verifies what another one trained."""
    return "verification" if of == "reward_model" else f"{of}_verification"


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: after a crash there is the old content or the new, never a part.

    Raises:
        OSError: the directory cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode("utf-8"))


def require_writable(path: Path, flag: str) -> None:
    """Say before any work that a file cannot be written where a flag says.

    Raises:
        ValueError: it is no place for a file, or not to be written to.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {path}: no file can be written there ({error}); give another name.") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically, as `write_text` does; the directory must exist. A device or pipe is written to as it is.

    Where the path is a symbolic link, the file that it leads to is replaced.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, indented, keys in the given order; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def require_file(path: Path, *, pipe: bool = False) -> None:
    """Refuse what is no file: to read a pipe or a device may never begin, or never end.

    Args:
        path: What is there.
        pipe: A pipe will do as well, which is what a shell makes of `<(zcat …)`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is something else.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or (pipe and stat.S_ISFIFO(mode)):
        return
    kind = next((name for is_kind, name in _OTHER_KINDS if is_kind(mode)), "no file")
    raise ValueError(f"{path} is {kind}, where a file is expected; move it away.")


def open_file(path: Path, *, pipe: bool = False) -> BufferedReader:
    """Open a file to be read, if it is one (see `require_file`, also for what it raises)."""
    require_file(path, pipe=pipe)
    return path.open("rb")


def read_text(path: Path, *, pipe: bool = False) -> str:
    """The text of a file in UTF-8.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is no file (see `require_file`), or not UTF-8.
    """
    with open_file(path, pipe=pipe) as file:
        return file.read().decode("utf-8")


def read_json(path: Path, advice: str = _MEND, *, pipe: bool = False) -> dict[str, Any] | None:
    """Read a JSON object; `None` if there is no such file. `advice` says what to do about one that is damaged.

    Raises:
        ValueError: it is no file (see `require_file`), or not a JSON object.
    """
    try:
        text = read_text(path, pipe=pipe)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); {advice}") from None
    except FileNotFoundError:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object; {advice}")
    return content


def read_record(path: Path, kinds: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any] | None:
    """Read a JSON object that has at least these keys with values of these types; `None` if there is no such file.

    Raises:
        ValueError: the file is not a JSON object, or one of its keys is missing or holds something else.
    """
    record = read_json(path)
    for name, kind in kinds.items() if record is not None else ():
        if not isinstance(cast(dict[str, Any], record).get(name), kind):
            raise ValueError(f"{path} is damaged: its {name!r} is missing or of another type; {_MEND}")
    return record


def step_file(directory: Path, step: int) -> Path:
    """Where the rows of an optimizer step are."""
    return directory / f"step-{step:06d}.jsonl.gz"


def read_steps(directory: Path) -> dict[int, list[dict[str, Any]]]:
    """The rows of all files `step-<optimizer step>.jsonl.gz` of a directory, in the order of the steps.

    Raises:
        ValueError: one is no file, or damaged.
    """
    return {int(path.name[5:11]): _read_step(path) for path in sorted(directory.glob("step-*.jsonl.gz"))}


def _read_step(path: Path) -> list[dict[str, Any]]:
    with open_file(path) as packed:
        try:
            with gzip.open(packed, "rt", encoding="utf-8", errors="surrogatepass") as file:
                return [json.loads(line) for line in file]
        except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}).") from None


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines; NaN and infinity are refused."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The JSON objects of a file of JSON lines, none if there is no file, and what is wrong with the first bad line.

    Nothing is read behind that one; the last line of a file that is being written may be such.
    """
    rows: list[dict[str, Any]] = []
    try:
        text = read_text(path)
    except FileNotFoundError:
        return rows, None
    except UnicodeDecodeError as error:
        return rows, f"{path} is not UTF-8 ({error})"
    except (ValueError, OSError) as error:
        return rows, str(error)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return rows, f"{path}, line {number}: {error}"
        if not isinstance(row, dict):
            return rows, f"{path}, line {number}: expected a JSON object"
        rows.append(cast(dict[str, Any], row))
    return rows, None


def fingerprint(content: object) -> str:
    """A short digest of a JSON-like value; equal values have equal digests whatever the order of their keys.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def set_aside(path: Path) -> Path:
    """Move a directory that is about to be replaced to `<name>.previous`, or the next free number; return that."""
    candidates = (
        path.with_name(f"{path.name}.previous{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 10_000)))
    )
    previous = next(candidate for candidate in candidates if not candidate.exists())
    path.rename(previous)
    return previous


@contextmanager
def locked(path: Path, what: Path) -> Generator[None]:
    """Hold a lock file for as long as the context lasts, so that no second process works on the same thing.

    Args:
        path: The lock file.
        what: The directory that it stands for.

    Raises:
        ValueError: another process holds it, or it is no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        require_file(path)
    with path.open("a+", encoding="utf-8") as file:
        if not _taken(file):
            file.seek(0)
            raise ValueError(
                f"Another process ({file.read().strip() or 'unknown'}) is working on {what}; wait for its end, or give "
                "another --output_dir."
            )
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        yield


def _taken(file: IO[str]) -> bool:
    """Take a lock, also if `is_locked` is just looking at it."""
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 < _ATTEMPTS:
                time.sleep(0.05)
    return False


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file.

    Raises:
        ValueError: it is no file.
    """
    try:
        with open_file(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
