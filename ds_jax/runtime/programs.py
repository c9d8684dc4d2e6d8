"""The programs of an instance, and the packing of what the host sends them.

All that a program takes from the host in one step lies in one int32 array (floats by their bits), since every array
more costs a transfer per device. What the layout is, `Prefill` and `DecodeState` say, once for host and device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import kernels.kv_write
import kernels.paged_decode_attention
import kernels.paged_prefill_attention
from ds_jax.architecture import Architecture
from ds_jax.runtime import logprobs, marks, sampling
from ds_jax.runtime.compilation import compile_ahead
from ds_jax.runtime.pool import Pool, abstract_pool
from ds_jax.runtime.sequence import Sequence as TokenSequence
from ds_jax.runtime.shapes import Shapes, bucket_for
from kernels.backends import Backend
from models.sharding import POOL_AXES, TENSOR, spec_of
from models.transformer import Params, Transformer, partition_specs

Program = Callable[..., Any]
EVERYWHERE = PartitionSpec()


@dataclass(frozen=True)
class Model:
    """The model as one instance runs it."""

    arch: Architecture
    dtype: Any
    mesh: Mesh
    graphdef: nnx.GraphDef
    params: Params
    """Abstract, with shardings."""
    backend: Backend = "auto"
    """Which form of the kernels is taken."""
    compiler_options: Mapping[str, bool | str] = field(default_factory=dict)
    """XLA's, for the programs that run the model."""
    plain: bool = False
    """Whether steps in which nobody asks for more than a temperature have programs of their own, without a branch."""

    @property
    def axis(self) -> str | None:
        """The mesh axis to sum over; None on a single device."""
        return TENSOR if self.mesh.shape[TENSOR] > 1 else None

    def on_mesh(self, function: Program, in_specs: Any, out_specs: Any) -> Program:
        """`function` run by every device of the mesh on its own shards."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def run(
        self, params: Params, pool: Pool, tokens: Array, positions: Array, slots: Array, attention: Program
    ) -> tuple[Transformer, Float[Array, "T E"], Pool]:
        """Module, hidden states of the tokens, and the pool with their keys and values written to `slots`."""
        model = nnx.merge(self.graphdef, params)
        k, v = list(pool["k"]), list(pool["v"])

        def attend(layer: int, q: Array, keys: Array, values: Array) -> Array:
            k[layer], v[layer] = kernels.kv_write.write(k[layer], v[layer], keys, values, slots)
            return attention(
                q,
                k[layer],
                v[layer],
                scale=self.arch.attention_scale,
                window=self.arch.kind(layer).window,
                soft_cap=self.arch.attention_soft_cap,
                backend=self.backend,
            )

        hidden = model(tokens, positions, attend, self.axis)
        return model, hidden, {"k": tuple(k), "v": tuple(v)}

    def host_array(self, *shape: int) -> jax.ShapeDtypeStruct:
        """An int32 array that comes from the host and lies on every device."""
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.mesh, EVERYWHERE))

    def marks(self, rows: int) -> jax.ShapeDtypeStruct:
        """What biases and penalties of so many rows look at, on every device."""
        return self.host_array(2, rows, self.arch.vocab_size)


# --- prefill ----------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Part of a sequence that a prefill step runs."""

    sequence: TokenSequence
    start: int
    length: int
    samples: bool
    pages: list[int]
    """The sequence's page table, up to this chunk's end at least."""


