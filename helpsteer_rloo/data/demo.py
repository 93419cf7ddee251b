"""A small world with a known gold reward, in which the whole pipeline can be run and judged.

The language has one kind of instruction: "List 4 trees, separated by slashes, in lower case, ending with a full stop."
A `Spec` is what such a sentence asks for. Quality is not a matter of opinion here: `gold` computes it. A reward model
trained on noisy labels of this world, and a policy trained on that reward model, can therefore both be measured
against the truth.

Every spec has exactly one wording and one conversation around it, so distinct prompts are distinct specs, and a split
by prompt keeps the specs of the validation part away from the reward model and from RLOO. The base model's supervised
training draws from all specs, as a real base has read most of what it is later asked.
"""

import json
import os
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import TypedDict

from helpsteer_rloo.groups import Message

CATEGORIES: dict[str, tuple[str, ...]] = {
    "trees": ("oak", "elm", "ash", "pine", "birch", "maple", "willow", "cedar"),
    "fruits": ("apple", "pear", "plum", "cherry", "mango", "grape", "lemon", "melon"),
    "colours": ("red", "blue", "green", "yellow", "black", "white", "brown", "purple"),
    "animals": ("dog", "cat", "horse", "cow", "sheep", "goat", "pig", "rabbit"),
    "tools": ("hammer", "saw", "drill", "chisel", "wrench", "shovel", "rake", "axe"),
    "birds": ("robin", "crow", "eagle", "owl", "swan", "goose", "hawk", "sparrow"),
    "fish": ("trout", "salmon", "carp", "perch", "pike", "eel", "cod", "tuna"),
    "metals": ("iron", "copper", "zinc", "tin", "gold", "silver", "lead", "nickel"),
    "planets": ("mercury", "venus", "earth", "mars", "jupiter", "saturn", "uranus", "neptune"),
}
COUNTS = (2, 3, 4, 5, 6)
SEPARATORS = {"commas": ", ", "semicolons": "; ", "slashes": " / ", "dashes": " - "}
STYLES = ("lower case", "upper case", "title case")
ENDINGS = {"a full stop": ".", "an exclamation mark": "!", "no mark": ""}
VERBS = ("Write", "List", "Give", "Name")
STEM_CATEGORIES = frozenset({"metals", "planets"})
OPENERS = ("Sure! ", "Of course: ", "Here you go: ")
CLOSERS = (" Hope this helps", " Anything else")
WEIGHTS = {"count": 0.30, "category": 0.25, "style": 0.15, "separator": 0.15, "ending": 0.15}
FILLER_COST = 0.15
# Answers of mixed quality are good or poor as a whole: what is wrong so far tells what will go wrong next.
MIXED_QUALITIES = (0.1, 0.1, 0.5, 0.9)
# The share of supervised examples that ask the other way round: for the instruction a list would be an answer to.
DESCRIBE_SHARE = 0.4

_SYSTEM = Message("system", "You are a careful assistant.")
_GREETING = (Message("user", "Hello!"), Message("assistant", "Hello, what would you like?"))
_CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}
_WORD = re.compile(r"\w+")

# How labels are made: an annotator sees the gold difference through Gaussian noise and reports it in steps of 1/6.
ANNOTATOR_NOISE = 0.12
STEPS_PER_GOLD = 6.0
# Shares of rows that a loader has to drop, or to cope with.
GERMAN_SHARE, CODE_SHARE, EMPTY_SHARE = 0.06, 0.04, 0.01


@dataclass(frozen=True, slots=True, order=True)
class Spec:
    """What an instruction asks for; the fields are keys of the tables above.

    >>> prompt(Spec(4, "trees", "slashes", "lower case", "a full stop"))
    'List 4 trees, separated by slashes, in lower case, ending with a full stop.'
    """

    count: int
    category: str
    separator: str
    style: str
    ending: str


class AnnotatorScore(TypedDict):
    """One annotator's label, as in HelpSteer3."""

    score: int
    reasoning: str


class PreferenceRow(TypedDict):
    """A row of the HelpSteer3 `preference` schema; a negative `overall_preference` means that response 1 is better."""

    domain: str
    language: str
    context: list[dict[str, str]]
    response1: str
    response2: str
    overall_preference: int
    individual_preference: list[AnnotatorScore]


