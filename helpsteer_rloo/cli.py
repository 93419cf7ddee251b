"""The `helpsteer-rloo` command, and the functions behind the three scripts. Parsing comes before heavy imports."""

import atexit
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from helpsteer_rloo import __version__
from helpsteer_rloo.preemption import STOPPED, Stopped
from helpsteer_rloo.processes import process_count
from helpsteer_rloo.settings.knobs import EngineKnobs

INTERRUPTED = 130
DEMO_THREADS = 2
"""Most threads of the demo, unless OMP_NUM_THREADS asks for others."""

_NOISE = (
    ".*pin_memory.*no accelerator is found",
    ".*gradient_checkpointing.*is deprecated",
)
"""Warnings of libraries about their own or each other's defaults, which no user of this command can act on."""

_OUT_OF_MEMORY = (
    "The device is out of memory. Give the same command with --use_peft, smaller batches (with more accumulation the "
    "result stays the same), or a smaller --max_length or --response_length; finished stages are not run again."
)

COMMANDS = {
    "pipeline": "data, reward model, verification, RLOO, evaluation: everything in one resumable run",
    "reward-model": "train and verify a reward model (reward_model_training.py)",
    "rloo": "train a policy against a reward model (rloo_helpsteer_training.py)",
    "demo": "the whole pipeline offline, in a small world with a known gold quality",
    "evaluate": "a reward model, or scores from elsewhere, on JudgeBench, RM-Bench, RewardBench 2 or your own pairs",
    "plan": "what a run will need in memory and time, and the largest settings that fit",
    "score": "the responses of a file, by a reward model",
    "chat": "with a trained policy, beside the untrained one, each answer scored",
    "best-of": "the best of N answers to each prompt of a file, by a reward model",
    "serve": "a reward model behind HTTP, in the formats of OpenRLHF, vLLM and its own",
    "export": "a trained model as transformers and vLLM load it, and on the hub",
    "report": "a run, or several side by side, as one page that opens anywhere",
    "data": "read, select and split a data set, and print what became of every row",
}


def main() -> None:
    """Entry point of `helpsteer-rloo`."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] == "--version":
        print(f"helpsteer-rloo {__version__}")
    elif not arguments or arguments[0] in ("-h", "--help"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `helpsteer-rloo --help | head` ends quietly
        print(_usage())
    elif arguments[0] in COMMANDS:
        _DISPATCH[arguments[0]](arguments[1:])
    else:
        from helpsteer_rloo.settings.flags import unknown_name

        sys.exit(f"helpsteer-rloo: {unknown_name(arguments[0], COMMANDS, 'command')}\n\n{_usage()}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: helpsteer-rloo COMMAND [FLAGS]", "", "From HelpSteer3 preferences to an aligned Qwen3 policy.", "",
         "commands:", *lines, "", "helpsteer-rloo COMMAND --help lists a command's flags."]
    )  # fmt: skip


def train_reward_model(argv: list[str] | None = None) -> None:
    """`reward_model_training.py`."""
    from helpsteer_rloo.settings.checks import check_packages, check_reward
    from helpsteer_rloo.settings.config import REWARD
    from helpsteer_rloo.settings.parsing import parse_command

    settings = parse_command(REWARD, argv, checks=[check_reward, check_packages])

    def work() -> None:
        with _shown(settings.own, settings.trl):
            from helpsteer_rloo.pipeline import run_reward_model

            run_reward_model(settings)

    guarded(work)


def train_policy(argv: list[str] | None = None) -> None:
    """`rloo_helpsteer_training.py`."""
    from helpsteer_rloo.settings.checks import check_packages, check_rloo
    from helpsteer_rloo.settings.config import RLOO
    from helpsteer_rloo.settings.parsing import parse_command

    settings = parse_command(RLOO, argv, checks=[check_rloo, check_packages])

    def work() -> None:
        with _shown(settings.own, settings.trl):
            from helpsteer_rloo.pipeline import run_rloo

            run_rloo(settings)

    guarded(work)


def run_pipeline(argv: list[str] | None = None) -> None:
    """`train_pipeline.py`."""
    from helpsteer_rloo.settings.parsing import parse_pipeline

    settings = parse_pipeline(argv)

    def work() -> None:
        with _shown(settings.own, settings.reward.trl, settings.rloo.trl):
            from helpsteer_rloo import pipeline

            pipeline.run_pipeline(settings)

    guarded(work)


def run_demo(argv: list[str] | None = None) -> None:
    """`helpsteer-rloo demo`."""
    from helpsteer_rloo.commands.demo import parse_demo

    settings = parse_demo(argv)
    # Its model has no use for more, which would spend their time waiting for each other; and as many threads everywhere
    # add in one order everywhere.
    os.environ.setdefault("OMP_NUM_THREADS", str(min(DEMO_THREADS, os.cpu_count() or 1)))

    def work() -> None:
        run = settings.pipeline
        with _shown(run.own, run.reward.trl, run.rloo.trl):
            from helpsteer_rloo.commands import demo

            demo.run_demo(settings)

    guarded(work)


def show_data(argv: list[str] | None = None) -> None:
    """`helpsteer-rloo data`."""
    from helpsteer_rloo.commands.data import parse_data, run_data

    settings = parse_data(argv)
    guarded(lambda: _in_view(lambda: run_data(settings)), outlives_readers=False)


def evaluate(argv: list[str] | None = None) -> None:
    """`helpsteer-rloo evaluate`."""
    from helpsteer_rloo.commands.evaluate import parse_evaluate, run_evaluate

    settings = parse_evaluate(argv)
    guarded(lambda: _in_view(lambda: run_evaluate(settings)))


def plan(argv: list[str] | None = None) -> None:
    """`helpsteer-rloo plan`."""
    from helpsteer_rloo.commands.plan import parse_plan, run_plan

    settings = parse_plan(argv)
    guarded(lambda: run_plan(settings), outlives_readers=False)


def score(argv: list[str] | None = None) -> None:
    """`helpsteer-rloo score`."""
    from helpsteer_rloo.commands.score import parse_score, run_score

    settings = parse_score(argv)
    guarded(lambda: _in_view(lambda: run_score(settings), otherwise="plain"))


def chat(argv: list[str] | None = None) -> None:
    """`helpsteer-rloo chat`."""
    from helpsteer_rloo.commands.chat import parse_chat, run_chat

    settings = parse_chat(argv)
    guarded(lambda: run_chat(settings), outlives_readers=False)


def best_of(argv: list[str] | None = None) -> None:
    """`helpsteer-rloo best-of`."""
    from helpsteer_rloo.commands.best_of import parse_best_of, run_best_of

    settings = parse_best_of(argv)
    guarded(lambda: _in_view(lambda: run_best_of(settings), otherwise="plain"))


def serve(argv: list[str] | None = None) -> None:
    """`helpsteer-rloo serve`."""
    from helpsteer_rloo.commands.serve import parse_serve, run_serve

    settings = parse_serve(argv)
    guarded(lambda: run_serve(settings))


def export(argv: list[str] | None = None) -> None:
    """`helpsteer-rloo export`."""
    from helpsteer_rloo.commands.export import parse_export, run_export

    settings = parse_export(argv)
    guarded(lambda: run_export(settings))


def report(argv: list[str] | None = None) -> None:
    """`helpsteer-rloo report`."""
    from helpsteer_rloo.commands.report import parse_report, run_report

    settings = parse_report(argv)
    guarded(lambda: run_report(settings))


_DISPATCH: dict[str, Callable[[list[str]], None]] = {
    "pipeline": run_pipeline,
    "reward-model": train_reward_model,
    "rloo": train_policy,
    "demo": run_demo,
    "evaluate": evaluate,
    "plan": plan,
    "score": score,
    "chat": chat,
    "best-of": best_of,
    "serve": serve,
    "export": export,
    "report": report,
    "data": show_data,
}


def _shown(own: EngineKnobs, *trainings: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Within, a run is shown as its flags say, TRL's `--disable_tqdm` of one of its trainings among them."""
    from helpsteer_rloo.display.live import shown

    bars = not any(flags.get("disable_tqdm") for flags in trainings)
    return shown(own.progress, own.progress_seconds, bars=bars)