class Prefill(NamedTuple):
    """What a prefill step takes from the host: T tokens, then R rows of chunks."""

    tokens: Int[Array, " T"]
    positions: Int[Array, " T"]
    slots: Int[Array, " T"]
    """Where keys and values go: page * page size + offset; -1 at padding."""
    following: Int[Array, " T"]
    """The next token of the prompt, where its log-probability is asked for; else -1."""
    starts: Int[Array, " R"]
    lengths: Int[Array, " R"]
    contexts: Int[Array, " R"]
    samples: Int[Array, " R"]
    sampling: Int[Array, "R C"]
    page_table: Int[Array, "R max_pages"]

    @staticmethod
    def words(shapes: Shapes, tokens: int) -> int:
        return 4 * tokens + shapes.rows * (4 + sampling.COLUMNS + shapes.table_pages)

    @staticmethod
    def of(packed: Any, shapes: Shapes, count: int) -> Prefill:
        """The parts of a packed array, of numpy (views, to fill in) or jax."""
        rows = packed[4 * count :].reshape(shapes.rows, -1)
        tokens, positions, slots, following = packed[: 4 * count].reshape(4, count)
        chosen_by, table = rows[:, 4 : 4 + sampling.COLUMNS], rows[:, 4 + sampling.COLUMNS :]
        starts, lengths, contexts, samples = rows[:, :4].T
        return Prefill(tokens, positions, slots, following, starts, lengths, contexts, samples, chosen_by, table)

    def attention(self) -> Program:
        """Attention of the chunks' tokens, for `Model.run`."""
        return partial(
            kernels.paged_prefill_attention.attend,
            page_table=self.page_table,
            starts=self.starts,
            lengths=self.lengths,
            contexts=self.contexts,
        )

    def last(self) -> Int[Array, " R"]:
        """Place among the tokens of each chunk's last one."""
        return jnp.maximum(self.starts + self.lengths - 1, 0)


