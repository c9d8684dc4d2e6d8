"""Decode attention over pages on Hopper: a stream of pages through shared memory, scored by the tensor cores.

    pages in HBM ==TMA==> ring of K and V blocks in shared memory ==wgmma==> scores, softmax, sum in registers
                                                                              |
    output <== combine <== partial results and their weights in HBM <== TMA ==+

Each worker (one block of 128 threads; as many as fit on the chip at once) walks through its stretch of the schedule,
64 tokens a step. Copies run `stages` blocks ahead, across the borders of pairs, so the stream never stops. The query
heads that share a KV head are the rows of one product: 64 rows, of which G are real. The tensor cores have time for
that, since they wait for memory anyway, and in return neither scores nor weights ever leave the registers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.backends import platform
from kernels.mosaic import SHARED_MEMORY_BYTES, add_product, cannot_read, cores_of, hopper_only, swizzled
from kernels.paged_decode_attention.schedule import Schedule, plan
from kernels.tuning import chosen

BLOCK = 64
"""Tokens of a step: the rows that one wgmma takes."""
ROWS = 64
"""Query rows of a product, most of them padding."""
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may be chosen freely."""

    stages: int = 0
    """Blocks of K and V that are on their way or in use; 0: as many as leave room for workers_per_core."""
    workers_per_core: int = 2
    """Workers that share a multiprocessor, so that one computes while the other waits."""
    cores: int = 132
    """Multiprocessors of the chip."""


