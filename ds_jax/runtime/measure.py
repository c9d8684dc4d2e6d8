"""Times steps and copies on an executor's devices, commanded as an engine commands them: two steps in flight, so that
what is measured is how often a step ends, not how long its way through queues and threads is."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ds_jax import protocol
from ds_jax.protocol import Copy, Decode, Medium, Place, Prefill, Role, Step, pages_for
from ds_jax.runtime.executor import InProcessExecutor, Scores
from ds_jax.runtime.sequence import Sequence as TokenSequence
from ds_jax.sampling import SamplingParams

IN_FLIGHT = 2
ENOUGH_S = 0.25
"""A piece of work is repeated until this much time has been spent on it, or MOST times."""
LEAST, MOST = 3, 12
PATIENCE_S = 300
"""No step takes longer."""


@dataclass(frozen=True)
class Work:
    """What one step does."""

    chunks: tuple[tuple[int, int], ...] = ()
    """(start, length) of each prompt chunk."""
    contexts: tuple[int, ...] = ()
    """Tokens that each decode attends to, its own included."""

    def fits(self, instance: protocol.Instance, longest: int) -> bool:
        """Whether the instance can do this work: its pool, its slots and its step sizes are large enough, and no
        sequence would be longer than `longest` tokens."""
        lengths = [length for _, length in self.chunks]
        tokens = [start + length for start, length in self.chunks] + [c + MOST + 1 for c in self.contexts]
        return (
            sum(lengths) <= instance.max_step_tokens
            and len(lengths) <= instance.max_step_sequences
            and len(self.contexts) <= instance.slots
            and sum(pages_for(one, instance.page_size) for one in tokens) <= instance.pages
            and max(tokens) <= longest
        )


class Stopwatch:
    """Commands an executor that nobody else uses, and waits for the answers. It hands out pages anew for every piece of
    work, since what is in them does not matter."""

    def __init__(self, executor: InProcessExecutor):
        self.executor = executor
        self.instances = {instance.id: instance for instance in executor.instances}
        self._calls: queue.SimpleQueue[tuple[int, Callable[..., None], tuple[Any, ...]]] = queue.SimpleQueue()
        self._heard_ns = 0
        self._steps: dict[int, int] = {}
        self._copies: dict[int, int] = {}
        self._next = 0
        executor.start(self)

    # --- the sink -----------------------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        self._calls.put((time.perf_counter_ns(), callback, args))

    def step_done(self, step_id: int, tokens: dict[int, int], scores: Scores) -> None:
        self._steps[step_id] = self._heard_ns

    def copy_done(self, copy_id: int, ok: bool) -> None:
        if not ok:
            raise RuntimeError(f"copy {copy_id} failed")
        self._copies[copy_id] = self._heard_ns

    def instance_lost(self, instance: int, epoch: int, why: str) -> None:
        raise RuntimeError(f"instance {instance} was lost while it was measured: {why}")

    def instance_up(self, instance: protocol.Instance) -> None:
        raise AssertionError("an instance that is lost ends the measurement")

    def instance_gone(self, instance: int, why: str) -> None:
        raise RuntimeError(why)

    def _wait(self, done: dict[int, int], id: int) -> int:
        """When this step or copy was done."""
        while id not in done:
            self._heard_ns, callback, args = self._calls.get(timeout=PATIENCE_S)
            callback(*args)
        return done.pop(id)

    # --- steps --------------------------------------------------------------------------------------------------------

    def step_s(self, instance: int, work: Work) -> float:
        """Median seconds between the ends of steps that do this work, one after the other."""
        of, sequences = self.instances[instance], dict[int, TokenSequence]()
        page = 0

        def add(tokens: int, room: int) -> tuple[int, tuple[int, ...]]:
            nonlocal page
            id, first = len(sequences), page
            sequences[id] = TokenSequence(id, [1 + i % 7 for i in range(tokens)], SamplingParams(), seed=id)
            page += pages_for(room, of.page_size)
            return id, tuple(range(first, page))

        chunks = [(*add(start + length, start + length), start, length) for start, length in work.chunks]
        middle = MOST // 2  # contexts grow by one with every step: they are as asked in the middle
        decodes = [add(max(context - middle, 1), context + MOST + 1) for context in work.contexts]
        for number, pages in decodes + [(id, pages) for id, pages, start, _ in chunks if start]:
            self._wait(self._steps, self._run(instance, sequences, (Prefill(number, 0, 1, False, pages),)))

        prefills = tuple(Prefill(id, start, n, True, () if start else pages) for id, pages, start, n in chunks)
        slots = tuple(Decode(id, slot) for slot, (id, _) in enumerate(decodes))
        begun = time.perf_counter()
        flying: list[int] = []
        ends: list[int] = []
        while len(ends) < 1 + LEAST or (len(ends) < MOST and time.perf_counter() - begun < ENOUGH_S):
            while len(flying) < IN_FLIGHT:
                flying.append(self._run(instance, sequences, prefills, slots))
            ends.append(self._wait(self._steps, flying.pop(0)))
        for step in flying:
            self._wait(self._steps, step)
        for id in sequences:
            self.executor.forget(id)
        # The first began on an idle device, and its slots were filled: only the others tell.
        return median(later - earlier for earlier, later in zip(ends, ends[1:], strict=False)) / 1e9

    def _run(
        self,
        instance: int,
        sequences: dict[int, TokenSequence],
        prefills: tuple[Prefill, ...] = (),
        decodes: tuple[Decode, ...] = (),
    ) -> int:
        self._next += 1
        self.executor.run(Step(self._next, instance, self.instances[instance].epoch, 0, prefills, decodes), sequences)
        return self._next

    # --- copies -------------------------------------------------------------------------------------------------------

    def copy_s(self, source: Place, destination: Place, pages: int) -> float:
        """Median seconds from the command of a copy of so many pages until it has landed."""
        pairs = tuple((number, number) for number in range(pages))
        begun = time.perf_counter()
        found: list[float] = []
        while len(found) < LEAST or (len(found) < MOST and time.perf_counter() - begun < ENOUGH_S):
            self._next += 1
            start_ns = time.perf_counter_ns()
            self.executor.copy(Copy(self._next, 0, source, destination, pairs))
            found.append((self._wait(self._copies, self._next) - start_ns) / 1e9)
        self.executor.forget(0)
        return median(found)


# --- what is worth measuring ------------------------------------------------------------------------------------------


def _powers(last: int, first: int = 1) -> list[int]:
    sizes = [min(first, last)]
    while sizes[-1] * 2 < last:
        sizes.append(sizes[-1] * 2)
    return [*sizes, last] if last > sizes[-1] else sizes


def prefill_grid(most_tokens: int, most_sequences: int, longest: int) -> list[Work]:
    """Prompts alone, several together, and chunks with tokens before them."""
    lengths = [1, *_powers(min(most_tokens, longest), 8)]
    alone = [Work(((0, length),)) for length in lengths]
    together = [
        Work(((0, length),) * count)
        for length in lengths[::2]
        for count in _powers(most_sequences, 2)
        if length * count <= most_tokens
    ]
    chunks = [
        Work(((start, length),))
        for length in lengths[::2]
        for start in _powers(longest, 64)[::2]
        if start + length <= longest
    ]
    return spread(alone) + spread(together) + spread(chunks)


def decode_grid(slots: int, longest: int) -> list[Work]:
    """Batches of all sizes over short, middling and long contexts."""
    contexts = _powers(longest - MOST - 1, 8)[::2]
    return spread([Work(contexts=(context,) * batch) for batch in _powers(slots) for context in contexts])


def mixed_grid(most_tokens: int, slots: int, longest: int) -> list[Work]:
    """A chunk beside a batch."""
    return spread(
        [
            Work(((0, length),), (context,) * batch)
            for length in _powers(min(most_tokens, longest), 16)[::2]
            for batch in _powers(slots)[1::2]
            for context in _powers(longest - MOST - 1, 64)[::2]
        ]
    )


def spread[T](items: Sequence[T]) -> list[T]:
    """The items in an order of which any beginning covers the whole range: ends, middle, quarters, …"""
    order: dict[int, None] = dict.fromkeys((0, len(items) - 1)) if items else {}
    parts = 2
    while len(order) < len(items):
        order |= dict.fromkeys(round(part * (len(items) - 1) / parts) for part in range(1, parts))
        parts *= 2
    return [items[index] for index in order]


def routes(instances: Sequence[protocol.Instance]) -> dict[str, tuple[Place, Place]]:
    """Copies that can be measured: between two instances, and between the first that decodes and its host."""
    first = next(instance for instance in instances if instance.role is not Role.PREFILL)
    here = Place(first.id, first.epoch)
    found = {}
    for other in instances:
        if other.id != first.id:
            found["device"] = here, Place(other.id, other.epoch)
    if first.host_pages:
        host = here._replace(medium=Medium.HOST)
        found |= {"to host": (here, host), "from host": (host, here)}
    return found
