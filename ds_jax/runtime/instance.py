"""One instance on its devices: weights, KV pool, decode state, and the host's account of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np

from ds_jax import protocol
from ds_jax.protocol import Role, Step
from ds_jax.runtime import handover, host_memory, marks, mixed, programs, sampling
from ds_jax.runtime.handover import Cut, Route
from ds_jax.runtime.host_memory import HostMemory
from ds_jax.runtime.pool import Pool
from ds_jax.runtime.programs import Chunk, Edits, Model, Program
from ds_jax.runtime.sequence import Sequence as TokenSequence
from ds_jax.runtime.shapes import SMALLEST_COPY_PAGES, Shapes, bucket_for, step_tokens
from models.transformer import Params


class Scored(NamedTuple):
    """Where log-probabilities of a sequence's prompt will lie."""

    sequence: int
    first: int
    """Position in the prompt of the first token."""
    rows: slice
    top: int


class Result(NamedTuple):
    """What one program is about to produce."""

    tokens: jax.Array
    rows: list[tuple[int, int]]
    """(sequence, row of `tokens`)."""
    logprobs: jax.Array | None = None
    """Of the tokens; None if nobody asks."""
    tops: Mapping[int, int] = {}
    """Sequence -> how many of the likeliest tokens it wants, of those that ask for log-probabilities."""
    prompt_logprobs: jax.Array | None = None
    scored: Sequence[Scored] = ()

    def arrays(self) -> list[jax.Array]:
        """All that somebody wants to read."""
        return [array for array in (self.tokens, self.logprobs, self.prompt_logprobs) if array is not None]


class Resident(NamedTuple):
    """Who is in a decode slot, and by which of its page tables."""

    sequence: int
    table: list[int]
    plain: bool
    """Whether it asks for no more than a temperature."""


