"""How the model's parameters are made of a checkpoint's tensors, slice by slice, and taken apart again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds_jax.architecture import Architecture
from models.families import InOut, weight_names
from models.transformer import abstract_model

Read = Callable[[str, tuple[slice, ...]], np.ndarray]
"""(name of a tensor, a slice per dimension) -> those numbers."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of the module, as it lies on an instance of some tp."""

    arch: Architecture
    path: tuple[Any, ...]
    parts: tuple[str | InOut, ...]
    """The tensors of a Hugging Face checkpoint that it is joined of; one that holds several parts comes several times.
    """
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fill: float | None
    """What a model that has not been trained has here: a constant, or None for random numbers."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the checkpoint, each once."""
        return tuple(dict.fromkeys(_name(part) for part in self.parts))

    def tensor_shapes(self) -> list[tuple[int, ...]]:
        """The shape in the checkpoint of each tensor of `names`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part, (rows, *rest) in zip(self.parts, self._part_shapes(), strict=True):
            before = shapes.get(_name(part), (0,))[0]
            shapes[_name(part)] = (before + rows, *rest)
        turned = {part.name for part in self.parts if isinstance(part, InOut)}
        return [shape[::-1] if name in turned else shape for name, shape in shapes.items()]

    def _part_shapes(self) -> list[tuple[int, ...]]:
        """The shape of each of `parts`, as [out, in]."""
        arch = self.arch
        match self.axes[0]:
            case "kv_heads":
                heads = (arch.num_heads, arch.num_kv_heads, arch.num_kv_heads)
                return [(count * arch.head_dim, *self.shape[3:]) for count in heads]
            case "inputs":
                return [self.shape[1:]] * len(self.parts)
            case "experts":
                return [self.shape[-2:]] * len(self.parts)
            case "vocab":
                return [(arch.vocab_size, *self.shape[1:])]
        return [self.shape]

    def _part_reader(self, read: Read) -> Callable[..., np.ndarray]:
        """(number of a part, slices of it as [out, in]) -> those numbers."""
        begins, next_row = [], dict.fromkeys(self.names, 0)
        for part, (rows, *_) in zip(self.parts, self._part_shapes(), strict=True):
            begins.append(next_row[_name(part)])
            next_row[_name(part)] += rows

        def read_part(number: int, rows: slice, *rest: slice) -> np.ndarray:
            part, begin = self.parts[number], begins[number]
            index = slice(rows.start + begin, rows.stop + begin), *rest
            return read(part.name, index[::-1]).T if isinstance(part, InOut) else read(part, index)

        return read_part

    def join(self, index: tuple[slice, ...], read: Read) -> np.ndarray:
        """The part of the parameter that `index` cuts out, reading no more of the tensors than it needs."""
        first, *rest = (_bounded(part, size) for part, size in zip(index, self.shape, strict=True))
        part = self._part_reader(read)
        match self.axes[0]:
            case "kv_heads":
                return self._join_heads(first, tuple(rest[2:]), part)
            case "inputs":
                return np.stack([part(number, *rest) for number in range(first.start, first.stop)])
            case "experts":
                each = len(self.parts) // self.shape[0]
                numbers = range(first.start * each, first.stop * each)
                joined = np.stack([part(number, *rest[-2:]) for number in numbers])
                return joined.reshape(-1, *self.shape[1:-2], *joined.shape[1:])
            case "vocab":
                real = slice(min(first.start, self.arch.vocab_size), min(first.stop, self.arch.vocab_size))
                rows = part(0, real, *rest)
                padding = (first.stop - first.start) - (real.stop - real.start)
                return np.pad(rows, ((0, padding), *((0, 0) for _ in rest))) if padding else rows
        return part(0, first, *rest)

    def _join_heads(self, stored: slice, rest: tuple[slice, ...], part: Callable[..., np.ndarray]) -> np.ndarray:
        """[stored KV heads, G + 2, D, ...]; where 2 real heads are held twice, stored heads 2 and 3 are real head 1."""
        count, copies, head_dim = (
            stored.stop - stored.start,
            self.shape[0] // self.arch.num_kv_heads,
            self.arch.head_dim,
        )
        group = self.shape[1] - 2

        def heads(number: int, start: int, stop: int, per_row: int) -> np.ndarray:
            rows = part(number, slice(start * per_row * head_dim, stop * per_row * head_dim), *rest)
            return rows.reshape(stop - start, per_row, head_dim, *rows.shape[1:])

        parts = [heads(0, stored.start, stored.stop, group)]
        low, high = stored.start // copies, -(-stored.stop // copies)
        for number in (1, 2):
            held = np.repeat(heads(number, low, high, 1), copies, axis=0)
            parts.append(held[stored.start - low * copies :][:count])
        return np.concatenate(parts, axis=1)

    def split(self, value: np.ndarray) -> list[np.ndarray]:
        """The tensors of `names`, from the whole parameter as tp = 1 has it: the inverse of `join`."""
        match self.axes[0]:
            case "kv_heads":
                cut = [value[:, : self.shape[1] - 2], value[:, -2], value[:, -1]]
            case "inputs":
                cut = list(value)
            case "experts":
                cut = list(value.reshape(-1, *value.shape[-2:]))
            case _:
                cut = [value]
        tensors: dict[str, list[np.ndarray]] = {}
        for part, numbers, shape in zip(self.parts, cut, self._part_shapes(), strict=True):
            tensors.setdefault(_name(part), []).append(numbers.reshape(shape))
        whole = [np.concatenate(found) if found[1:] else found[0] for found in tensors.values()]
        return [tensor.T if isinstance(self.parts[0], InOut) else tensor for tensor in whole]


def parameters(arch: Architecture, tp: int) -> list[Parameter]:
    """Every parameter of the model, at this tp."""
    names = weight_names(arch)
    return [
        Parameter(arch, path, names[path], leaf.shape, leaf.axes, leaf.fill)
        for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(arch, tp, jnp.float32)))
    ]


def _name(part: str | InOut) -> str:
    return part.name if isinstance(part, InOut) else part


def _bounded(part: slice, size: int) -> slice:
    return slice(*part.indices(size)[:2])
