"""Cases of paged attention that every backend runs: what the kernels for GPUs can do, small for an interpreter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences of `contexts` + `lengths` tokens; decode: lengths is 1, or 0 where the slot is empty."""

    name: str
    contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    padding: int = 0
    """Tokens behind the chunks."""
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.head_dim**-0.5, "window": self.window, "soft_cap": self.soft_cap}

    def arguments(self, decode: bool) -> list[jnp.ndarray]:
        """Those of `attend`; NaN lies wherever no sequence may look, and page tables lead astray behind their end."""
        random = np.random.default_rng(self.seed)
        lengths, contexts, size = np.array(self.lengths), np.array(self.contexts), self.page_size
        totals = np.where(lengths, lengths + contexts, 0)
        used = -(-totals // size)
        pages = random.permutation(int(used.sum()) + 2).tolist()
        table = np.full((len(totals), max(1, used.max())), 10**6, np.int32)
        held = np.zeros((len(pages), size), bool)
        for row, total in enumerate(totals):
            table[row, : used[row]] = [pages.pop() for _ in range(used[row])]
            first = 0 if self.window is None else max(0, contexts[row] + 1 - self.window)
            for i in range(first, total):
                held[table[row, i // size], i % size] = True
        tokens = len(totals) if decode else int(lengths.sum()) + self.padding
        q = random.normal(size=(tokens, self.heads, self.head_dim))
        if not decode:
            q[int(lengths.sum()) :] = np.nan
        pool = random.normal(size=(2, len(held), self.kv_heads, size, self.head_dim))
        pool = np.where(held[:, None, :, None], pool, np.nan)
        rest = [totals] if decode else [np.cumsum(lengths) - lengths, lengths, contexts]
        floats = [jnp.asarray(x, self.dtype) for x in (q, *pool)]
        return [*floats, jnp.asarray(table), *(jnp.asarray(x, jnp.int32) for x in rest)]


DECODE = [
    Case("grouped heads, empty slots, uneven lengths", (149, 0, 29, 63), (1, 0, 1, 1)),
    Case("one KV head, window and cap", (199, 2, 127), (1, 1, 1), 8, 1, 80, 32, "float16", 70, 5.0),
    Case("large pages, one head each", (130, 0, 300), (1, 1, 1), 2, 2, 128, 128),
]
PREFILL = [
    Case("with and without a cached prefix, an empty row, padding", (0, 100, 0, 3), (70, 33, 0, 5), padding=21),
    Case("window and cap", (150, 0), (140, 9), 2, 1, 80, 32, "float16", 60, 5.0),
    Case("large pages", (0, 131), (3, 130), 2, 2, 128, 128),
]
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-5}
"""Of results around 1: some units in the last place."""