def _in_view(work: Callable[[], None], otherwise: str = "none") -> None:
    """Do what has no such flags, with a live block in a terminal; elsewhere what takes long may be shown by lines."""
    from helpsteer_rloo.display.live import shown

    with shown("auto", otherwise=otherwise):
        work()


def guarded(work: Callable[[], None], *, outlives_readers: bool = True) -> None:
    """Run a command; a mistake of the user's ends it with a message instead of a traceback.

    The traceback is printed too when HELPSTEER_RLOO_DEBUG is set.

    Args:
        work: The command.
        outlives_readers: Whether it goes on, silently, when nobody reads any more what it prints. What is run for that
            alone ends there.
    """
    from helpsteer_rloo.display.streams import draw_no_bars, ended_by_readers, open_closed_streams, outlive_readers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads of a CPU build wait for each other by spinning; beside any other busy process that made training of a tiny
    # model seven times slower (two threads on two shared cores). Measured, in ms a step, on an idle machine and beside
    # one busy process: 1000 spins 87 and 109, 3000 70 and 142, 30000 62 and 450.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's CPU allocator: activations in huge pages
    open_closed_streams()
    if outlives_readers:
        outlive_readers()
    if not sys.stderr.isatty():
        draw_no_bars()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding has no sign for is spelled out
            stream.reconfigure(errors="backslashreplace")
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    _end(_status_of(work if outlives_readers else ended_by_readers()(work)))


def _status_of(work: Callable[[], None]) -> int:
    """Run a command and return its exit status, its mistakes explained."""
    try:
        work()
    except Stopped as stopped:
        print(f"\n{stopped} Give the same command again to go on.", file=sys.stderr)
        return STOPPED
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        # The latter two: a flag of TRL's that needs a package which is not here, or that TRL refuses beside another.
        if os.environ.get("HELPSTEER_RLOO_DEBUG"):
            traceback.print_exc()
        return _failed(f"{type(error).__name__ + ': ' if isinstance(error, OSError) else ''}{error}", 1)
    except RuntimeError as error:
        # torch's, known by name, so that torch is not imported here; on a CPU it has no class of its own for that
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):
            raise
        return _failed(f"{error}\n{_OUT_OF_MEMORY}", 1)
    except KeyboardInterrupt:
        return _failed("Interrupted. Give the same command again to go on.", INTERRUPTED)
    return 0


def _failed(message: str, status: int) -> int:
    print(f"\nerror: {message}", file=sys.stderr)
    return status


def _end(status: int) -> None:
    """End a command; in a group of processes at once, since gloo's threads may abort one whose interpreter winds up."""
    if process_count() > 1 and "torch" in sys.modules:
        atexit._run_exitfuncs()  # those of trackers  # pyright: ignore[reportPrivateUsage]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
