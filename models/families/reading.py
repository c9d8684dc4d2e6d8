"""Reading fields of a config.json with errors that name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_jax.architecture import Architecture, LayerKind, LinearScaling, Llama3Scaling, RopeScaling


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


def soft_cap(config: Mapping[str, Any], name: str, default: float | None = None) -> float | None:
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
    config: Mapping[str, Any], pattern: list[bool], local: LayerKind, full: LayerKind
) -> tuple[LayerKind, ...]:
    """The kinds of the layers, where some are `local` (with a window) and the others `full`.

    Args:
        config: newer files say in layer_types which are which.
        pattern: whether each layer is local, repeating; what holds where the file does not say it.
        local, full: the two kinds; if they are equal, the answer is that one.
    """
    types = config.get("layer_types")
    if types is not None:
        known = "sliding_attention", "full_attention"
        if unknown := [name for name in types if name not in known]:
            listed = ", ".join(known)
            raise ValueError(f"config.json: layer_types has {unknown[0]!r}, which is not supported; known are {listed}")
        layers = integer(config, "num_hidden_layers")
        if len(types) != layers:
            raise ValueError(f"config.json: layer_types has {len(types)} entries for num_hidden_layers = {layers}")
        pattern = [name == "sliding_attention" for name in types]
    kinds = tuple(local if here else full for here in pattern)
    return kinds[:1] if len(set(kinds)) == 1 else kinds


def rope(config: Mapping[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    """The rotary fields of LayerKind: older files have two fields for them, newer ones rope_parameters."""
    fields = {"rope_theta": config.get("rope_theta"), "partial_rotary_factor": config.get("partial_rotary_factor")}
    fields |= (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    refuse(fields, partial_rotary_factor=1.0)
    return {"rope_theta": number(fields, "rope_theta", theta), "rope_scaling": rope_scaling(fields)}


def rope_scaling(fields: Mapping[str, Any]) -> RopeScaling | None:
    """How config.json stretches positions; None where it does not."""
    match fields.get("rope_type") or fields.get("type") or "default":
        case "default":
            return None
        case "linear":
            return LinearScaling(number(fields, "factor"))
        case "llama3":
            return Llama3Scaling(
                factor=number(fields, "factor"),
                low_frequency_factor=number(fields, "low_freq_factor"),
                high_frequency_factor=number(fields, "high_freq_factor"),
                original_max_positions=integer(fields, "original_max_position_embeddings"),
            )
        case other:
            known = "default, linear, llama3"
            raise ValueError(f"config.json: rope_scaling.rope_type = {other!r} is not supported; known are {known}")


def expert_names(arch: Architecture, block: str, *, gate: str, up: str, down: str) -> WeightNames:
    """The names of routers and experts, where each expert is an MLP of its own: `{block}.experts.7.{up}.weight`."""
    assert arch.experts is not None
    names: WeightNames = {}
    for layer in range(arch.num_layers):
        at, path = f"model.layers.{layer}.{block}.", ("layers", layer, "mlp")
        experts = [f"{at}experts.{number}." for number in range(arch.experts.count)]
        names[(*path, "router")] = (at + "gate.weight",)
        names[(*path, "up")] = tuple(f"{expert}{name}.weight" for expert in experts for name in (gate, up))
        names[(*path, "down")] = tuple(f"{expert}{down}.weight" for expert in experts)
    return names