def pack_prefill(shapes: Shapes, chunks: Sequence[Chunk]) -> tuple[int, np.ndarray]:
    """Pack the chunks of a step.

    Returns:
        The token bucket, and the array for its program.

    Raises:
        ValueError: more chunks or tokens than a step holds, or a chunk beyond its sequence or its pages.
    """
    if len(chunks) > shapes.rows:
        raise ValueError(f"prompts in one step = {len(chunks)} must be at most {shapes.rows}")
    total = sum(chunk.length for chunk in chunks)
    bucket = bucket_for(total, shapes.token_buckets, "prompt tokens in one step")
    packed = np.zeros(Prefill.words(shapes, bucket), np.int32)
    step = Prefill.of(packed, shapes, bucket)
    step.slots[total:] = -1
    step.following[:] = -1
    size, begin = shapes.page_size, 0
    for row, (sequence, start, length, samples, pages) in enumerate(chunks):
        here, stop = slice(begin, begin + length), start + length
        if stop > len(pages) * size:
            raise ValueError(f"sequence {sequence.id} has pages for {len(pages) * size} tokens, {stop} are to be run")
        table = np.asarray(pages, np.int32)
        positions = np.arange(start, stop, dtype=np.int32)
        step.tokens[here] = sequence.tokens(start, stop)
        step.positions[here] = positions
        step.slots[here] = table[positions // size] * size + positions % size
        scored = sequence.unscored(start, stop)
        step.following[begin + scored.start - start : begin + scored.stop - start] = sequence.prompt[
            scored.start + 1 : scored.stop + 1
        ]
        step.starts[row], step.lengths[row], step.contexts[row], step.samples[row] = begin, length, start, samples
        step.sampling[row] = sampling.pack(sequence)
        step.page_table[row, : len(table)] = table
        begin += length
    return bucket, packed


def prefill(model: Model, shapes: Shapes, bucket: int, plain: bool = False) -> Program:
    """(params, pool, packed, marks of R rows) -> (pool, tokens [R], log-probabilities of them [R, W] and of the
    prompts [T, W]); the pool is donated.

    A plain program serves steps in which nobody asks for more than a temperature (`sampling.is_plain`): it has no
    branch, leaves the marks alone, and gives None for log-probabilities. The same holds for `decode` and `mixed`.
    """

    def step(params: Params, pool: Pool, packed: Array, marked: Array) -> tuple[Pool, Array, Any, Any]:
        this = Prefill.of(packed, shapes, bucket)
        module, hidden, pool = model.run(params, pool, this.tokens, this.positions, this.slots, this.attention())
        logits = module.logits(hidden[this.last()], model.axis)
        chosen_by, wanted, before = sampling.unpack(this.sampling), this.samples > 0, this.contexts + this.lengths
        if plain:
            return pool, sampling.sample_plainly(logits, chosen_by, before), None, None
        tokens = sampling.sample(logits, chosen_by, before, wanted, marked)
        of_tokens = logprobs.of_tokens(logits, tokens, chosen_by.logprobs & wanted)
        of_prompts = logprobs.of_prompt(
            partial(module.logits, axis=model.axis), model.arch.vocab_size, hidden, this.following
        )
        return pool, tokens, of_tokens, of_prompts

    arguments = model.host_array(Prefill.words(shapes, bucket)), model.marks(shapes.rows)
    return compile_step(model, shapes, step, arguments, results=3)


# --- decode -----------------------------------------------------------------------------------------------------------


class DecodeState(NamedTuple):
    """What a decode instance keeps on its devices: one int32 row per slot."""

    token: Int[Array, " B"]
    """The newest token, fed in next."""
    position: Int[Array, " B"]
    """Its position in the sequence."""
    active: Int[Array, " B"]
    """1 where the slot has a sequence."""
    sampling: Int[Array, "B C"]
    page_table: Int[Array, "B max_pages"]

    @staticmethod
    def columns(shapes: Shapes) -> int:
        return FIRST_PAGE + shapes.table_pages

    @staticmethod
    def of(rows: Any) -> DecodeState:
        return DecodeState(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:FIRST_PAGE], rows[:, FIRST_PAGE:])

    def writing(self, shapes: Shapes) -> tuple[Array, Int[Array, " B"]]:
        """Which slots take part in a step, and where their keys and values go (-1: nowhere)."""
        size = shapes.page_size
        # A sequence at its longest has no page for one more token: it writes nowhere.
        active = (self.active > 0) & (self.position < shapes.table_pages * size)
        page = jnp.take_along_axis(self.page_table, (self.position // size)[:, None], axis=1, mode="clip")[:, 0]
        return active, jnp.where(active, page * size + self.position % size, -1)

    def attention(self, active: Array) -> Program:
        """Attention of one token per slot, for `Model.run`."""
        lengths = jnp.where(active, self.position + 1, 0)  # the token fed in now included
        return partial(kernels.paged_decode_attention.attend, page_table=self.page_table, lengths=lengths)

    def stepped(self, rows: Array, tokens: Int[Array, " B"], active: Array) -> Array:
        """The rows after a step that sampled these tokens."""
        # Put together anew: an update in place would be several small kernels on a GPU.
        fed = jnp.stack([jnp.where(active, tokens, self.token), self.position + active], axis=1)
        return jnp.concatenate([fed, rows[:, 2:]], axis=1)


FIRST_PAGE = 3 + sampling.COLUMNS
"""Column of a decode row in which the page table starts."""


def decode(model: Model, shapes: Shapes, batch: int, plain: bool = False) -> Program:
    """(params, pool, state [B, C], marks) -> (pool, state, marks, tokens [batch], log-probabilities of them
    [batch, W]), of the first `batch` slots; pool, state and marks are donated. On plain programs see `prefill`."""

    def step(params: Params, pool: Pool, all_rows: Array, marked: Array) -> tuple[Pool, Array, Array, Array, Any]:
        rows = all_rows[:batch]
        state = DecodeState.of(rows)
        active, slots = state.writing(shapes)
        attention = state.attention(active)
        module, hidden, pool = model.run(params, pool, state.token, state.position, slots, attention)
        logits = module.logits(hidden, model.axis)
        chosen_by, found = sampling.unpack(state.sampling), None
        if plain:
            tokens = sampling.sample_plainly(logits, chosen_by, state.position + 1)
        else:
            tokens = sampling.sample(logits, chosen_by, state.position + 1, active, marked)
            found = logprobs.of_tokens(logits, tokens, chosen_by.logprobs & active)
            marked = marks.count(marked, tokens, chosen_by.penalties, active)
        rows = jnp.concatenate([state.stepped(rows, tokens, active), all_rows[batch:]])
        return pool, rows, marked, tokens, found

    arguments = model.host_array(shapes.slots, DecodeState.columns(shapes)), model.marks(shapes.slots)
    return compile_step(model, shapes, step, arguments, results=4, donate=(1, 2, 3))


def mark(model: Model, shapes: Shapes, rows: int, bucket: int) -> Program:
    """(marks of some rows, packed) -> marks, one row of them made anew (see `marks.pack`); they are donated."""
    arguments = model.marks(rows), model.host_array(1 + 3 * bucket)
    return compile_ahead(model.on_mesh(marks.write, EVERYWHERE, EVERYWHERE), arguments, donate=(0,))


def edit(model: Model, shapes: Shapes, bucket: int) -> Program:
    """(state, edits [n, 2 + C]) -> state; the state is donated.

    An edit is a slot, whether to replace the slot's whole row, and the row. Where it does not replace, entries of -1
    leave the state as it is: that is how pages are added to a row whose token the host does not know yet.
    """

    def step(state: Array, edits: Array) -> Array:
        slot, whole, rows = edits[:, 0], edits[:, 1:2] > 0, edits[:, 2:]
        old = state.at[slot].get(mode="clip")
        return state.at[slot].set(jnp.where(whole | (rows >= 0), rows, old), mode="drop")

    columns = DecodeState.columns(shapes)
    arguments = model.host_array(shapes.slots, columns), model.host_array(bucket, 2 + columns)
    return compile_ahead(model.on_mesh(step, EVERYWHERE, EVERYWHERE), arguments, donate=(0,))


class Edits:
    """Collects what the host changes in a decode state before a step."""

    def __init__(self, shapes: Shapes):
        self._shapes = shapes
        self._rows: list[np.ndarray] = []

    def join(self, slot: int, sequence: TokenSequence, pages: list[int]) -> None:
        """Put the sequence into the slot, its newest token to be fed in next."""
        row = self._row(slot, 1, 0)
        row[2:5] = sequence.last, len(sequence) - 1, 1
        row[5 : 2 + FIRST_PAGE] = sampling.pack(sequence)
        row[2 + FIRST_PAGE : 2 + FIRST_PAGE + len(pages)] = pages

    def leave(self, slot: int) -> None:
        """Empty the slot."""
        self._row(slot, 1, 0)

    def grow(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """The slot's sequence has further pages, from entry `first` of its table on."""
        begin = 2 + FIRST_PAGE + first
        self._row(slot, 0, -1)[begin : begin + len(pages)] = pages

    def pack(self) -> tuple[int, np.ndarray] | None:
        """The bucket and the array for its program; None if nothing changes."""
        if not self._rows:
            return None
        bucket = bucket_for(len(self._rows), self._shapes.edit_buckets, "edited slots")
        packed = np.empty((bucket, len(self._rows[0])), np.int32)
        packed[: len(self._rows)] = self._rows
        packed[len(self._rows) :, 0] = self._shapes.slots  # out of range: dropped
        return bucket, packed

    def _row(self, slot: int, whole: int, fill: int) -> np.ndarray:
        row = np.full(2 + DecodeState.columns(self._shapes), fill, np.int32)
        row[:2] = slot, whole
        self._rows.append(row)
        return row


# --- fresh memory -----------------------------------------------------------------------------------------------------


def fresh_pool(model: Model, shapes: Shapes) -> Program:
    """() -> an empty pool."""
    like = abstract_pool(model.arch, model.dtype, shapes, model.mesh)
    return _compile_fresh(like)


def fresh_state(model: Model, shapes: Shapes) -> Program:
    """() -> a decode state without a sequence."""
    return _compile_fresh(model.host_array(shapes.slots, DecodeState.columns(shapes)))


def fresh_marks(model: Model, shapes: Shapes, rows: int) -> Program:
    """() -> marks in which nothing is marked."""
    return _compile_fresh(model.marks(rows))


def _compile_fresh(like: Any) -> Program:
    def make() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    return compile_ahead(make, (), out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))


def compile_step(
    model: Model, shapes: Shapes, step: Program, arguments: Any, *, results: int, donate: tuple[int, ...] = (1,)
) -> Program:
    """(params, pool, further arguments) -> (pool, as many results as said, the same on every device)."""
    pool, pool_spec = abstract_pool(model.arch, model.dtype, shapes, model.mesh), spec_of(POOL_AXES)
    in_specs = partition_specs(model.params), pool_spec, *(EVERYWHERE,) * len(arguments)
    program = model.on_mesh(step, in_specs, (pool_spec, *(EVERYWHERE,) * results))
    return compile_ahead(
        program, (model.params, pool, *arguments), donate=donate, compiler_options=model.compiler_options
    )
