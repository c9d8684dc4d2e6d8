"""Reading Hugging Face checkpoints: all is checked before anything large is read, and each device reads its own part.

A folder holds config.json, generation_config.json (optional), and the weights in model.safetensors, or in several
files that model.safetensors.index.json lists.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import safe_open

from ds_jax.architecture import DTYPE_BYTES, Architecture
from models.families import architecture_of
from models.layout import Parameter, parameters
from models.sharding import TENSOR, sharding_of
from models.transformer import Params, random_matrix

CHECKOUT = Path(__file__).resolve().parent.parent
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SAFETENSORS_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""Types of tensors that can be read."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, its name there, its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been looked through but not read."""

    folder: Path
    arch: Architecture
    dtype: str
    """The type that config.json names: float32, bfloat16 or float16."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a text."""
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Every tensor by name; empty where the weights are dummies."""


def open_checkpoint(path: str | Path, load_format: str = "safetensors") -> Checkpoint:
    """Look through a checkpoint: the config, and the headers of its weight files.

    Args:
        path: the folder; where it does not exist, it is taken relative to the checkout.
        load_format: "safetensors", or "dummy", which needs config.json only.

    Raises:
        FileNotFoundError: no such folder, or a file missing from it.
        ValueError: something unsupported, a truncated file, a tensor that is missing or has the wrong shape.
    """
    folder = find_folder(path)
    config = _read_json(folder / "config.json", "a Hugging Face folder has one")
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise ValueError(f"{folder}: the weights are quantised ({method}), which is not supported")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{folder}: dtype = {dtype!r} is not supported; known are {', '.join(DTYPE_BYTES)}")
    try:
        arch = architecture_of(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    tensors: dict[str, StoredTensor] = {}
    if load_format == "safetensors":
        tensors = _find_tensors(folder)
        _check_tensors(folder, arch, tensors)
    elif load_format != "dummy":
        raise ValueError(f"load_format = {load_format!r} must be safetensors or dummy")
    return Checkpoint(folder, arch, dtype, _eos_token_ids(folder, config), tensors)


def load_params(checkpoint: Checkpoint, mesh: Mesh, dtype: Any) -> Params:
    """Read the weights onto `mesh`, each device its own slices.

    Args:
        checkpoint: an opened checkpoint with tensors.
        mesh: of one instance, from `models.sharding.make_mesh`.
        dtype: what the weights are cast to.

    Returns:
        The parameters as nested dicts of sharded arrays, as `models.transformer.abstract_params` describes them.

    Raises:
        ValueError: the mesh's tp does not fit the architecture.
    """
    files: dict[Path, Any] = {}

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = checkpoint.tensors[name]
        if tensor.file not in files:
            files[tensor.file] = safe_open(tensor.file, framework="numpy")
        return np.asarray(files[tensor.file].get_slice(tensor.name)[index])

    def load(parameter: Parameter) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return parameter.join(index, read).astype(jnp.dtype(dtype))

        return jax.make_array_from_callback(parameter.shape, sharding_of(parameter.axes, mesh), part)

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


def find_folder(path: str | Path) -> Path:
    """The folder as given, or else under the checkout.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    given = Path(path).expanduser()
    for folder in (given, CHECKOUT / given):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"model.path = {str(path)!r}: there is no such folder, here or in {CHECKOUT}")


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


def _read_json(file: Path, hint: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent} has no {file.name}: {hint}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


def _eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    value = _read_json(generation, "").get("eos_token_id") if generation.is_file() else None
    value = config.get("eos_token_id") if value is None else value
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise ValueError(f"{folder}: eos_token_id = {value!r} must be a token id or a list of them")
    return tuple(ids)


def _find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder, from the headers of its files."""
    index = folder / INDEX
    if index.is_file():
        weight_map = _read_json(index, "").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        files = sorted({str(name) for name in weight_map.values()})
    elif (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        raise FileNotFoundError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}")
    found: dict[str, StoredTensor] = {}
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file of its folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, which {INDEX} lists")
        found |= {tensor.name: tensor for tensor in read_header(folder / name)}
    # Older checkpoints of the bare decoder lack the prefix.
    if not any(name.startswith("model.") for name in found):
        found = {name if name.startswith("lm_head.") else "model." + name: tensor for name, tensor in found.items()}
    return found


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, checked against the file's size.

    A file is the header's length (8 bytes), the header (JSON: type, shape and offsets of each tensor), the numbers.

    Raises:
        ValueError: truncated, or not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{file} is truncated or no safetensors file: its header asks for {length} of {size} bytes"
            )
        text = opened.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = [StoredTensor(file, name, tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()]
        spans = [tuple(entry["data_offsets"]) for entry in header.values()]
        end = 8 + length + max((stop for _, stop in spans), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a broken safetensors header: {error!r}") from None
    if size != end:
        what = "is truncated" if size < end else "is longer than its header says"
        raise ValueError(f"{file} {what}: it has {size} bytes, and its header asks for {end}")
    for tensor, (start, stop) in zip(found, spans, strict=True):
        width = SAFETENSORS_BYTES.get(tensor.dtype)
        if width is not None and stop - start != width * math.prod(tensor.shape):
            raise ValueError(
                f"{file}: tensor {tensor.name} of shape {list(tensor.shape)} has {stop - start} bytes, "
                f"not {width * math.prod(tensor.shape)}"
            )
    return found


def _check_tensors(folder: Path, arch: Architecture, tensors: Mapping[str, StoredTensor]) -> None:
    for parameter in parameters(arch, 1):
        for name, shape in zip(parameter.names, parameter.tensor_shapes(), strict=True):
            tensor = tensors.get(name)
            if tensor is None:
                raise ValueError(f"{folder}: tensor {name} is missing")
            if tensor.dtype not in SAFETENSORS_BYTES:
                known = ", ".join(SAFETENSORS_BYTES)
                raise ValueError(f"{tensor.file}: tensor {name} has type {tensor.dtype}; supported are {known}")
            if tensor.shape != shape:
                raise ValueError(
                    f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, "
                    f"but config.json asks for {list(shape)}"
                )
