"""Requests of many clients gathered into few passes: what waits while one batch is scored is the next one."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.packing import token_count

Score = Callable[[Sequence[TokenGroup]], list[list[float]]]
"""From groups to one list of scores a group."""


class FullError(Exception):
    """As much waits already as may."""


class ScoringError(Exception):
    """Scoring failed."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    groups: list[TokenGroup]
    tokens: int
    answer: "asyncio.Future[list[list[float]]]"


class Batcher:
    """Scores groups of several requests together, in the order they came.

    A batch takes what waits, up to `batch_tokens` (a larger request stands alone); nothing is waited for, since others
    come in while it is scored. Groups on one prompt become one group, whoever sent them, so that the prompt is computed
    once. If a batch fails, its requests are scored one by one, so that each has its own scores or its own error. What
    nobody waits for any more is left out.

    Args:
        score: Blocks; it is called in `executor`, never twice at a time.
        executor: Of one thread.
        batch_tokens: Most tokens of a batch.
        queue_tokens: Most tokens that may wait, those being scored not counted.
        cost: Tokens that scoring a group takes.
        seen: Called with the number of requests and tokens of every batch.
    """

    def __init__(
        self,
        score: Score,
        executor: Executor,
        *,
        batch_tokens: int,
        queue_tokens: int,
        cost: Callable[[TokenGroup], int] = token_count,
        seen: Callable[[int, int], None] = lambda requests, tokens: None,
    ) -> None:
        self._score, self._executor, self._cost = score, executor, cost
        self._batch_tokens, self._queue_tokens, self._seen = batch_tokens, queue_tokens, seen
        self._waiting: list[_Waiting] = []
        self._something = asyncio.Event()
        self._ended, self._busy_since = False, 0.0

    def works(self, within: float) -> bool:
        """Whether it answers: it runs, and no batch has taken longer than so many seconds."""
        return not self._ended and (not self._busy_since or time.monotonic() - self._busy_since < within)

    @property
    def is_busy(self) -> bool:
        """Whether a batch is being scored."""
        return bool(self._busy_since)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait to be scored."""
        return sum(waiting.tokens for waiting in self._waiting if not waiting.answer.done())

    async def score(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """One list of scores a group.

        Raises:
            FullError: too much waits already.
            ScoringError: scoring failed.
        """
        tokens, waits = sum(map(self._cost, groups)), self.waiting_tokens
        if waits and waits + tokens > self._queue_tokens:
            raise FullError
        waiting = _Waiting(list(groups), tokens, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._something.set()
        return await waiting.answer

    async def run(self) -> None:
        """Score what comes, until cancelled."""
        try:
            while True:
                await self._something.wait()
                batch = self._next()
                if batch:
                    self._seen(len(batch), sum(waiting.tokens for waiting in batch))
                    await self._answer(batch)
        finally:
            self._ended = True

    def _next(self) -> list[_Waiting]:
        """Take the next batch out of what waits."""
        alive = [waiting for waiting in self._waiting if not waiting.answer.done()]
        batch, tokens = alive[:1], sum(waiting.tokens for waiting in alive[:1])
        for waiting in alive[1:]:
            tokens += waiting.tokens
            if tokens > self._batch_tokens:
                break
            batch.append(waiting)
        self._waiting = alive[len(batch) :]
        if not self._waiting:
            self._something.clear()
        return batch

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        try:
            scores = await self._scored([group for waiting in batch for group in waiting.groups])
        except Exception as error:  # noqa: BLE001 - whatever it is goes to whom it belongs
            alive = [waiting for waiting in batch if not waiting.answer.done()]
            if len(batch) > 1:
                for waiting in alive:
                    await self._answer([waiting])
            elif alive:
                alive[0].answer.set_exception(ScoringError(f"{type(error).__name__}: {error}"))
            return
        for waiting in batch:
            own, scores = scores[: len(waiting.groups)], scores[len(waiting.groups) :]
            if not waiting.answer.done():
                waiting.answer.set_result(own)

    async def _scored(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        loop = asyncio.get_running_loop()
        joined, places = join_prompts(groups)
        self._busy_since = time.monotonic()
        try:
            scores = await loop.run_in_executor(self._executor, partial(self._score, joined))
        finally:
            self._busy_since = 0.0
        return [[scores[group][place] for place in own] for group, own in places]


def join_prompts(groups: Sequence[TokenGroup]) -> tuple[list[TokenGroup], list[tuple[int, range]]]:
    """One group a prompt, and where the continuations of each given group are: number of its group, and places in it.

    >>> groups = [TokenGroup((), (1,), ((2,),)), TokenGroup((), (3,), ((4,),)), TokenGroup((), (1,), ((5,), (6,)))]
    >>> joined, places = join_prompts(groups)
    >>> [group.continuation_ids for group in joined], places
    ([((2,), (5,), (6,)), ((4,),)], [(0, range(0, 1)), (1, range(0, 1)), (0, range(1, 3))])
    """
    continuations: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    numbers: dict[tuple[int, ...], int] = {}
    places: list[tuple[int, range]] = []
    for group in groups:
        own = continuations.setdefault(group.prompt_ids, [])
        number = numbers.setdefault(group.prompt_ids, len(numbers))
        places.append((number, range(len(own), len(own) + len(group.continuation_ids))))
        own += group.continuation_ids
    return [TokenGroup((), prompt, tuple(own)) for prompt, own in continuations.items()], places


@contextlib.asynccontextmanager
async def running(task: Awaitable[None]):  # noqa: ANN201 - contextlib's type
    """Let a task run for as long as the context lasts."""
    started = asyncio.ensure_future(task)
    try:
        yield
    finally:
        started.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await started
