"""The decoder-only transformer that all families share, written for one device of a tensor-parallel group.

The module runs inside `jax.shard_map`: its arrays are one device's shards, head counts are read off their shapes, and
the collectives are written out (two sums per layer, as in Megatron-LM, section 3). With `axis=None` there is one
device and nothing is summed: plain use and training.

Weights lie as [out, in], which XLA:CPU multiplies faster for few tokens. Those with the same input are one array:
`qkv` [K', G + 2, D, E] holds, per stored KV head, its G query heads, then its key, then its value, so that a cut along
the first axis gives each device whole groups; `up` [2, M, E] holds gate and up (only up: [1, M, E]).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ds_jax.architecture import Architecture, LayerKind
from kernels import expert_mlp
from kernels.projection import project
from models import rope, sharding

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
"""(layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D]: local heads, q and k rotated, q not scaled."""

Params = dict[str, Any]
"""All parameters as plain nested dicts of arrays: the pure form of the module's nnx state (cheap to pass to jit)."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def total(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum of x over the devices of the tensor-parallel group."""
    return x if axis is None else lax.psum(x, axis)


class Initialiser:
    """Makes parameters: matrices of deviation fan_in ** -0.5, and constants.

    Each carries its logical axes in `axes`, and in `fill` the constant that it starts as (None: random).
    """

    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        self.dtype, self.rngs = dtype, rngs

    def matrix(self, *axes: tuple[str, int]) -> nnx.Param:
        names, shape = zip(*axes, strict=True)
        return nnx.Param(random_matrix(self.rngs.params(), shape, self.dtype), axes=names, fill=None)

    def constant(self, value: float, *axes: tuple[str, int]) -> nnx.Param:
        names, shape = zip(*axes, strict=True)
        return nnx.Param(jnp.full(shape, value, self.dtype), axes=names, fill=value)


