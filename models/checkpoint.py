"""Reading Hugging Face checkpoints: all is checked before anything large is read, and each device reads its own part.

A folder holds config.json, generation_config.json (optional), and the weights in model.safetensors, or in several
files that model.safetensors.index.json lists.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ds_jax.architecture import Architecture
from models.families import prefix
from models.folder import CHECKOUT, Checkpoint, find_folder, read_configs
from models.layout import Parameter, parameters
from models.sharding import TENSOR, sharding_of
from models.tensor_files import DTYPES, StoredTensor, find_tensors, read_header
from models.transformer import Params, random_matrix

IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of the names of constants that older checkpoints keep beside the weights."""


def open_checkpoint(path: str | Path, load_format: str = "safetensors") -> Checkpoint:
    """Look through a checkpoint: the configs, and the headers of its weight files.

    Args:
        path: the folder; where it does not exist, it is taken relative to the checkout.
        load_format: "safetensors", or "dummy", which needs config.json only.

    Raises:
        FileNotFoundError: no such folder, or a file missing from it.
        ValueError: something unsupported, a truncated file, a tensor too few or too many, or of the wrong shape or
            type.
    """
    checkpoint = read_configs(path)
    if load_format == "dummy":
        return checkpoint
    if load_format != "safetensors":
        raise ValueError(f"load_format = {load_format!r} must be safetensors or dummy")
    tensors = find_tensors(checkpoint.folder)
    # Older checkpoints of the bare decoder lack the prefix.
    before = prefix(checkpoint.arch)
    if not any(name.startswith(before) for name in tensors):
        tensors = {name if name.startswith("lm_head.") else before + name: tensor for name, tensor in tensors.items()}
    _check_tensors(checkpoint.folder, checkpoint.arch, tensors)
    return dataclasses.replace(checkpoint, tensors=tensors)


def bytes_to_read(checkpoint: Checkpoint, mesh: Mesh) -> int:
    """Bytes that `load_params` reads from the files for this mesh."""
    return sum(
        math.prod(parameter.shape[1:])
        * min(parameter.shape[0], checkpoint.arch.vocab_size if parameter.axes[0] == "vocab" else parameter.shape[0])
        * DTYPES[checkpoint.tensors[parameter.names[0]].dtype].itemsize
        for parameter in parameters(checkpoint.arch, mesh.shape[TENSOR])
    )


