"""Causal attention of packed prompt chunks over their sequences' pages."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, Int

from kernels.backends import Backend, choose
from kernels.paged_prefill_attention import definition, xla

FORMS = {"xla": xla.attend, "definition": definition.attend}


# Compiled as part of its caller; the jit makes JAX look at it once, not once per layer.
@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "backend"))
def attend(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "P K N D"],
    v_pages: Float[Array, "P K N D"],
    page_table: Int[Array, "R max_pages"],
    starts: Int[Array, " R"],
    lengths: Int[Array, " R"],
    contexts: Int[Array, " R"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    backend: Backend = "auto",
) -> Float[Array, "T H D"]:
    """softmax(scale q K^T) V of each token over itself and what stands before it in its sequence.

    Chunk r occupies q[starts[r] : starts[r] + lengths[r]]. Its first token stands at position contexts[r] of its
    sequence, so contexts[r] tokens are in the pages from before; the chunk's own keys and values have been written
    too. With starts (0, 3), lengths (3, 2), contexts (0, 4), token 3 is the fifth of its sequence and sees five keys.

    Args:
        q: the chunks' queries, then padding.
        k_pages, v_pages: the pool of one layer.
        page_table: token i of sequence r lies in page page_table[r, i // N] at offset i % N. Entries beyond a
            sequence's last page are not looked at and may hold anything.
        starts, lengths, contexts: the chunks; a row of length 0 is empty.
        scale: what q.k is multiplied by.
        window: a token sees this many at most, itself included: the last ones. Pages before are not looked at.
        soft_cap: scores s become soft_cap tanh(s / soft_cap).

    Returns:
        In the type of q; zeros at tokens of no chunk.
    """
    return choose(backend, FORMS)(
        q, k_pages, v_pages, page_table, starts, lengths, contexts, scale=scale, window=window, soft_cap=soft_cap
    )