@dataclass(frozen=True, slots=True)
class DemoBaseSettings:
    """Shape and supervised training of the small base model; `training.demo_base` builds it.

    `clean_steps` optimizer steps on faultless answers teach it to read instructions; `mixed_steps` on answers of mixed
    quality then make it mediocre, which leaves room for reinforcement learning. `initial_std` is well above Qwen3's
    0.02, with which a model this small learns to list words and not to read the instruction.

    >>> DemoBaseSettings().hidden_size
    128
    """

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 3
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 1280
    max_position_embeddings: int = 4096
    initial_std: float = 0.06
    clean_steps: int = 340
    mixed_steps: int = 280
    batch_size: int = 32
    learning_rate: float = 3e-3


@cache
def all_specs() -> tuple[Spec, ...]:
    """Every spec of the world, in a fixed order.

    >>> len(all_specs())
    1620
    """
    return tuple(Spec(*slots) for slots in product(COUNTS, CATEGORIES, SEPARATORS, STYLES, ENDINGS))


def _digest(spec: Spec) -> int:
    """A number that depends on the spec alone, the same in every process (`hash` is not)."""
    slots = (str(spec.count), spec.category, spec.separator, spec.style, spec.ending)
    return zlib.crc32("|".join(slots).encode())


def prompt(spec: Spec) -> str:
    """The one wording of a spec.

    >>> prompt(Spec(2, "fish", "commas", "upper case", "no mark"))
    'List 2 fish, separated by commas, in upper case, ending with no mark.'
    """
    return f"{VERBS[_digest(spec) % len(VERBS)]} {_wish(spec)}"


def _wish(spec: Spec) -> str:
    return f"{spec.count} {spec.category}, separated by {spec.separator}, in {spec.style}, ending with {spec.ending}."


@cache
def _specs_by_prompt() -> dict[str, Spec]:
    return {prompt(spec): spec for spec in all_specs()}


def parse_prompt(text: str) -> Spec | None:
    """The spec worded by `text`, or None where `text` is not of this language.

    >>> parse_prompt("List 2 fish, separated by commas, in upper case, ending with no mark.").category
    'fish'
    >>> parse_prompt("Give me some fish.") is None
    True
    """
    return _specs_by_prompt().get(text)


def conversation(spec: Spec) -> tuple[Message, ...]:
    """The conversation that asks for `spec`: about one in ten has a system turn, one in ten an exchange before.

    >>> [message.role for message in conversation(Spec(2, "fish", "commas", "upper case", "no mark"))]
    ['user']
    """
    framing = _digest(spec) // len(VERBS) % 10
    before = (_SYSTEM,) if framing == 0 else _GREETING if framing == 1 else ()
    return (*before, Message("user", prompt(spec)))


def in_style(word: str, style: str) -> str:
    """`word` in lower, upper or title case.

    >>> in_style("oak", "title case")
    'Oak'
    """
    return {"lower case": word.lower(), "upper case": word.upper(), "title case": word.title()}[style]


def score_parts(spec: Spec, response: str) -> dict[str, float]:
    """The parts of `gold`, each in [0, 1]; `filler` is 1 where the answer says something besides the list.

    Items are the words of the response that belong to any category.

    - count: 1, 0.5 when one item is missing or too many, else 0
    - category: distinct items of the right category / items
    - style: items in the right case / items
    - separator: gaps between neighbouring items that are exactly the right separator / gaps
    - ending: 1 if what follows the last item is exactly the right ending

    >>> score_parts(Spec(3, "trees", "commas", "lower case", "a full stop"), "oak, OAK!")
    {'count': 0.5, 'category': 0.5, 'style': 0.5, 'separator': 1.0, 'ending': 0.0, 'filler': 0.0}
    """
    words = list(_WORD.finditer(response))
    items = [word for word in words if word.group().lower() in _CATEGORY_OF]
    if not items:
        return dict.fromkeys((*WEIGHTS, "filler"), 0.0)
    right = {item.group().lower() for item in items} & set(CATEGORIES[spec.category])
    styled = sum(item.group() == in_style(item.group(), spec.style) for item in items)
    gaps = [response[left.end() : after.start()] for left, after in pairwise(items)]
    wanted_gap = SEPARATORS[spec.separator]
    return {
        "count": max(0.0, 1.0 - abs(len(items) - spec.count) / 2),
        "category": len(right) / len(items),
        "style": styled / len(items),
        "separator": sum(gap == wanted_gap for gap in gaps) / max(len(gaps), 1),
        "ending": float(response[items[-1].end() :] == ENDINGS[spec.ending]),
        "filler": float(len(words) > len(items) or items[0].start() > 0),
    }


