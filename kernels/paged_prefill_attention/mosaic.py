"""Prefill attention over pages on Hopper: FlashAttention-3's division of labour, with a page table in the producer.

    warpgroup 2      page table -> TMA: pages of K and V -> ring in shared memory            (one thread works)
    warpgroup 0, 1   64 queries each: wgmma Q K^T -> mask, softmax in registers -> wgmma P V -> TMA: output

A block of threads takes 128 queries of one head. Both consumers read the same ring, so a page is fetched once for 128
queries; heads of a group and neighbouring tiles run side by side and find it in the L2 cache. Tiles come longest first.
Copies move groups of eight rows, so chunks are spread out to begin at multiples of eight, and packed again afterwards.
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
from kernels.mosaic import SHARED_MEMORY_BYTES, add_product, cannot_read, hopper_only, swizzled
from kernels.paged_prefill_attention.tiles import COLUMNS, aligned, tiles_of
from kernels.tuning import chosen

ROWS = 64
"""Queries of one consumer."""
CONSUMERS = 2
ALIGNMENT = 8
"""A tile begins at a multiple of this: copies move whole groups of rows."""
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may be chosen freely; 0: by the head size."""

    block: int = 0
    """Tokens of a key block, a multiple of 64."""
    stages: int = 0
    """Blocks of K and V in the ring."""

    def of(self, head_dim: int) -> tuple[int, int]:
        """Block and stages for this head size: as many as fit into shared memory."""
        block = self.block or (128 if head_dim <= 128 else 64)
        free = SHARED_MEMORY_BYTES - 1024 - CONSUMERS * ROWS * head_dim * 2
        return block, self.stages or max(2, min(4, free // (2 * block * head_dim * 2)))


def refusal(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    contexts: jax.Array,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    **options: Any,
) -> str | None:
    """Why this kernel cannot do it here; None if it can."""
    return hopper_only() or cannot_read(q, k_pages, k_scales)


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    contexts: jax.Array,
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
    _, heads, head_dim = q.shape
    pool, kv_heads, size, _ = k_pages.shape
    group, dtype, width = heads // kv_heads, q.dtype, page_table.shape[1]
    tuning = tuning or Tuning(**chosen("prefill", platform()[1], head_dim, size))
    block, stages = tuning.of(head_dim)
    per_block = max(1, block // size)  # pages of a block, or
    per_page = max(1, size // block)  # blocks of a page
    spread = aligned(starts, lengths, len(q), ALIGNMENT)
    tokens = len(spread.source)
    tiles = tiles_of(spread.starts, lengths, contexts, tokens, CONSUMERS * ROWS, ALIGNMENT, block, window)

    def kernel(q_ref, k_ref, v_ref, table_ref, tiles_ref, out_ref, q_s, k_s, v_s, *scratch):
        q_barriers, k_barriers, v_barriers, k_consumed, v_consumed, *through = scratch
        number, warpgroup = lax.axis_index("number"), lax.axis_index("warpgroup")
        tile, head = lax.div(number, heads), lax.rem(number, heads)
        sequence, row, rows, position, begin, end, first, blocks = (tiles_ref[tile, i] for i in range(COLUMNS))
        row = row * ALIGNMENT  # which the compiler must see

        @pl.when((warpgroup < CONSUMERS) & (rows > 0))
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            mine = warpgroup * ROWS
            q_s_mine = q_s.at[warpgroup]
            barrier = q_barriers.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(row + mine, ROWS), head], q_s_mine, barrier)
            plgpu.barrier_wait(barrier)
            low = position + mine  # of my first query

            def step(masked, j, carry):
                acc, best, weight = carry
                slot, start = lax.rem(j, stages), (first + j) * block
                plgpu.barrier_wait(k_barriers.at[slot])

                def product(acc_ref):
                    plgpu.wgmma(acc_ref, q_s_mine, k_s.at[slot].transpose((1, 0)))
                    return acc_ref[...]

                scores = pl.run_scoped(product, plgpu.ACC((ROWS, block), jnp.float32))
                plgpu.barrier_arrive(k_consumed.at[slot])
                if soft_cap is None:
                    scores = scores * (scale * LOG2_E)
                else:
                    scores = jnp.tanh(scores * (scale / soft_cap)) * (soft_cap * LOG2_E)
                if masked:
                    query = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA) + low
                    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + start
                    seen = key <= query
                    if window is not None:
                        seen = seen & (key > query - window)
                    scores = jnp.where(seen, scores, -jnp.inf)
                new_best = jnp.maximum(best, scores.max(axis=1))
                rescale = jnp.exp2(best - new_best)
                p = jnp.exp2(scores - lax.broadcast_in_dim(new_best, scores.shape, [0]))
                weight = weight * rescale + p.sum(axis=1)
                acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
                plgpu.barrier_wait(v_barriers.at[slot])
                if masked:

                    @pl.when((start < begin) | (start + block > end))
                    def _():
                        # What lies outside the sequence may be NaN, and 0 * NaN is NaN. Both consumers write the same.
                        shape = (block, head_dim)
                        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + start
                        values = plgpu.layout_cast(v_s[slot], plgpu.Layout.WGMMA)
                        v_s[slot] = jnp.where((key >= begin) & (key < end), values, jnp.zeros(shape, dtype))
                        plgpu.commit_smem()

                acc = add_product(acc, p.astype(dtype), v_s.at[slot], *(ref.at[warpgroup] for ref in through))
                plgpu.barrier_arrive(v_consumed.at[slot])
                return acc, new_best, weight

            lowest = jnp.full((ROWS,), jnp.finfo(jnp.float32).min, jnp.float32)
            zeros = jnp.zeros((ROWS,), jnp.float32)
            carry = (
                plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA),
                plgpu.layout_cast(lowest, plgpu.Layout.WGMMA.reduce(1)),
                plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1)),
            )
            # Blocks that all my queries see whole: below the diagonal, inside every window.
            whole_end = jnp.clip(lax.div(low + 1, block) - first, 0, blocks)
            if window is None:
                whole_begin = jnp.int32(0)
            else:
                oldest = jnp.maximum(low + ROWS - window, 0)  # that my last query sees
                whole_begin = jnp.clip(lax.div(oldest + block - 1, block) - first, 0, whole_end)
                carry = lax.fori_loop(0, whole_begin, lambda j, carry: step(True, j, carry), carry)
            carry = lax.fori_loop(whole_begin, whole_end, lambda j, carry: step(False, j, carry), carry)
            acc, _, weight = lax.fori_loop(whole_end, blocks, lambda j, carry: step(True, j, carry), carry)

            weight = jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)  # of padding, which sees nothing
            left = rows - mine
            out = acc * lax.broadcast_in_dim(1 / weight, acc.shape, [0])
            inside = plgpu.broadcasted_iota(jnp.int32, out.shape, 0, layout=plgpu.Layout.WGMMA) < left
            q_s_mine[...] = jnp.where(inside, out, 0.0).astype(dtype)  # The queries have been used.
            plgpu.commit_smem()
            for group_of_rows in range(0, ROWS, ALIGNMENT):

                @pl.when(group_of_rows < left)
                def _(group_of_rows=group_of_rows):
                    source = q_s_mine.at[pl.ds(group_of_rows, ALIGNMENT)]
                    target = out_ref.at[pl.ds(row + mine + group_of_rows, ALIGNMENT), head]
                    plgpu.copy_smem_to_gmem(source, target)

            plgpu.wait_smem_to_gmem(0)

        @pl.when((warpgroup == CONSUMERS) & (rows > 0))
        def _produce():
            plgpu.set_max_registers(40, action="decrease")
            kv_head = lax.div(head, group)

            @pl.loop(0, blocks)
            def _(j):
                slot, here = lax.rem(j, stages), first + j
                pages = []
                for part in range(per_block):
                    # Beyond a sequence's last page the table may hold anything.
                    entry = jnp.minimum(lax.div(here, per_page) * per_block + part, width - 1)
                    pages.append(jnp.clip(table_ref[sequence, entry], 0, pool - 1))
                source = pl.ds(lax.rem(here, per_page) * block, min(size, block))
                for ref, buffer, ready, consumed in (
                    (k_ref, k_s, k_barriers, k_consumed),
                    (v_ref, v_s, v_barriers, v_consumed),
                ):

                    @pl.when(j >= stages)
                    def _(consumed=consumed):
                        plgpu.barrier_wait(consumed.at[slot])

                    for part, page in enumerate(pages):
                        target = buffer.at[slot, pl.ds(part * size, min(size, block))]
                        plgpu.copy_gmem_to_smem(ref.at[page, kv_head, source], target, ready.at[slot])

    transforms = swizzled(head_dim, dtype)
    ring = plgpu.SMEM((stages, block, head_dim), dtype, transforms=transforms)
    filled = plgpu.Barrier(num_arrivals=per_block, num_barriers=stages)
    emptied = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    # A tile may reach beyond the last token.
    source = jnp.pad(spread.source, (0, CONSUMERS * ROWS), constant_values=len(q))
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tokens, heads, head_dim), dtype),
        grid=(len(tiles) * heads,),
        grid_names=("number",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((CONSUMERS, ROWS, head_dim), dtype, transforms=transforms),
            ring,
            ring,
            plgpu.Barrier(num_barriers=CONSUMERS),
            filled,
            filled,
            emptied,
            emptied,
            *([plgpu.SMEM((CONSUMERS, ROWS, block), dtype)] if interpret else []),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(q.at[source].get(mode="fill", fill_value=0), k_pages, v_pages, page_table.astype(jnp.int32), tiles)
    return out.at[spread.place].get(mode="fill", fill_value=0)
