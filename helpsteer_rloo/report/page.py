"""The page: one HTML file that needs nothing else, and runs no script but its own."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from helpsteer_rloo.report.figure import Figure
from helpsteer_rloo.report.figures import data_figures, reward_figures, reward_models_of
from helpsteer_rloo.report.policy_figures import policies_of, policy_figures
from helpsteer_rloo.report.records import Finding, Run, Sample, Side
from helpsteer_rloo.report.verdict import facts, settings, verdict

RELOAD_SECONDS = 60
"""Between two looks of an open page at a run that goes on."""
_TIED = "\u00a0"
_MINUS = re.compile(r"(?<![\w./-])-(?=\d)")
_PERCENT = re.compile(r"(?<=\d) ?%")
_OF_A_PIECE = re.compile(r"\[[^\[\]a-zA-Z]{1,40}\]|\bn = \d")
_PARTS = re.compile(r"(?<=[/_])")
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with figures."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    findings: tuple[tuple[str, tuple[Finding, ...]], ...] = ()


def render(runs: Sequence[Run]) -> str:
    """The page of a run, or of several side by side.

    A text that came from a file can only ever be text in it: the template escapes, samples are data that the script
    puts into text nodes, and the page's policy lets no script run but the one with the digest of its own.
    """
    style, script = _packaged("report.css"), _packaged("samples.js")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"typeset": typeset, "breakable": breakable}
    template = environment.from_string(_packaged("page.html.jinja"))
    text = template.render(
        title=" and ".join(run.name for run in runs),
        runs=runs,
        state="running" if any(run.state == "running" for run in runs) else "ended",
        reload_seconds=RELOAD_SECONDS,
        policy=_policy(style, script),
        style=style,
        script=script,
        verdicts=[verdict(run) for run in runs],
        facts=facts(runs),
        settings=settings(runs),
        sections=_sections(runs),
        samples=embedded(_sample_sets(runs)),
    )
    return text.encode("utf-8", "replace").decode("utf-8")


def typeset(text: str) -> str:
    r"""A sentence with its numbers as they are printed in books, and no line ending within one of them.

    >>> typeset("by -0.5 [-0.7, -0.3] in 84.5% of the pairs, n = 12")
    'by −0.5 [−0.7,\xa0−0.3] in 84.5\xa0% of the pairs, n\xa0=\xa012'
    """
    spaced = _PERCENT.sub(f"{_TIED}%", _MINUS.sub("−", text))
    return _OF_A_PIECE.sub(lambda found: found[0].replace(" ", _TIED), spaced)


def breakable(text: str) -> Markup:
    """A path or a name, which may go on in the next line behind each of its parts."""
    return Markup("<wbr>").join(_PARTS.split(text))


def _packaged(name: str) -> str:
    return files("helpsteer_rloo.report").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """The Content-Security-Policy: nothing is loaded, and only this style and this script are in force."""
    return (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _sections(runs: Sequence[Run]) -> list[Section]:
    models = reward_models_of(runs)
    findings = tuple((name, m.judged.findings) for name, m in models if m.judged and m.judged.findings)
    sections = [
        Section("data", "Data", tuple(data_figures(runs))),
        Section("reward-model", "Reward model", tuple(reward_figures(models)), findings),
        Section("policy", "Policy", tuple(policy_figures(policies_of(runs)))),
    ]
    return [section for section in sections if section.figures or section.findings]


def embedded(value: Any) -> str:
    r"""A value as JSON that can stand in a script element of an HTML page, whatever its texts hold.

    >>> embedded({"a": "</script>"})
    '{"a":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _sample_sets(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The samples of all runs as the script takes them: sets of pairs of responses."""
    found: list[dict[str, Any]] = []
    for number, run in enumerate(runs, start=1):
        prefix = f"{number}-" if len(runs) > 1 else ""
        title = f"{run.name}: " if len(runs) > 1 else ""
        answers = run.policy.answers if run.policy else ()
        pairs = run.reward_models[0].pairs if run.reward_models else ()
        for name, what, sides, samples in (
            ("answers", "answers before and after training", ("before", "after"), answers),
            ("pairs", "held-out pairs, rejected and chosen", ("rejected", "chosen"), pairs),
        ):
            if samples:
                listed = [_sample(sample) for sample in samples]
                found.append({"id": prefix + name, "title": title + what, "sides": sides, "samples": listed})
    return found


def _sample(sample: Sample) -> dict[str, Any]:
    return {
        "n": sample.number,
        "domain": sample.domain,
        "label": sample.label,
        "prompt": [[turn.role, turn.content] for turn in sample.prompt],
        "sides": [_side(sample.first), _side(sample.second)],
    }


def _side(side: Side) -> dict[str, Any]:
    return {
        "text": side.text,
        "note": side.note,
        "scores": {name: round(value, 4) for name, value in side.scores.items()},
    }
