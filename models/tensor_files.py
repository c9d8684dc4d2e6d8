"""safetensors files: their headers, looked through without reading on, and their numbers, mapped into memory.

A file is the header's length (8 bytes), the header (JSON: type, shape and offsets of each tensor), the numbers. A
folder holds model.safetensors, or several files that model.safetensors.index.json lists.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from models.folder import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}
"""Types of tensors that can be read."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, its name and offset there, its shape and type (as safetensors calls it)."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def view(self, index: tuple[slice, ...]) -> np.ndarray:
        """The numbers that `index` cuts out, as a view of the mapped file.

        Nothing is read before the numbers are copied, and the file's pages leave memory with the last view of them.
        """
        dtype = DTYPES[self.dtype]
        count = math.prod(self.shape)
        begin = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            length = self.offset - begin + count * dtype.itemsize
            pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=begin)
        return np.frombuffer(pages, dtype, count, self.offset - begin).reshape(self.shape)[index]


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its name, from the headers of its files.

    Raises:
        FileNotFoundError: the folder has no weights, or lacks a file.
        ValueError: a file is truncated or broken, or two of them hold the same tensor.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index, "").get("weight_map")
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
        for tensor in read_header(folder / name):
            if tensor.name in found:
                raise ValueError(f"{folder}: tensor {tensor.name} is in {found[tensor.name].file.name} and in {name}")
            found[tensor.name] = tensor
    return found


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, checked against the file's size.

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
        spans = [tuple(entry["data_offsets"]) for entry in header.values()]
        found = [
            StoredTensor(file, name, tuple(entry["shape"]), entry["dtype"], 8 + length + start)
            for (name, entry), (start, _) in zip(header.items(), spans, strict=True)
        ]
        end = 8 + length + max((stop for _, stop in spans), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a broken safetensors header: {error!r}") from None
    if size != end:
        what = "is truncated" if size < end else "is longer than its header says"
        raise ValueError(f"{file} {what}: it has {size} bytes, and its header asks for {end}")
    for tensor, (start, stop) in zip(found, spans, strict=True):
        dtype = DTYPES.get(tensor.dtype)
        if dtype is not None and stop - start != dtype.itemsize * math.prod(tensor.shape):
            raise ValueError(
                f"{file}: tensor {tensor.name} of shape {list(tensor.shape)} has {stop - start} bytes, "
                f"not {dtype.itemsize * math.prod(tensor.shape)}"
            )
    return found
