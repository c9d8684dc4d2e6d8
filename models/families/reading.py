"""Reading fields of a config.json with errors that name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_jax.architecture import LayerKind, LinearScaling, Llama3Scaling, RopeScaling


@dataclass(frozen=True)
class InOut:
    """The name of a matrix that the checkpoint keeps as [in, out]; others are [out, in]."""

    name: str


WeightNames = dict[tuple[Any, ...], tuple[str | InOut, ...]]
"""Path of a parameter in the module -> its names in the checkpoint, in the order in which they are joined.

A tensor that holds several of the parts (query, key and value in one) is named once for each: it holds them in this
order, along its outputs.
"""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
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


def cap(config: Mapping[str, Any], name: str, default: float | None = None) -> float | None:
    """A soft cap of config.json; None where it is null."""
    value = config.get(name, default)
    return None if value is None else number(config, name, default)


def refuse(config: Mapping[str, Any], **expected: Any) -> None:
    """Refuse fields that change the model in a way that is not supported; absent and null ones are as expected."""
    for name, value in expected.items():
        found = config.get(name)
        if found is not None and found != value:
            raise ValueError(f"config.json: {name} = {found!r} is not supported; it must be {value!r}")


def layer_kinds(
    config: Mapping[str, Any], theta: float, window: int | None, local: list[bool]
) -> tuple[LayerKind, ...]:
    """The kinds of the layers: `local` says of each layer (or of a repeating pattern) whether it has the window.

    Newer files say it themselves, in layer_types. Rotary positions are the same in all.
    """
    types = config.get("layer_types")
    if types is not None:
        for name in types:
            if name not in ("sliding_attention", "full_attention"):
                known = "sliding_attention, full_attention"
                raise ValueError(f"config.json: layer_types has {name!r}, which is not supported; known are {known}")
        if len(types) != integer(config, "num_hidden_layers"):
            raise ValueError(
                f"config.json: layer_types has {len(types)} entries for {config['num_hidden_layers']} layers"
            )
        local = [name == "sliding_attention" for name in types]
    rope = rope_fields(config)
    base = number(rope, "rope_theta", theta), rope_scaling(rope)
    kinds = tuple(LayerKind(window if here else None, *base) for here in local)
    return kinds[:1] if len(set(kinds)) == 1 else kinds


def rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says about rotary positions: older files in two fields, newer ones under rope_parameters."""
    fields = {"rope_theta": config.get("rope_theta"), "partial_rotary_factor": config.get("partial_rotary_factor")}
    fields |= (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    refuse(fields, partial_rotary_factor=1.0)
    return fields


def rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    """How config.json stretches positions; None where it does not."""
    match rope.get("rope_type") or rope.get("type") or "default":
        case "default":
            return None
        case "linear":
            return LinearScaling(number(rope, "factor"))
        case "llama3":
            return Llama3Scaling(
                factor=number(rope, "factor"),
                low_frequency_factor=number(rope, "low_freq_factor"),
                high_frequency_factor=number(rope, "high_freq_factor"),
                original_max_positions=integer(rope, "original_max_position_embeddings"),
            )
        case other:
            known = "default, linear, llama3"
            raise ValueError(f"config.json: rope_scaling.rope_type = {other!r} is not supported; known are {known}")
