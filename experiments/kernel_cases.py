"""Shapes of published models and the loads that their kernels are measured on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

MODELS = {
    "llama-3-8b": (32, 8, 128),
    "llama-3-70b": (64, 8, 128),
    "opt-13b": (40, 40, 128),
    "qwen3-30b-a3b": (32, 4, 128),
    "llama-3.2-1b": (32, 8, 64),
    "gemma-2-9b": (16, 8, 256),
}
"""Query heads, KV heads, head size."""
BATCHES = (1, 8, 32, 128, 256)
CONTEXTS = (128, 2048, 8192, 32768, 131072)
CHUNKS = (((0, 2048),), ((0, 8192),), ((0, 512),) * 16, ((30000, 2048),), ((2000, 512),) * 8)
"""(tokens of cached prefix, tokens of the chunk) of each prompt in a step."""
FIRST: tuple[tuple[int, int] | tuple[tuple[int, int], ...], ...] = (
    (32, 2048),
    (1, 131072),
    ((0, 8192),),
    (16, 512),
    (128, 2048),
    (32, 8192),
)
"""What is measured before all others, as (batch, context) or chunks: a session on a lent device may end early."""


@dataclass(frozen=True)
class Load:
    """What one call of a kernel works on; decode: chunks is empty."""

    model: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    batch: int = 0
    context: int = 0
    chunks: tuple[tuple[int, int], ...] = ()

    @property
    def operation(self) -> str:
        return "prefill" if self.chunks else "decode"

    @property
    def name(self) -> str:
        if not self.chunks:
            return f"{self.model} decode {self.batch} x {self.context}"
        prefix, length = self.chunks[0]
        return f"{self.model} prefill {len(self.chunks)} x {length}" + (f" after {prefix}" if prefix else "")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [prefix + length for prefix, length in self.chunks] or [self.context] * self.batch

    @property
    def pages(self) -> int:
        return sum(-(-length // self.page_size) for length in self.lengths)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all sequences."""
        import numpy as np

        width = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize
        return 2 * sum(self.lengths) * self.kv_heads * self.head_dim * width

    @property
    def flops(self) -> int:
        """Of the products that causal attention needs."""
        pairs = sum(length * prefix + length * (length + 1) // 2 for prefix, length in self.chunks)
        return 4 * self.heads * self.head_dim * (pairs or self.batch * self.context)

    def arrays(self) -> dict[str, Any]:
        """Random queries and pool, pages in random order: the arguments of `attend`, by name."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        random = np.random.default_rng(0)
        lengths = self.lengths
        used = [-(-length // self.page_size) for length in lengths]
        order = random.permutation(self.pages).astype(np.int32)
        table = np.zeros((len(lengths), max(used)), np.int32)
        for row, count in enumerate(used):
            table[row, :count], order = order[:count], order[count:]
        pool = (self.pages, self.kv_heads, self.page_size, self.head_dim)
        tokens = sum(length for _, length in self.chunks) or self.batch
        rest: dict[str, Any] = {"lengths": jnp.asarray(lengths, jnp.int32)}
        if self.chunks:
            prefixes, chunks = np.array(self.chunks, np.int32).T
            rest = {"starts": np.cumsum(chunks) - chunks, "lengths": chunks, "contexts": prefixes}
            rest = {name: jnp.asarray(value, jnp.int32) for name, value in rest.items()}
        shapes = {"q": (tokens, self.heads, self.head_dim), "k_pages": pool, "v_pages": pool}

        def floats() -> dict[str, jax.Array]:
            keys = jax.random.split(jax.random.key(0, impl="rbg"), len(shapes))  # quick to compile and to run
            return {
                name: jax.random.normal(key, shape, self.dtype)
                for key, (name, shape) in zip(keys, shapes.items(), strict=True)
            }

        return {**jax.jit(floats)(), "page_table": jnp.asarray(table), **rest}


def loads(models: list[str], dtype: str, page_size: int, operations: Collection[str]) -> list[Load]:
    """All loads of these models: those that matter most first, of each the models in their order.

    Args:
        models: keys of MODELS.
        dtype: of queries and pages.
        page_size: tokens of a page.
        operations: "decode", "prefill" or both.
    """
    every: list[Any] = [*FIRST, *((batch, context) for context in CONTEXTS for batch in BATCHES), *CHUNKS]
    found = []
    for work in dict.fromkeys(every):
        prefill = isinstance(work[0], tuple)
        if ("prefill" if prefill else "decode") in operations:
            sizes = {"chunks": work} if prefill else dict(zip(("batch", "context"), work, strict=True))
            found += [Load(model, *MODELS[model], page_size, dtype, **sizes) for model in models]
    return found


def error(load: Load, arrays: dict[str, Any], out: Any) -> float:
    """|out - expected| / |expected| of the first sequence's last token, against the definition in float32."""
    import jax
    import jax.numpy as jnp

    from kernels import paged_decode_attention

    length = load.lengths[0]
    row = load.chunks[0][1] - 1 if load.chunks else 0
    used = -(-length // load.page_size)

    def compare(q: Any, k_pages: Any, v_pages: Any, page_table: Any, out: Any) -> Any:
        pages = page_table[0, :used]
        pools = [pool[pages].astype(jnp.float32) for pool in (k_pages, v_pages)]
        own = jnp.arange(used, dtype=jnp.int32)[None]
        attend: Any = paged_decode_attention.definition.attend
        query, found = (array[row : row + 1].astype(jnp.float32) for array in (q, out))
        expected = attend(query, *pools, own, jnp.array([length]), scale=load.head_dim**-0.5)
        return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)

    inputs = (arrays[name] for name in ("q", "k_pages", "v_pages", "page_table"))
    return float(jax.jit(compare)(*inputs, out))
