"""How the model's parameters are made of a checkpoint's tensors, slice by slice, and taken apart again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds_jax.architecture import Architecture
from models.families import weight_names
from models.transformer import abstract_model

Read = Callable[[str, tuple[slice, ...]], np.ndarray]
"""(name of a tensor, a slice per dimension) -> those numbers."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of the module, as it lies on an instance of some tp."""

    arch: Architecture
    path: tuple[Any, ...]
    names: tuple[str, ...]
    """The tensors of a Hugging Face checkpoint that it holds."""
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fill: float | None
    """What a model that has not been trained has here: a constant, or None for random numbers."""

    def tensor_shapes(self) -> list[tuple[int, ...]]:
        """The shape of each tensor of `names`."""
        arch = self.arch
        match self.axes[0]:
            case "kv_heads":
                heads = (arch.num_heads, arch.num_kv_heads, arch.num_kv_heads)
                return [(count * arch.head_dim, *self.shape[3:]) for count in heads]
            case "inputs":
                return [self.shape[1:]] * len(self.names)
            case "vocab":
                return [(arch.vocab_size, *self.shape[1:])]
        return [self.shape]

    def join(self, index: tuple[slice, ...], read: Read) -> np.ndarray:
        """The part of the parameter that `index` cuts out, reading no more of the tensors than it needs."""
        first, *rest = (_bounded(part, size) for part, size in zip(index, self.shape, strict=True))
        match self.axes[0]:
            case "kv_heads":
                return self._join_heads(first, tuple(rest[2:]), read)
            case "inputs":
                return np.stack([read(name, tuple(rest)) for name in self.names[first]])
            case "vocab":
                real = slice(min(first.start, self.arch.vocab_size), min(first.stop, self.arch.vocab_size))
                rows = read(self.names[0], (real, *rest))
                padding = (first.stop - first.start) - (real.stop - real.start)
                return np.pad(rows, ((0, padding), *((0, 0) for _ in rest))) if padding else rows
        return read(self.names[0], (first, *rest))

    def _join_heads(self, stored: slice, rest: tuple[slice, ...], read: Read) -> np.ndarray:
        """[stored KV heads, G + 2, D, ...]; where 2 real heads are held twice, stored heads 2 and 3 are real head 1."""
        q_name, *kv_names = self.names
        count, copies, head_dim = (
            stored.stop - stored.start,
            self.shape[0] // self.arch.num_kv_heads,
            self.arch.head_dim,
        )
        group = self.shape[1] - 2

        def heads(name: str, start: int, stop: int, per_row: int) -> np.ndarray:
            rows = read(name, (slice(start * per_row * head_dim, stop * per_row * head_dim), *rest))
            return rows.reshape(stop - start, per_row, head_dim, *rows.shape[1:])

        parts = [heads(q_name, stored.start, stored.stop, group)]
        low, high = stored.start // copies, -(-stored.stop // copies)
        for name in kv_names:
            held = np.repeat(heads(name, low, high, 1), copies, axis=0)
            parts.append(held[stored.start - low * copies :][:count])
        return np.concatenate(parts, axis=1)

    def split(self, value: np.ndarray) -> list[np.ndarray]:
        """The tensors of `names`, from the whole parameter as tp = 1 has it: the inverse of `join`."""
        match self.axes[0]:
            case "kv_heads":
                parts = [value[:, : self.shape[1] - 2], value[:, -2], value[:, -1]]
                return [part.reshape(shape) for part, shape in zip(parts, self.tensor_shapes(), strict=True)]
            case "inputs":
                return list(value)
        return [value]


def parameters(arch: Architecture, tp: int) -> list[Parameter]:
    """Every parameter of the model, at this tp."""
    names = weight_names(arch)
    return [
        Parameter(arch, path, names[path], leaf.shape, leaf.axes, leaf.fill)
        for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(arch, tp, jnp.float32)))
    ]


def _bounded(part: slice, size: int) -> slice:
    return slice(*part.indices(size)[:2])