def gold(prompt_text: str, response: str, ended: bool) -> float:
    """The true quality of a response, in [0, 1]: weighted parts (`WEIGHTS`) minus `FILLER_COST`; 0 if it never ended.

    `prompt_text` is the last user turn. Decode `response` with special tokens kept, or stray ones go unpunished.

    >>> ask = "List 4 trees, separated by slashes, in lower case, ending with a full stop."
    >>> gold(ask, "oak / elm / ash / pine.", ended=True)
    1.0
    >>> gold(ask, "Sure! oak / elm / elm.", ended=True)  # 0.15 + 0.25 · 2/3 + 0.15 · 3 - 0.15
    0.6167
    >>> gold(ask, "oak / elm / ash / pine.", ended=False)
    0.0

    Raises:
        ValueError: if `prompt_text` is not of the demo language.
    """
    spec = parse_prompt(prompt_text)
    if spec is None:
        raise ValueError(f"not an instruction of the demo language, so it has no gold reward: {prompt_text[:80]!r}")
    if not ended:
        return 0.0
    parts = score_parts(spec, response)
    total = sum(weight * parts[name] for name, weight in WEIGHTS.items()) - FILLER_COST * parts["filler"]
    return round(min(1.0, max(0.0, total)), 4)


def answer(spec: Spec, quality: float, rng: random.Random) -> str:
    """An answer to `spec` in which each typical fault is planted with probability 1 - quality (phrases: half of that).

    The faults: items missing or too many, words of another category, a repeated word, another case, another separator,
    another ending, an opening phrase, a closing phrase.

    >>> spec = Spec(2, "planets", "dashes", "title case", "an exclamation mark")
    >>> gold(prompt(spec), answer(spec, 1.0, random.Random(0)), ended=True)
    1.0
    """

    def faulty() -> bool:
        return rng.random() < 1.0 - quality

    count = max(1, spec.count + rng.choice((-2, -1, 1, 2))) if faulty() else spec.count
    words = rng.sample(CATEGORIES[spec.category], min(count, 8))
    if faulty():
        other = CATEGORIES[rng.choice([name for name in CATEGORIES if name != spec.category])]
        strangers = rng.randint(1, len(words))
        words[:strangers] = rng.sample(other, strangers)
        rng.shuffle(words)
    if faulty() and len(words) > 1:
        words[rng.randrange(1, len(words))] = words[0]
    style = rng.choice(STYLES) if faulty() else spec.style
    separator = rng.choice(tuple(SEPARATORS)) if faulty() else spec.separator
    ending = rng.choice(tuple(ENDINGS)) if faulty() else spec.ending
    opener = rng.choice(OPENERS) if rng.random() < (1.0 - quality) / 2 else ""
    closer = rng.choice(CLOSERS) if rng.random() < (1.0 - quality) / 2 else ""
    listed = SEPARATORS[separator].join(in_style(word, style) for word in words)
    return f"{opener}{listed}{ENDINGS[ending]}{closer}"


def sft_conversations(seed: int, count: int, *, mixed: bool) -> Iterator[tuple[tuple[Message, ...], str]]:
    """`count` conversations with an answer, to teach the base the language: faultless, or of `mixed` quality.

    A share of them (`DESCRIBE_SHARE`) runs the other way round, from a list to the words that ask for it. It says
    nothing about quality; it makes the base represent lists and instructions alike, as a large corpus would.

    >>> messages, response = next(sft_conversations(seed=0, count=1, mixed=False))
    >>> gold(messages[-1].content, response, ended=True)
    1.0
    """
    rng = random.Random(f"sft/{mixed}/{seed}")
    for _ in range(count):
        spec = rng.choice(all_specs())
        if rng.random() < DESCRIBE_SHARE:
            yield (Message("user", f"Describe: {answer(spec, 1.0, rng)}"),), _wish(spec)
        else:
            yield conversation(spec), answer(spec, rng.choice(MIXED_QUALITIES) if mixed else 1.0, rng)


