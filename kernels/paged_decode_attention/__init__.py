"""Attention of one new token per sequence over the sequence's pages."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, Int

from kernels.backends import Backend, choose
from kernels.paged_decode_attention import definition, xla

FORMS = {"xla": xla.attend, "definition": definition.attend}


# Compiled as part of its caller; the jit makes JAX look at it once, not once per layer.
@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "backend"))
def attend(
    q: Float[Array, "B H D"],
    k_pages: Float[Array, "P K N D"],
    v_pages: Float[Array, "P K N D"],
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B H D"]:
    """softmax(scale q K^T) V of each sequence, query head h reading KV head h // (H / K).

    Args:
        q: one query per slot of the batch.
        k_pages, v_pages: the pool of one layer.
        page_table: token i of sequence b lies in page page_table[b, i // N] at offset i % N. Entries beyond a
            sequence's last page are not looked at and may hold anything.
        lengths: tokens to attend to, the current one included (it has been written); 0 for an empty slot.
        scale: what q.k is multiplied by.
        window: a token sees this many at most, itself included: the last ones. Pages before are not looked at.
        soft_cap: scores s become soft_cap tanh(s / soft_cap).

    Returns:
        In the type of q; zeros for empty slots.
    """
    return choose(backend, FORMS)(
        q, k_pages, v_pages, page_table, lengths, scale=scale, window=window, soft_cap=soft_cap
    )
