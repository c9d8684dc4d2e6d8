"""What a Hugging Face folder says about its model before any weight is looked at (no jax).

config.json gives the architecture and the type of the weights, generation_config.json (optional) the end tokens and
how its makers sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_jax.architecture import DTYPE_BYTES, Architecture
from models.families import architecture_of

if TYPE_CHECKING:
    from models.tensor_files import StoredTensor

CHECKOUT = Path(__file__).resolve().parent.parent
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of generation_config.json that are taken up."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been looked through but not read."""

    folder: Path
    arch: Architecture
    dtype: str
    """The type that config.json names: float32, bfloat16 or float16."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text."""
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    """What a request that does not say otherwise should sample with; empty where the model's makers say nothing."""
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Every tensor by name; empty where only the configs were read."""


def read_configs(path: str | Path) -> Checkpoint:
    """Read the configs of a Hugging Face folder.

    Args:
        path: the folder; where it does not exist, it is taken relative to the checkout.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: broken or unsupported; one sentence with the file, the field and its value.
    """
    folder = find_folder(path)
    config = read_json(folder / "config.json", "a Hugging Face folder has one")
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise ValueError(f"{folder}: quantization_config: the weights are quantised ({method}), which is not supported")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{folder}: dtype = {dtype!r} is not supported; known are {', '.join(DTYPE_BYTES)}")
    try:
        arch = architecture_of(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    generation = {}
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json", "")
    eos_token_ids = _eos_token_ids(folder, config, generation)
    return Checkpoint(folder, arch, dtype, eos_token_ids, _sampling(folder, generation))


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


def read_json(file: Path, hint: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: no such file; ends in `hint`.
        ValueError: no JSON, or no object.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent} has no {file.name}: {hint}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


def _eos_token_ids(folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id")
    value = config.get("eos_token_id") if value is None else value
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise ValueError(f"{folder}: eos_token_id = {value!r} must be a token id or a list of them")
    return tuple(ids)


def _sampling(folder: Path, generation: Mapping[str, Any]) -> dict[str, float]:
    """Without do_sample a model's makers decode greedily, and what else stands there is not in use, but the penalty."""
    found: dict[str, float] = {}
    for name in SAMPLING_DEFAULTS:
        value = generation.get(name)
        if value is None or not (generation.get("do_sample") or name == "repetition_penalty"):
            continue
        if not isinstance(value, int if name == "top_k" else int | float) or isinstance(value, bool) or value < 0:
            kind = "whole number" if name == "top_k" else "number"
            raise ValueError(f"{folder / 'generation_config.json'}: {name} = {value!r} must be a {kind} of at least 0")
        found[name] = value
    return found