class Instance:
    """Carries out steps and both ends of copies. Used from the dispatch thread only; nothing here waits for a device.

    Args:
        id: the instance's number.
        role: what it is for.
        model: how it runs the model.
        shapes: what its programs are compiled for.
    """

    def __init__(self, id: int, role: Role, model: Model, shapes: Shapes):
        self.id, self.role, self.model, self.shapes = id, role, model, shapes
        self.epoch = 0
        self.params: Params = {}
        self.pool: Pool = {}
        self.state: jax.Array | None = None
        self.host = HostMemory(model, shapes.host_pages)
        self._marks: dict[str, jax.Array] = {}
        """What biases and penalties look at (`runtime.marks`): of the rows of a prefill step, of the slots."""
        self._marked_rows = {"rows": shapes.rows, "slots": shapes.slots}
        self.tables: dict[int, list[int]] = {}
        """Page table of every sequence that has pages here."""
        self._resident: dict[int, Resident] = {}
        self._unfinished: set[int] = set()
        """Sequences of which a series of copies has not ended."""
        self._programs: dict[Any, Program] = {}

    # --- start-up -----------------------------------------------------------------------------------------------------

    def compilations(self, sends: set[Cut], receives: set[Cut]) -> Iterator[partial[None]]:
        """Jobs that compile all programs of this instance, one program each."""
        shapes = self.shapes
        yield partial(self._build, "fresh pool", programs.fresh_pool)
        variants = (False, True) if self.model.plain else (False,)
        for size, plain in product(shapes.token_buckets, variants):
            yield partial(self._build, ("prefill", size, plain), programs.prefill, size, plain)
            if shapes.mixes:
                yield partial(self._build, ("mixed", size, plain), mixed.mixed, size, plain)
        if shapes.slots:
            yield partial(self._build, "fresh state", programs.fresh_state)
            for size, plain in product(shapes.slot_buckets, variants):
                yield partial(self._build, ("decode", size, plain), programs.decode, size, plain)
        for kind, rows in self._marked_rows.items():
            if rows:
                yield partial(self._build, ("fresh marks", kind), programs.fresh_marks, rows)
                for size in marks.buckets(self.model.arch.vocab_size):
                    yield partial(self._build, ("mark", kind, size), programs.mark, rows, size)
        for size in shapes.edit_buckets:
            yield partial(self._build, ("edit", size), programs.edit, size)
        if shapes.slots and shapes.rows:
            yield partial(self._build, "duplicate", handover.duplicate, SMALLEST_COPY_PAGES)
        for size in shapes.host_buckets:
            yield partial(self._build, ("read", size), host_memory.read_pages, size)
            yield partial(self._build, ("write", size), host_memory.write_pages, size)
        for size in shapes.page_buckets:
            for cut in sends:
                yield partial(self._build, ("gather", cut, size), handover.gather, cut, size)
            for cut in receives:
                yield partial(self._build, ("insert", cut, size), handover.insert, cut, size)

    def _build(self, key: Any, builder: Callable[..., Program], *sizes: Any) -> None:
        self._programs[key] = builder(self.model, self.shapes, *sizes)

    def begin_life(self) -> None:
        """Fresh memory: an empty pool, empty slots, no sequence known."""
        self.end_life()
        self.pool = self._programs["fresh pool"]()
        if self.shapes.slots:
            self.state = self._programs["fresh state"]()
        for kind, rows in self._marked_rows.items():
            if rows:
                self._marks[kind] = self._programs["fresh marks", kind]()

    def end_life(self) -> None:
        """Let go of all memory but the weights."""
        self.pool, self.state, self._marks = {}, None, {}
        self.host.clear()
        self.tables.clear()
        self._resident.clear()
        self._unfinished.clear()

    # --- steps --------------------------------------------------------------------------------------------------------

    def run(self, step: Step, sequences: Mapping[int, TokenSequence]) -> list[Result]:
        """Dispatch a step.

        Raises:
            ValueError, KeyError: the step asks for what this instance cannot do.
        """
        if self.shapes.mixes and step.prefills and step.decodes:
            return [self._run_both(step.prefills, step.decodes, sequences)]
        results = []
        if step.prefills:
            results.append(self._run_prefills(step.prefills, sequences))
        if step.decodes:
            results.append(self._run_decodes(step.decodes, sequences))
        return results

    def _run_prefills(self, prefills: Sequence[protocol.Prefill], sequences: Mapping[int, TokenSequence]) -> Result:
        bucket, packed, scored = self._packed(prefills, sequences)
        program = self._programs["prefill", bucket, self._plain_prompts(prefills, sequences, scored)]
        self.pool, *results = program(self.params, self.pool, packed, self._marks["rows"])
        return self._result(results, _sampled(prefills), sequences, scored)

    def _run_decodes(self, decodes: Sequence[protocol.Decode], sequences: Mapping[int, TokenSequence]) -> Result:
        self._edit_slots(decodes, sequences)
        batch = bucket_for(1 + max(slot for _, slot, _ in decodes), self.shapes.slot_buckets, "slots in use")
        self.pool, self.state, self._marks["slots"], *results = self._programs["decode", batch, self._plain_slots()](
            self.params, self.pool, self.state, self._marks["slots"]
        )
        return self._result(results, [(sequence, slot) for sequence, slot, _ in decodes], sequences)

    def _run_both(
        self,
        prefills: Sequence[protocol.Prefill],
        decodes: Sequence[protocol.Decode],
        sequences: Mapping[int, TokenSequence],
    ) -> Result:
        bucket, packed, scored = self._packed(prefills, sequences)
        self._edit_slots(decodes, sequences)
        plain = self._plain_prompts(prefills, sequences, scored) and self._plain_slots()
        self.pool, self.state, self._marks["slots"], *results = self._programs["mixed", bucket, plain](
            self.params, self.pool, packed, self._marks["rows"], self.state, self._marks["slots"]
        )
        rows = _sampled(prefills) + [(sequence, self.shapes.rows + slot) for sequence, slot, _ in decodes]
        return self._result(results, rows, sequences, scored)

    def _packed(
        self, prefills: Sequence[protocol.Prefill], sequences: Mapping[int, TokenSequence]
    ) -> tuple[int, np.ndarray, list[Scored]]:
        """Token bucket and array of the chunks; their page tables and marks are brought up to date."""
        chunks: list[Chunk] = []
        scored: list[Scored] = []
        table: list[int] = []
        begin = 0
        for row, (sequence, start, length, samples, new_pages) in enumerate(prefills):
            if start == 0:
                table = self.tables[sequence] = list(new_pages)
            elif length:
                table = self.tables[sequence]
                table.extend(new_pages)
            else:  # A fork has no tokens: its row samples from the last token before it; its pages are the leader's.
                self.tables[sequence] = list(table)
            chunk = Chunk(sequences[sequence], start, length, samples, table)
            chunks.append(chunk)
            if places := chunk.sequence.unscored(start, start + length):
                rows = slice(begin + places.start - start, begin + places.stop - start)
                scored.append(Scored(sequence, places.start + 1, rows, chunk.sequence.sampling.prompt_logprobs or 0))
            if samples:
                self._mark("rows", row, chunk.sequence)
            begin += length
        return *programs.pack_prefill(self.shapes, chunks), scored

    def _edit_slots(self, decodes: Sequence[protocol.Decode], sequences: Mapping[int, TokenSequence]) -> None:
        """Tell the devices who is in which slot with which pages, as far as they do not know."""
        edits, before = Edits(self.shapes), self._resident
        self._resident = {}
        for sequence, slot, new_pages in decodes:
            table = self.tables[sequence]
            known = before.pop(slot, None)
            if known is not None and known.table is table:
                self._resident[slot] = known
                if new_pages:
                    edits.grow(slot, len(table), new_pages)
                    table.extend(new_pages)
            else:
                table.extend(new_pages)
                joins = sequences[sequence]
                self._resident[slot] = Resident(sequence, table, self._is_plain(joins))
                edits.join(slot, joins, table)
                self._mark("slots", slot, joins)
        for slot in before:
            edits.leave(slot)
        if (packed := edits.pack()) is not None:
            self.state = self._programs["edit", packed[0]](self.state, packed[1])

    def _is_plain(self, sequence: TokenSequence) -> bool:
        return self.model.plain and sampling.is_plain(sequence.sampling, self.model.arch.vocab_size)

    def _plain_slots(self) -> bool:
        """Whether a plain program serves those in the slots."""
        return self.model.plain and all(resident.plain for resident in self._resident.values())

    def _plain_prompts(
        self,
        prefills: Sequence[protocol.Prefill],
        sequences: Mapping[int, TokenSequence],
        scored: Sequence[Scored],
    ) -> bool:
        """Whether a plain program serves these chunks: what a chunk that samples nothing asks of its tokens is of no
        account yet."""
        sampling_ones = (sequences[prefill.sequence] for prefill in prefills if prefill.samples)
        return self.model.plain and not scored and all(map(self._is_plain, sampling_ones))

    def _mark(self, kind: str, row: int, sequence: TokenSequence) -> None:
        """Write the marks of a sequence that asks for a bias or a penalty."""
        if marks.asked_by(sequence.sampling):
            bucket, packed = marks.pack(sequence, row, self.model.arch.vocab_size)
            self._marks[kind] = self._programs["mark", kind, bucket](self._marks[kind], packed)

    @staticmethod
    def _result(
        results: Sequence[jax.Array],
        rows: list[tuple[int, int]],
        sequences: Mapping[int, TokenSequence],
        scored: Sequence[Scored] = (),
    ) -> Result:
        """What is to be read of a program's results (tokens, log-probabilities of them and of prompts):
        log-probabilities only where somebody asks."""
        tokens, logprobs = results[:2]
        asked = {sequence: sequences[sequence].sampling.logprobs for sequence, _ in rows}
        tops = {sequence: top for sequence, top in asked.items() if top is not None}
        return Result(tokens, rows, logprobs if tops else None, tops, results[2] if scored else None, scored)

    def forget(self, sequence: int) -> None:
        """The sequence will not be named again."""
        self.tables.pop(sequence, None)
        self._unfinished.discard(sequence)

    # --- copies -------------------------------------------------------------------------------------------------------

    def send(self, route: Route, pages: Sequence[int]) -> list[jax.Array]:
        """Start these pages on their way; returns the pieces that will land at the other end."""
        bucket = bucket_for(len(pages), self.shapes.page_buckets, "pages in one copy")
        return route.send(self._programs["gather", route.cut, bucket](self.pool, handover.pad(pages, bucket, 0)))

    def receive(self, route: Route, copy: protocol.Copy, pieces: list[jax.Array]) -> None:
        """Put landed pieces into their pages, and the pages into the sequence's table."""
        pages = [there for _, there in copy.pages]
        bucket = bucket_for(len(pages), self.shapes.page_buckets, "pages in one copy")
        padded = handover.pad(pages, bucket, self.shapes.pages)
        self.pool = self._programs["insert", route.cut, bucket](self.pool, padded, route.assemble(pieces))
        self._adopt(copy, pages)

    def duplicate(self, copy: protocol.Copy) -> None:
        """Carry out a copy from this pool to this pool: a sequence gets pages of its own beside shared ones."""
        for first in range(0, len(copy.pages), SMALLEST_COPY_PAGES):
            sources, destinations = zip(*copy.pages[first : first + SMALLEST_COPY_PAGES], strict=True)
            here = handover.pad(sources, SMALLEST_COPY_PAGES, 0)
            there = handover.pad(destinations, SMALLEST_COPY_PAGES, self.shapes.pages)
            self.pool = self._programs["duplicate"](self.pool, here, there)
        self._adopt(copy, [there for _, there in copy.pages])

    def read(self, pages: Sequence[int]) -> list[jax.Array]:
        """These pages of the pool, each an array that `HostMemory` takes."""
        most, found = self.shapes.host_buckets[-1], []
        for first in range(0, len(pages), most):
            some = pages[first : first + most]
            bucket = bucket_for(len(some), self.shapes.host_buckets, "pages at a time")
            found += self._programs["read", bucket](self.pool, handover.pad(some, bucket, 0))[: len(some)]
        return found

    def restore(self, copy: protocol.Copy, arrays: Sequence[jax.Array]) -> None:
        """Put pages that came from host memory into the pool, and into the sequence's table."""
        pages = [there for _, there in copy.pages]
        most = self.shapes.host_buckets[-1]
        for first in range(0, len(pages), most):
            some = pages[first : first + most]
            bucket = bucket_for(len(some), self.shapes.host_buckets, "pages at a time")
            taken = (*arrays[first : first + len(some)], *[arrays[0]] * (bucket - len(some)))
            numbers = handover.pad(some, bucket, self.shapes.pages)
            self.pool = self._programs["write", bucket](self.pool, numbers, taken)
        self._adopt(copy, pages)

    def _adopt(self, copy: protocol.Copy, pages: Sequence[int]) -> None:
        """A copy's pages are the sequence's, here."""
        sequence = copy.sequence
        if sequence in self._unfinished:
            self.tables[sequence].extend(pages)
        else:
            self.tables[sequence] = [*copy.shared, *pages]
        (self._unfinished.discard if copy.last else self._unfinished.add)(sequence)

    def delete(self) -> None:
        """Free all device memory at once. Nothing may be in flight."""
        for leaf in jax.tree.leaves((self.params, self.pool, self.state, self._marks)):
            leaf.delete()
        self.params = {}
        self.end_life()


def takes_long(compilation: partial[None]) -> bool:
    """Whether a job of `Instance.compilations` is about a program that holds the whole model."""
    return compilation.args[1] in (programs.prefill, programs.decode, mixed.mixed)


def describe(instance: Instance, group: Any) -> protocol.Instance:
    """The instance as schedulers see it."""
    shapes = instance.shapes
    return protocol.Instance(
        id=instance.id,
        role=instance.role,
        epoch=instance.epoch,
        pages=shapes.pages,
        page_size=shapes.page_size,
        slots=shapes.slots,
        max_step_tokens=step_tokens(group, shapes.token_buckets),
        max_step_sequences=shapes.rows,
        saturation_tokens=getattr(group, "saturation_tokens", 0),
        host_pages=shapes.host_pages,
    )


def _sampled(prefills: Iterable[protocol.Prefill]) -> list[tuple[int, int]]:
    """(sequence, row) of those that sample."""
    return [(prefill.sequence, row) for row, prefill in enumerate(prefills) if prefill.samples]
