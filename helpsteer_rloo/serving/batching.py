"""Requests of many clients gathered into few passes: what waits while one batch is scored is the next one."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from helpsteer_rloo.groups import TokenGroup

Score = Callable[[Sequence[TokenGroup]], list[list[float]]]
"""From groups to one list of scores a group."""


class FullError(Exception):
    """As much waits already as may."""


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
        seen: Called with the number of requests and tokens of every batch.
    """

    def __init__(
        self,
        score: Score,
        executor: Executor,
        *,
        batch_tokens: int,
        queue_tokens: int,
        seen: Callable[[int, int], None] = lambda requests, tokens: None,
    ) -> None:
        self._score, self._executor = score, executor
        self._batch_tokens, self._queue_tokens, self._seen = batch_tokens, queue_tokens, seen
        self._waiting: list[_Waiting] = []
        self._something = asyncio.Event()

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait to be scored."""
        return sum(waiting.tokens for waiting in self._waiting if not waiting.answer.done())

    async def score(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """One list of scores a group.

        Raises:
            FullError: too much waits already.
            Exception: as scoring raised.
        """
        tokens = sum(map(tokens_of, groups))
        if self._waiting and self.waiting_tokens + tokens > self._queue_tokens:
            raise FullError
        waiting = _Waiting(list(groups), tokens, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._something.set()
        return await waiting.answer

    async def run(self) -> None:
        """Score what comes, until cancelled."""
        while True:
            await self._something.wait()
            batch = self._next()
            if batch:
                self._seen(len(batch), sum(waiting.tokens for waiting in batch))
                await self._answer(batch)

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
            if len(batch) > 1:
                for waiting in batch:
                    await self._answer([waiting])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for waiting in batch:
            own, scores = scores[: len(waiting.groups)], scores[len(waiting.groups) :]
            if not waiting.answer.done():
                waiting.answer.set_result(own)

    async def _scored(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        loop = asyncio.get_running_loop()
        joined, places = join_prompts(groups)
        scores = await loop.run_in_executor(self._executor, partial(self._score, joined))
        return [[scores[group][place] for place in own] for group, own in places]


def tokens_of(group: TokenGroup) -> int:
    """Tokens of a prompt and all of its continuations."""
    return len(group.prompt_ids) + sum(map(len, group.continuation_ids))


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
