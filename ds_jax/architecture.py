"""The shape of a decoder-only transformer: one dataclass that describes every family (no jax).

Everything that differs between two families is a field here; `models/transformer.py` reads the fields and knows no
family by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number, for every type that weights and KV may have."""


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, and a ramp between the two."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int


RopeScaling = LinearScaling | Llama3Scaling


@dataclass(frozen=True)
class LayerKind:
    """What the attention of one layer may have for itself."""

    window: int | None = None
    """Keys that a query sees, its own included: the last ones; None: all."""
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window} must be at least 1")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of each MLP: every token goes through its best few."""

    count: int
    per_token: int
    normalised: bool = True
    """The weights of a token's experts are made to sum to 1; otherwise they are those of a softmax over all experts."""

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"experts.per_token = {self.per_token} must be from 1 to experts.count = {self.count}")


@dataclass(frozen=True)
class Architecture:
    """One decoder-only transformer."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the MLP, or of one expert."""
    max_positions: int
    """Longest sequence (prompt and output) that the model was made for, in tokens."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    """Added to the stored weights of norms: 1 where they are kept around zero (Gemma)."""
    norms: Literal["before", "after", "around"] = "before"
    """Norms stand before attention and MLP; after the residual sum (OPT-350m); or before and, once more, between
    attention or MLP and the sum (Gemma 2 and 3)."""
    final_norm: bool = True
    """A norm after the last layer."""
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    """down(act(gate x) * (up x)); otherwise down(act(up x))."""
    positions: Literal["rope", "learned"] = "rope"
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)
    """A pattern that repeats: layer i is of kind i modulo its length."""
    position_offset: int = 0
    """Rows that a learned position table has before position 0 (2 in OPT)."""
    embedding_size: int = 0
    """Width of the token embeddings where it is not hidden_size (OPT-350m); 0: the same."""
    embedding_scale: float = 1.0
    """What token embeddings are multiplied by: hidden_size ** 0.5 in Gemma."""
    query_key_norm: bool = False
    """RMS norms over each head of query and key, before they are turned (Qwen3, Gemma 3)."""
    query_scalar: float | None = None
    """Attention scores are divided by its root; None: head_dim."""
    attention_soft_cap: float | None = None
    """Scores s become cap tanh(s / cap) before softmax (Gemma 2)."""
    logit_soft_cap: float | None = None
    """The same for the model's logits."""
    experts: Experts | None = None
    attention_bias: bool = False
    """Biases of query, key and value."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    """The output weights are the token embeddings."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} must be divisible by num_kv_heads = {self.num_kv_heads}")
        if not self.layer_kinds:
            raise ValueError("layer_kinds must name at least one kind of layer")
        if self.experts is not None and (self.mlp_bias or not self.gated_mlp):
            raise ValueError("experts must be gated MLPs without biases")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even for rotary positions")

    @property
    def token_width(self) -> int:
        """Width of the token embeddings."""
        return self.embedding_size or self.hidden_size

    @property
    def attention_scale(self) -> float:
        """What q.k is multiplied by before softmax: head_dim ** -0.5, unless the model says another number."""
        return (self.query_scalar or self.head_dim) ** -0.5

    def kind(self, layer: int) -> LayerKind:
        """What this layer's attention is like."""
        return self.layer_kinds[layer % len(self.layer_kinds)]

    def check_tp(self, tp: int) -> None:
        """Refuse a tensor parallelism that cannot share this model out evenly.

        Raises:
            ValueError: tp does not divide the heads, or the MLP (with experts: their number), or neither divides nor is
                a multiple of the KV heads.
        """
        if tp < 1 or self.num_heads % tp:
            raise ValueError(f"tp = {tp} does not divide the model's {self.num_heads} attention heads")
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            raise ValueError(f"tp = {tp} must divide, or be a multiple of, the model's {self.num_kv_heads} KV heads")
        if self.experts is not None:
            if self.experts.count % tp:
                raise ValueError(f"tp = {tp} does not divide the model's {self.experts.count} experts")
        elif self.intermediate_size % tp:
            raise ValueError(f"tp = {tp} does not divide the model's MLP width {self.intermediate_size}")

    def stored_kv_heads(self, tp: int) -> int:
        """KV heads over all devices of an instance: each real one is held tp / num_kv_heads times when tp is larger."""
        return max(self.num_kv_heads, tp)

    def padded_vocab(self, tp: int) -> int:
        """The vocabulary rounded up to a multiple of tp."""
        return -(-self.vocab_size // tp) * tp

    def parameters(self) -> int:
        """Weights and biases of the whole model, counted once.

        With E hidden, e embedding width, V vocabulary, H, K heads of size D, M MLP width, L layers, X experts:
        L (E (H + 2K) D + H D E + mlp + norms + biases) + V e (twice unless tied) + positions + projections,
        where mlp = (2 or 3) E M, or X 3 E M and E X for the router.
        """
        e, m = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        inputs = 2 if self.gated_mlp else 1
        norm = e if self.norm == "rms" else 2 * e
        layer = e * (q + 2 * kv) + q * e + (4 if self.norms == "around" else 2) * norm
        layer += (self.experts.count if self.experts else 1) * (inputs + 1) * e * m
        layer += (self.experts.count * e if self.experts else 0) + self.query_key_norm * 2 * self.head_dim
        layer += self.attention_bias * (q + 2 * kv) + self.attention_output_bias * e + self.mlp_bias * (inputs * m + e)
        total = self.num_layers * layer + self.final_norm * norm
        total += self.vocab_size * self.token_width * (1 if self.tie_embeddings else 2)
        if self.positions == "learned":
            total += (self.max_positions + self.position_offset) * e
        if self.token_width != e:
            total += 2 * self.token_width * e
        return total

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of KV that one token holds over all layers and heads: 2 L K D bytes(dtype), replicas not counted."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    def parameters_per_device(self, tp: int) -> int:
        """Weights and biases that each of `tp` devices holds: its share of what is cut, and all of the rest.

        Raises:
            ValueError: tp does not fit; as `check_tp`.
        """
        whole_routers = 0
        if self.experts is not None:
            others = self.experts.count - self.experts.count // tp
            whole_routers = self.num_layers * others * self.hidden_size
        return self._share(tp).parameters() + whole_routers

    def kv_bytes_per_token_per_device(self, dtype: str, tp: int) -> int:
        """Bytes of KV that one token holds on each of `tp` devices, replicas counted.

        Raises:
            ValueError: tp does not fit; as `check_tp`.
        """
        return self._share(tp).kv_bytes_per_token(dtype)

    def _share(self, tp: int) -> Architecture:
        """What is cut between devices, cut: one device's heads, MLP or experts, and rows of the vocabulary."""
        self.check_tp(tp)
        experts = self.experts and replace(self.experts, count=self.experts.count // tp, per_token=1)
        return replace(
            self,
            vocab_size=self.padded_vocab(tp) // tp,
            num_heads=self.num_heads // tp,
            num_kv_heads=self.stored_kv_heads(tp) // tp,
            intermediate_size=self.intermediate_size if experts else self.intermediate_size // tp,
            experts=experts,
        )