def random_matrix(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers that keep the size of what they are multiplied with: the last axis is the one summed over."""
    return (jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5).astype(dtype)


class Norm(nnx.Module):
    """RMS or layer norm over the last dimension (hidden, or one head's), computed in float32."""

    def __init__(self, arch: Architecture, init: Initialiser, over: tuple[str, int] | None = None):
        over = over or ("embed", arch.hidden_size)
        self.kind, self.eps, self.offset = arch.norm, arch.norm_eps, arch.norm_offset
        self.weight = init.constant(1 - arch.norm_offset, over)
        self.bias = init.constant(0, over) if arch.norm == "layer" else None

    def __call__(self, x: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        wide = wide * (self.weight[...].astype(jnp.float32) + self.offset)
        if self.bias is not None:
            wide = wide + self.bias[...].astype(jnp.float32)
        return wide.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention around an `attend` that knows where keys and values lie."""

    def __init__(self, arch: Architecture, tp: int, init: Initialiser):
        kv_heads = arch.stored_kv_heads(tp)
        group = ("kv_heads", kv_heads), ("qkv", arch.num_heads // kv_heads + 2), ("head_dim", arch.head_dim)
        embed = ("embed", arch.hidden_size)
        self.qkv = init.matrix(*group, embed)
        self.qkv_bias = init.constant(0, *group) if arch.attention_bias else None
        head = ("head_dim", arch.head_dim)
        self.query_norm = Norm(arch, init, head) if arch.query_key_norm else None
        self.key_norm = Norm(arch, init, head) if arch.query_key_norm else None
        self.out = init.matrix(embed, ("heads", arch.num_heads * arch.head_dim))
        self.out_bias = init.constant(0, embed) if arch.attention_output_bias else None

    def __call__(
        self, x: Float[Array, "T E"], turn: Callable[[jax.Array], jax.Array], attend: Callable, axis: str | None
    ) -> Float[Array, "T E"]:
        kv_heads, group, head_dim, embed = self.qkv.shape
        qkv = project(x, self.qkv[...].reshape(-1, embed))
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...].reshape(-1)
        qkv = qkv.reshape(-1, kv_heads, group, head_dim)
        q = qkv[:, :, : group - 2].reshape(-1, kv_heads * (group - 2), head_dim)
        k, v = qkv[:, :, group - 2], qkv[:, :, group - 1]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        attended = attend(turn(q), turn(k), v)
        y = total(project(attended.reshape(x.shape[0], -1).astype(x.dtype), self.out[...]), axis)
        return y if self.out_bias is None else y + self.out_bias[...]


class Mlp(nnx.Module):
    """down(act(gate x) * up x), or down(act(up x))."""

    def __init__(self, arch: Architecture, init: Initialiser):
        self.activation, self.gated = arch.activation, arch.gated_mlp
        inputs, mlp, embed = (
            ("inputs", 1 + arch.gated_mlp),
            ("mlp", arch.intermediate_size),
            ("embed", arch.hidden_size),
        )
        self.up = init.matrix(inputs, mlp, embed)
        self.up_bias = init.constant(0, inputs, mlp) if arch.mlp_bias else None
        self.down = init.matrix(embed, mlp)
        self.down_bias = init.constant(0, embed) if arch.mlp_bias else None

    def __call__(self, x: Float[Array, "T E"], axis: str | None) -> Float[Array, "T E"]:
        inputs, width, embed = self.up.shape
        y = project(x, self.up[...].reshape(-1, embed))
        if self.up_bias is not None:
            y = y + self.up_bias[...].reshape(-1)
        y = y.reshape(-1, inputs, width)
        activated = ACTIVATIONS[self.activation](y[:, 0])
        y = total(project(activated * y[:, 1] if self.gated else activated, self.down[...]), axis)
        return y if self.down_bias is None else y + self.down_bias[...]


class ExpertMlp(nnx.Module):
    """A sum of the MLPs that the router chooses for each token; every device has whole experts, as many as the others.

    The router looks at its input in float32: with rounding, another expert may be chosen.
    """

    def __init__(self, arch: Architecture, init: Initialiser):
        assert arch.experts is not None
        self.activation, self.experts = arch.activation, arch.experts
        count, mlp, embed = (
            ("experts", arch.experts.count),
            ("expert_mlp", arch.intermediate_size),
            ("embed", arch.hidden_size),
        )
        self.router = init.matrix(("router", arch.experts.count), embed)
        self.up = init.matrix(count, ("inputs", 2), mlp, embed)
        self.down = init.matrix(count, embed, mlp)

    def __call__(self, x: Float[Array, "T E"], axis: str | None) -> Float[Array, "T E"]:
        scores = project(x.astype(jnp.float32), self.router[...].astype(jnp.float32))
        weights, chosen = lax.top_k(jax.nn.softmax(scores), self.experts.per_token)
        if self.experts.normalised:
            weights = weights / weights.sum(-1, keepdims=True)
        if axis is not None:
            chosen = chosen - lax.axis_index(axis) * self.up.shape[0]
        activation = ACTIVATIONS[self.activation]
        y = expert_mlp.apply(x, self.up[...], self.down[...], chosen, weights, activation=activation)
        return total(y, axis).astype(x.dtype)


class Layer(nnx.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, arch: Architecture, tp: int, init: Initialiser):
        self.norms = arch.norms
        self.attention_norm = Norm(arch, init)
        self.attention = Attention(arch, tp, init)
        self.attention_out_norm = Norm(arch, init) if arch.norms == "around" else None
        self.mlp_norm = Norm(arch, init)
        self.mlp = Mlp(arch, init) if arch.experts is None else ExpertMlp(arch, init)
        self.mlp_out_norm = Norm(arch, init) if arch.norms == "around" else None

    def __call__(
        self, x: Float[Array, "T E"], turn: Callable[[jax.Array], jax.Array], attend: Callable, axis: str | None
    ) -> Float[Array, "T E"]:
        if self.norms == "after":
            x = self.attention_norm(x + self.attention(x, turn, attend, axis))
            return self.mlp_norm(x + self.mlp(x, axis))
        y = self.attention(self.attention_norm(x), turn, attend, axis)
        x = x + (y if self.attention_out_norm is None else self.attention_out_norm(y))
        y = self.mlp(self.mlp_norm(x), axis)
        return x + (y if self.mlp_out_norm is None else self.mlp_out_norm(y))


class Transformer(nnx.Module):
    """Token ids in, hidden states and logits out.

    Args:
        arch: what to build.
        tp: devices that share each layer; sets how often KV heads are repeated and the vocabulary's padding.
        dtype: of weights and activations.
        rngs: random numbers of the initial weights.

    Raises:
        ValueError: tp does not fit the architecture.
    """

    def __init__(self, arch: Architecture, tp: int = 1, dtype: Any = jnp.float32, *, rngs: nnx.Rngs):
        arch.check_tp(tp)
        self.arch = arch
        init = Initialiser(dtype, rngs)
        vocab, width, embed = (
            ("vocab", arch.padded_vocab(tp)),
            ("token_width", arch.token_width),
            ("embed", arch.hidden_size),
        )
        self.embedding = init.matrix(vocab, width)
        learned, projected = arch.positions == "learned", arch.token_width != arch.hidden_size
        self.positions = (
            init.matrix(("position", arch.max_positions + arch.position_offset), embed) if learned else None
        )
        self.project_in = init.matrix(embed, width) if projected else None
        self.project_out = init.matrix(width, embed) if projected else None
        self.layers = nnx.List([Layer(arch, tp, init) for _ in range(arch.num_layers)])
        self.final_norm = Norm(arch, init) if arch.final_norm else None
        self.head = None if arch.tie_embeddings else init.matrix(vocab, width)

    def __call__(
        self, tokens: Int[Array, " T"], positions: Int[Array, " T"], attend: Attend, axis: str | None = None
    ) -> Float[Array, "T E"]:
        """Hidden states after the last layer, before the final norm (`logits` applies it, to the rows that need it).

        Args:
            tokens: ids; any value at padding, it is clamped.
            positions: of each token in its sequence, from 0.
            attend: attention over this device's heads, called once per layer in order.
            axis: name of the mesh axis of the tensor-parallel group; None on a single device.
        """
        x = self._embed(tokens, axis)
        if self.arch.embedding_scale != 1:
            x = x * jnp.asarray(self.arch.embedding_scale, x.dtype)
        if self.project_in is not None:
            x = project(x, self.project_in[...])
        if self.positions is not None:
            x = x + self.positions[...].at[positions + self.arch.position_offset].get(mode="clip")
        turns = {kind: self._turn(kind, positions) for kind in dict.fromkeys(self.arch.layer_kinds)}
        for number, layer in enumerate(self.layers):
            x = layer(x, turns[self.arch.kind(number)], functools.partial(attend, number), axis)
        return x

    def logits(self, hidden: Float[Array, "T E"], axis: str | None = None) -> Float[Array, "T V"]:
        """Next-token logits over the whole vocabulary, float32, on every device."""
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.project_out is not None:
            hidden = project(hidden, self.project_out[...])
        weight = self.embedding if self.head is None else self.head
        logits = project(hidden, weight[...], jnp.float32)
        if axis is not None:
            logits = lax.all_gather(logits, axis, axis=1, tiled=True)
        logits = logits[:, : self.arch.vocab_size]
        cap = self.arch.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _turn(self, kind: LayerKind, positions: Int[Array, " T"]) -> Callable[[jax.Array], jax.Array]:
        """How heads are turned to their positions in layers of this kind."""
        if self.positions is not None:
            return lambda heads: heads
        cosine, sine = rope.angles(kind, self.arch.head_dim, positions)
        return functools.partial(rope.rotate, cosine=cosine, sine=sine)

    def _embed(self, tokens: Int[Array, " T"], axis: str | None) -> Float[Array, "T e"]:
        table = self.embedding[...]
        if axis is None:
            return table.at[tokens].get(mode="clip")
        # Each device looks up the tokens of its own rows; the sum has exactly one term that is not zero.
        rows = jnp.clip(tokens, 0, self.arch.vocab_size - 1) - lax.axis_index(axis) * table.shape[0]
        mine = (rows >= 0) & (rows < table.shape[0])
        return lax.psum(jnp.where(mine[:, None], table.at[rows].get(mode="clip"), 0), axis)


def abstract_model(arch: Architecture, tp: int, dtype: Any) -> Transformer:
    """The module with shapes in place of arrays: nothing is computed or allocated."""
    return nnx.eval_shape(lambda: Transformer(arch, tp, dtype, rngs=nnx.Rngs(0)))


def abstract_params(arch: Architecture, tp: int, dtype: Any, mesh: Mesh) -> tuple[nnx.GraphDef, Params]:
    """The module's structure, and every parameter as a ShapeDtypeStruct with its sharding on `mesh`.

    `nnx.merge(graphdef, params)` makes the module again, inside or outside a program; the partition of each
    parameter, as `jax.shard_map` wants it, is `partition_specs(params)`.
    """
    graphdef, state = nnx.split(abstract_model(arch, tp, dtype))
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.sharding_of(leaf.axes, mesh))
        for path, leaf in nnx.to_flat_state(state)
    }
    return graphdef, nnx.traversals.unflatten_mapping(leaves)


def partition_specs(params: Params) -> Any:
    """The PartitionSpec of every parameter, from its sharding."""
    return jax.tree.map(lambda leaf: leaf.sharding.spec, params)


def params_of(model: Transformer) -> Params:
    """A module's parameters as plain nested dicts, as programs take them."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