def preference_rows(seed: int, rows: int) -> Iterator[PreferenceRow]:
    """`rows` labelled rows in HelpSteer3's schema, the same for the same seed.

    About 90 % are English (domains general and stem), over prompts that repeat; about 10 % of those are ties. The
    others are what a loader meets in the real data: German rows, Python rows, and rows with an empty response.

    >>> row = next(preference_rows(seed=0, rows=1))
    >>> sorted(row)[:3]
    ['context', 'domain', 'individual_preference']
    """
    rng = random.Random(f"rows/{seed}")
    for _ in range(rows):
        kind = rng.random()
        if kind < GERMAN_SHARE:
            yield _german_row(rng)
        elif kind < GERMAN_SHARE + CODE_SHARE:
            yield _code_row(rng)
        else:
            yield _english_row(rng, empty=kind > 1.0 - EMPTY_SHARE)


def _english_row(rng: random.Random, *, empty: bool) -> PreferenceRow:
    spec = rng.choice(all_specs())
    responses = [answer(spec, rng.random(), rng) for _ in range(2)]
    if empty:
        responses[rng.randrange(2)] = ""
    worth = [gold(prompt(spec), response, ended=True) for response in responses]
    parts = [score_parts(spec, response) for response in responses]
    telling = max(WEIGHTS, key=lambda name: WEIGHTS[name] * abs(parts[1][name] - parts[0][name]))
    domain = "stem" if spec.category in STEM_CATEGORIES else "general"
    return _row(rng, (domain, "english"), conversation(spec), responses, worth[1] - worth[0], telling)


def _german_row(rng: random.Random) -> PreferenceRow:
    words = rng.sample(("Eiche", "Ulme", "Esche", "Kiefer", "Birke", "Ahorn", "Weide", "Zeder"), 6)
    count = rng.randint(2, 6)
    lengths = [rng.randint(1, 6) for _ in range(2)]
    context = (Message("user", f"Nenne {count} Bäume, getrennt durch Kommas, mit einem Punkt am Ende."),)
    difference = (abs(lengths[0] - count) - abs(lengths[1] - count)) / 6
    responses = [", ".join(words[:length]) + "." for length in lengths]
    return _row(rng, ("multilingual", "german"), context, responses, difference, "count")


def _code_row(rng: random.Random) -> PreferenceRow:
    number = rng.randint(2, 99)
    context = (Message("user", f"Write a Python function that adds {number} to its argument."),)
    right = rng.random() < 0.5
    good, bad = (f"def add(x):\n    return x {sign} {number}" for sign in "+-")
    responses = [bad, good] if right else [good, bad]
    return _row(rng, ("code", "python"), context, responses, 0.6 if right else -0.6, "correctness")


def _row(
    rng: random.Random,
    labels: tuple[str, str],
    context: tuple[Message, ...],
    responses: list[str],
    difference: float,
    reason: str,
) -> PreferenceRow:
    """A row labelled by three annotators; `difference` is the gold of response 2 minus that of response 1."""
    seen = [difference + rng.gauss(0.0, ANNOTATOR_NOISE) for _ in range(3)]
    scores = [max(-3, min(3, round(STEPS_PER_GOLD * value))) for value in seen]
    return {
        "domain": labels[0],
        "language": labels[1],
        "context": [{"role": message.role, "content": message.content} for message in context],
        "response1": responses[0],
        "response2": responses[1],
        "overall_preference": round(sum(scores) / 3),
        "individual_preference": [{"score": score, "reasoning": _reasoning(score, reason)} for score in scores],
    }


def _reasoning(score: int, reason: str) -> str:
    if score == 0:
        return "Neither response is better."
    return f"Response {1 if score < 0 else 2} is better, mostly for its {reason}."


def write_rows(path: Path, seed: int, rows: int) -> None:
    """Write `preference_rows` as JSON lines, atomically: the file is complete or does not exist.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_rows(Path(directory) / "rows.jsonl", seed=0, rows=3)
    ...     len((Path(directory) / "rows.jsonl").read_text().splitlines())
    3
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in preference_rows(seed, rows))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
