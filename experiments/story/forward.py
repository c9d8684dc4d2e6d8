"""The model over whole rows, without a KV cache: what training needs, and a plain way to continue a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ds_jax.architecture import Architecture
from models.transformer import Params, abstract_model


def forward(arch: Architecture, params: Params, tokens: Int[Array, "B S"]) -> Float[Array, "B S V"]:
    """Logits at every position, attention causal within each row."""
    batch, length = tokens.shape
    model = nnx.merge(nnx.graphdef(abstract_model(arch, 1, jnp.float32)), params)

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
        return causal_attention(q, k, v, arch.attention_scale).reshape(batch * length, -1, arch.head_dim)

    positions = jnp.tile(jnp.arange(length), batch)
    return model.logits(model(tokens.reshape(-1), positions, attend)).reshape(batch, length, -1)


def causal_attention(
    q: Float[Array, "B S H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], scale: float, block: int = 64
) -> Float[Array, "B S H D"]:
    """What `jax.nn.dot_product_attention(is_causal=True)` computes, 2.5 times faster on XLA:CPU: each block of queries
    meets only the keys up to its end, and the queries of a KV head are one matrix."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = (q * scale).reshape(batch, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3).reshape(batch * kv_heads, length, head_dim) for x in (k, v))
    blocks = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        queries = q[:, :, :, start:stop].reshape(batch * kv_heads, group * (stop - start), head_dim)
        scores = jnp.einsum("bqd,bkd->bqk", queries, k[:, :stop])
        seen = jnp.tile(jnp.arange(start, stop)[:, None] >= jnp.arange(stop), (group, 1))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        attended = jnp.einsum("bqk,bkd->bqd", weights, v[:, :stop])
        blocks.append(attended.reshape(batch, kv_heads, group, stop - start, head_dim))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def continue_greedily(
    arch: Architecture, params: Params, prompts: Sequence[Sequence[int]], new_tokens: int, end: int
) -> list[list[int]]:
    """The most likely next tokens of each prompt, up to and including `end`. Recomputes everything at every token:
    for a look at a model, not for serving."""
    length = max(map(len, prompts)) + new_tokens
    tokens = np.zeros((len(prompts), length), np.int32)
    lengths: Any = np.array([len(prompt) for prompt in prompts])
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt

    @jax.jit
    def best(params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        return forward(arch, params, tokens)[jnp.arange(len(prompts)), lengths - 1].argmax(-1)

    running: Any = np.ones(len(prompts), bool)
    for _ in range(new_tokens):
        chosen = np.asarray(best(params, tokens, lengths))
        for at in np.flatnonzero(running).tolist():
            tokens[at, lengths[at]] = chosen[at]
            lengths[at] += 1
        running &= chosen != end
        if not running.any():
            break
    return [row[len(prompt) : stop].tolist() for row, prompt, stop in zip(tokens, prompts, lengths, strict=True)]