def refusal(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    **options: Any,
) -> str | None:
    """Why this kernel cannot do it here; None if it can."""
    heads, kv_heads = q.shape[1], k_pages.shape[1]
    if heads // kv_heads > ROWS:
        return f"{heads // kv_heads} query heads share a KV head, more than {ROWS}"
    return hopper_only() or cannot_read(q, k_pages, k_scales)


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    k_scales: None = None,
    v_scales: None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    tuning: Tuning | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See the package; `refusal` says what it cannot do."""
    if tuning is None:
        kind = platform()[1]
        tuning = Tuning(cores=cores_of(kind), **chosen("decode", kind, q.shape[2], k_pages.shape[2]))
    batch, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    group = heads // kv_heads
    rows = -(-group // 8) * 8  # A copy takes whole tiles of eight rows.
    workers = tuning.cores * tuning.workers_per_core
    schedule = plan(lengths, kv_heads, BLOCK, workers, window)
    grouped = jnp.pad(q.reshape(batch, kv_heads, group, head_dim), ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    options = {"scale": scale, "window": window, "soft_cap": soft_cap, "tuning": tuning, "interpret": interpret}
    partial, weight = _partial_results(grouped, k_pages, v_pages, page_table, schedule, **options)
    out = _combine(partial, weight, schedule.places, q.dtype, interpret)
    return out[:, :, :group].reshape(q.shape)


def stages_for(head_dim: int, tuning: Tuning) -> int:
    """Blocks that fit into shared memory beside the query and one result."""
    each = SHARED_MEMORY_BYTES // tuning.workers_per_core - 2048
    fixed = ROWS * head_dim * (2 + 4)
    return tuning.stages or max(2, min(8, (each - fixed) // (2 * BLOCK * head_dim * 2)))


def _partial_results(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    schedule: Schedule,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    tuning: Tuning,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Of each place: softmax-weighted mean of the values, and log2 of the sum of the weights (in every column)."""
    batch, kv_heads, rows, head_dim = q.shape
    pool, _, size, _ = k_pages.shape
    dtype, stages = k_pages.dtype, stages_for(head_dim, tuning)
    per_block = max(1, BLOCK // size)  # pages of a block, or
    per_page = max(1, size // BLOCK)  # blocks of a page
    workers = schedule.work.shape[0]
    places = batch * kv_heads + workers

    def kernel(q_ref, k_ref, v_ref, table_ref, work_ref, sequences_ref, out_ref, weight_ref, *scratch):
        q_s, k_s, v_s, out_s, q_barrier, k_barriers, v_barriers, *through = scratch
        worker = lax.axis_index("worker")
        blocks, pairs = work_ref[worker, 3], work_ref[worker, 4]

        def fetch(slot, at):
            """Start the copies of a block of K and V; returns the block that follows."""
            sequence, head, block = at
            row, first, count = (sequences_ref[sequence, column] for column in range(3))
            here = first + block
            for part in range(per_block):
                # Beyond a sequence's last page the table may hold anything.
                entry = jnp.minimum(lax.div(here, per_page) * per_block + part, width - 1)
                page = jnp.clip(table_ref[row, entry], 0, pool - 1)
                source = pl.ds(lax.rem(here, per_page) * BLOCK, min(size, BLOCK))
                target = pl.ds(part * size, min(size, BLOCK))
                for ref, buffer, barriers in ((k_ref, k_s, k_barriers), (v_ref, v_s, v_barriers)):
                    plgpu.copy_gmem_to_smem(ref.at[page, head, source], buffer.at[slot, target], barriers.at[slot])
            over = block + 1 == count
            last = over & (head + 1 == kv_heads)
            return (
                jnp.where(last, sequence + 1, sequence),
                jnp.where(last, 0, jnp.where(over, head + 1, head)),
                jnp.where(over, 0, block + 1),
            )

        def ahead(number, at):
            """Fetch block `number` of this worker, if it has so many."""
            return lax.cond(number < blocks, lambda: fetch(lax.rem(number, stages), at), lambda: at)

        def step(block, carry):
            number, at, first, length, acc, best, weight = carry
            slot = lax.rem(number, stages)
            plgpu.barrier_wait(k_barriers.at[slot])

            def product(acc_ref):
                plgpu.wgmma(acc_ref, q_s, k_s.at[slot].transpose((1, 0)))
                return acc_ref[...]

            scores = pl.run_scoped(product, plgpu.ACC((ROWS, BLOCK), jnp.float32))
            if soft_cap is None:
                scores = scores * (scale * LOG2_E)
            else:
                scores = jnp.tanh(scores * (scale / soft_cap)) * (soft_cap * LOG2_E)
            start = block * BLOCK
            token = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + start
            scores = jnp.where((token >= first) & (token < length), scores, -jnp.inf)
            new_best = jnp.maximum(best, scores.max(axis=1))
            rescale = jnp.exp2(best - new_best)
            p = jnp.exp2(scores - lax.broadcast_in_dim(new_best, scores.shape, [0]))
            weight = weight * rescale + p.sum(axis=1)
            plgpu.barrier_wait(v_barriers.at[slot])

            @pl.when((start < first) | (start + BLOCK > length))
            def _():
                # What lies outside the sequence may be NaN, and 0 * NaN is NaN.
                shape = (BLOCK, head_dim)
                row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + start
                values = plgpu.layout_cast(v_s[slot], plgpu.Layout.WGMMA)
                v_s[slot] = jnp.where((row >= first) & (row < length), values, jnp.zeros(shape, dtype))
                plgpu.commit_smem()

            acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
            acc = add_product(acc, p.astype(dtype), v_s.at[slot], *through)
            at = ahead(number + stages, at)
            return number + 1, at, first, length, acc, new_best, weight

        def pair(number_of_pair, carry):
            number, here, at = carry
            sequence, head, begin = here
            row, first_block, count, length = (sequences_ref[sequence, column] for column in range(4))
            plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_s.at[pl.ds(0, rows)], q_barrier)
            plgpu.barrier_wait(q_barrier)
            end = jnp.minimum(count, begin + blocks - number)
            first = 0 if window is None else jnp.maximum(length - window, 0)
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA)
            best = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            weight = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            carry = number, at, jnp.int32(first), length, zeros, best, weight
            carry = lax.fori_loop(first_block + begin, first_block + end, step, carry)
            number, at, _, _, acc, best, weight = carry
            place = sequence * kv_heads + head + worker
            acc = acc * lax.broadcast_in_dim(1 / weight, acc.shape, [0])
            total = lax.broadcast_in_dim(best + jnp.log2(weight), acc.shape, [0])
            for value, target in ((acc, out_ref), (total, weight_ref)):
                out_s[...] = value
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, rows)], target.at[place])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            last = head + 1 == kv_heads
            here = jnp.where(last, sequence + 1, sequence), jnp.where(last, 0, head + 1), jnp.int32(0)
            return number, here, at

        @pl.when(blocks > 0)
        def _():
            begin = work_ref[worker, 0], work_ref[worker, 1], work_ref[worker, 2]
            at = lax.fori_loop(0, jnp.minimum(stages, blocks), fetch, begin)
            lax.fori_loop(0, pairs, pair, (jnp.int32(0), begin, at))
            plgpu.wait_smem_to_gmem(0)

    width = page_table.shape[1]
    result = jax.ShapeDtypeStruct((places, rows, head_dim), jnp.float32)
    transforms = swizzled(head_dim, dtype)
    return plgpu.kernel(
        kernel,
        out_type=(result, result),
        grid=(workers,),
        grid_names=("worker",),
        scratch_types=[
            plgpu.SMEM((ROWS, head_dim), dtype, transforms=transforms),
            plgpu.SMEM((stages, BLOCK, head_dim), dtype, transforms=transforms),
            plgpu.SMEM((stages, BLOCK, head_dim), dtype, transforms=transforms),
            plgpu.SMEM((ROWS, head_dim), jnp.float32, transforms=swizzled(head_dim, jnp.float32)),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=per_block, num_barriers=stages),
            plgpu.Barrier(num_arrivals=per_block, num_barriers=stages),
            *([plgpu.SMEM((ROWS, BLOCK), dtype)] if interpret else []),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(q, k_pages, v_pages, page_table.astype(jnp.int32), schedule.work, schedule.sequences)


TOGETHER = 4
"""Partial results that one step of the combine has in flight."""


def _combine(partial: jax.Array, weight: jax.Array, places: jax.Array, dtype: Any, interpret: Any) -> jax.Array:
    """The mean of each pair's partial results by their weights; zeros where there are none. [B, K, rows, D]."""
    batch, kv_heads, _ = places.shape
    _, rows, head_dim = partial.shape

    def kernel(partial_ref, weight_ref, places_ref, out_ref):
        b, h = lax.axis_index("b"), lax.axis_index("h")
        first, count = places_ref[b, h, 0], places_ref[b, h, 1]

        def step(i, carry):
            best, total, mean = carry
            for part in range(TOGETHER):
                inside = i * TOGETHER + part < count
                place = jnp.where(inside, first + i * TOGETHER + part, first)
                log = weight_ref[place] + jnp.where(inside, 0.0, -jnp.inf)
                value = partial_ref[place]
                new_best = jnp.maximum(best, log)
                rescale, share = jnp.exp2(best - new_best), jnp.exp2(log - new_best)
                mean, total, best = mean * rescale + value * share, total * rescale + share, new_best
            return best, total, mean

        zeros = jnp.zeros((rows, head_dim), jnp.float32)
        start = jnp.full((rows, head_dim), jnp.finfo(jnp.float32).min, jnp.float32), zeros, zeros
        _, total, mean = lax.fori_loop(0, lax.div(count + TOGETHER - 1, TOGETHER), step, start)
        out_ref[b, h] = (mean / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, kv_heads, rows, head_dim), dtype),
        grid=(batch, kv_heads),
        grid_names=("b", "h"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(partial, weight, places)
