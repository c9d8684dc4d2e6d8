"""Attention of one new token per sequence over the sequence's pages."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from kernels.backends import Backend, Form, choose
from kernels.paged_decode_attention import definition, xla


def _mosaic(*arrays: Any, **options: Any) -> jax.Array:
    from kernels.paged_decode_attention import mosaic  # A second of imports that no other platform needs

    return mosaic.attend(*arrays, **options)


def _refusal(*arrays: Any, **options: Any) -> str | None:
    from kernels.paged_decode_attention import mosaic

    return mosaic.refusal(*arrays, **options)


FORMS: dict[str, Form] = {"mosaic": _mosaic, "xla": xla.attend, "definition": definition.attend}


# Compiled as part of its caller; the jit makes JAX look at it once, not once per layer.
@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "backend"))
def attend(
    q: Float[Array, "B H D"],
    k_pages: Float[Array, "P K N D"],
    v_pages: Float[Array, "P K N D"],
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, " B"],
    k_scales: Float[Array, "P K"] | None = None,
    v_scales: Float[Array, "P K"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B H D"]:
    """softmax(scale q K^T) V of each sequence, query head h reading KV head h // (H / K).

    Args:
        q: one query per slot of the batch.
        k_pages, v_pages: the pool of one layer; int8 and float8 come with scales.
        page_table: token i of sequence b lies in page page_table[b, i // N] at offset i % N. Entries beyond a
            sequence's last page are not looked at and may hold anything.
        lengths: tokens to attend to, the current one included (it has been written); 0 for an empty slot.
        k_scales, v_scales: what the numbers of each page and head are multiplied by, float32; both or neither.
        scale: what q.k is multiplied by.
        window: a token sees this many at most, itself included: the last ones. Pages before are not looked at.
        soft_cap: scores s become soft_cap tanh(s / soft_cap).
        backend: which form; auto takes the platform's own. One that cannot do it is replaced by XLA's, with a warning.

    Returns:
        In the type of q; zeros for empty slots.
    """
    form = choose("paged decode attention", backend, FORMS, {"mosaic": _refusal})
    return form(
        q,
        k_pages,
        v_pages,
        page_table,
        lengths,
        k_scales,
        v_scales,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