def load_params(
    checkpoint: Checkpoint, mesh: Mesh, dtype: Any, progress: Callable[[int], object] = lambda bytes_read: None
) -> Params:
    """Read the weights onto `mesh`, each device its own slices, one after the other.

    Host memory holds no more than one device's part of one parameter, and what it is joined of, at any time.

    Args:
        checkpoint: an opened checkpoint with tensors.
        mesh: of one instance, from `models.sharding.make_mesh`.
        dtype: what the weights are cast to.
        progress: is told the bytes of every slice that has been read, `bytes_to_read` in all.

    Returns:
        The parameters as nested dicts of sharded arrays, as `models.transformer.abstract_params` describes them.

    Raises:
        ValueError: the mesh's tp does not fit the architecture.
    """

    def part(parameter: Parameter, index: tuple[slice, ...]) -> np.ndarray:
        read = 0

        def view(name: str, rows: tuple[slice, ...]) -> np.ndarray:
            nonlocal read
            found = checkpoint.tensors[name].view(rows)
            read += found.nbytes
            return found

        joined = parameter.join(index, view)
        numbers = _empty(joined.shape, jnp.dtype(dtype))
        np.copyto(numbers, joined, casting="unsafe")
        progress(read)
        return numbers

    def load(parameter: Parameter) -> jax.Array:
        sharding = sharding_of(parameter.axes, mesh)
        where: dict[Any, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(parameter.shape).items():
            where.setdefault(tuple((cut.start, cut.stop) for cut in index or ()), []).append(device)
        pieces = []
        for bounds, devices in where.items():
            numbers = part(parameter, tuple(slice(*bound) for bound in bounds))
            pieces += [jax.device_put(numbers, device) for device in devices]
            # Otherwise copies would queue up, each with its numbers.
            jax.block_until_ready(pieces)
            del numbers
        return jax.make_array_from_single_device_arrays(parameter.shape, sharding, pieces)

    return _tree({parameter.path: load(parameter) for parameter in parameters(checkpoint.arch, mesh.shape[TENSOR])})


def dummy_params(arch: Architecture, mesh: Mesh, dtype: Any, seed: int = 0) -> Params:
    """Random weights on `mesh`, made by its devices; the same model at any tp.

    Raises:
        ValueError: the mesh's tp does not fit the architecture.
    """
    whole = {parameter.path: parameter.shape for parameter in parameters(arch, 1)}
    programs: dict[Any, Any] = {}  # One per shape, not one per parameter.

    def make(parameter: Parameter) -> jax.Array:
        kind = (parameter.shape, parameter.axes, parameter.fill)
        if kind not in programs:
            program = functools.partial(_dummy, parameter, whole[parameter.path], dtype)
            programs[kind] = jax.jit(program, out_shardings=sharding_of(parameter.axes, mesh))
        return programs[kind](np.uint32(seed % 2**32), np.uint32(zlib.crc32(repr(parameter.path).encode())))

    return _tree({parameter.path: make(parameter) for parameter in parameters(arch, mesh.shape[TENSOR])})


def tensors_of(arch: Architecture, params: Params) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face checkpoint that hold these parameters, which are those of tp = 1."""
    values = nnx.traversals.flatten_mapping(params)
    return {
        name: tensor
        for parameter in parameters(arch, 1)
        for name, tensor in zip(parameter.names, parameter.split(np.asarray(values[parameter.path])), strict=True)
    }


def _dummy(parameter: Parameter, whole: tuple[int, ...], dtype: Any, seed: jax.Array, name: jax.Array) -> jax.Array:
    """Made as tp = 1 has it, then widened, so that the model does not depend on tp."""
    if parameter.fill is not None:
        return jnp.full(parameter.shape, parameter.fill, dtype)
    value = random_matrix(jax.random.fold_in(jax.random.key(seed), name), whole, dtype)
    if parameter.axes[0] == "kv_heads":
        heads, group = parameter.shape[0], whole[1] - 2
        q = value[:, :group].reshape(heads, -1, *whole[2:])
        return jnp.concatenate([q, jnp.repeat(value[:, group:], heads // whole[0], axis=0)], axis=1)
    return jnp.pad(value, [(0, to - size) for to, size in zip(parameter.shape, whole, strict=True)])


def _tree(values: Mapping[tuple[str | int, ...], jax.Array]) -> Params:
    return nnx.traversals.unflatten_mapping(dict(values))


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory for numbers on their way to a device; when large, pages of its own.

    They go back to the system at once, where the heap would keep holes between what stays. A CPU device takes them over
    as they are.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < 2**20:
        return np.empty(shape, dtype)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)


def _check_tensors(folder: Path, arch: Architecture, tensors: Mapping[str, StoredTensor]) -> None:
    wanted = {
        name: shape
        for parameter in parameters(arch, 1)
        for name, shape in zip(parameter.names, parameter.tensor_shapes(), strict=True)
    }
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(f"{folder}: tensor {missing[0]} is missing{_and_more(missing)}")
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(f"{tensor.file}: tensor {name} has type {tensor.dtype}; supported are {known}")
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}"
            )
    # Tied output weights are often stored a second time.
    ignored = (*IGNORED, "lm_head.weight") if arch.tie_embeddings else IGNORED
    if unknown := [name for name in tensors if name not in wanted and not name.endswith(ignored)]:
        raise ValueError(
            f"{tensors[unknown[0]].file}: tensor {unknown[0]} has no place in the model that config.json describes"
            f"{_and_more(unknown)}"
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if names[1:] else ""


__all__ = [
    "CHECKOUT",
    "Checkpoint",
    "bytes_to_read",
    "dummy_params",
    "find_folder",
    "load_params",
    "open_checkpoint",
    "read_header",
    "tensors_of",
]
