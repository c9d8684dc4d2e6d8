"""Reading fields of a config.json with errors that name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WeightNames = dict[tuple[Any, ...], tuple[str, ...]]
"""Path of a parameter in the module -> its names in the checkpoint, in the order in which they are joined."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of config.json; `default` where it is absent or null."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {name} = {value!r} must be a whole number of at least 1")
    return value


def number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number of config.json; `default` where it is absent or null."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"config.json: {name} = {value!r} must be a number greater than 0")
    return float(value)


def activation(config: Mapping[str, Any], name: str, default: str) -> Any:
    """The activation named in config.json, by our name for it."""
    value = config.get(name) or default
    if value not in ACTIVATIONS:
        raise ValueError(f"config.json: {name} = {value!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]
