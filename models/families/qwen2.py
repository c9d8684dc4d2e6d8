"""Qwen2 and Qwen2.5: Llama with biases of query, key and value, and a window in the upper layers where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture, LayerKind
from models.families import llama
from models.families.reading import integer, layer_kinds, rope

CLASS_NAME = "Qwen2ForCausalLM"
weight_names = llama.weight_names


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Qwen2 config.json."""
    return llama.architecture(
        config,
        family="qwen2",
        max_positions=integer(config, "max_position_embeddings", 32768),
        attention_bias=True,
        attention_output_bias=False,
        layer_kinds=windowed_above(config),
    )


def windowed_above(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    """Layers from max_window_layers on have the window, if there is one."""
    first, layers = config.get("max_window_layers", 28), integer(config, "num_hidden_layers")
    local, full = LayerKind(window(config), **rope(config)), LayerKind(**rope(config))
    return layer_kinds(config, [layer >= first for layer in range(layers)], local, full)


def window(config: Mapping[str, Any]) -> int | None:
    """sliding_window counts only where use_sliding_window is true."""
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return None
    return integer(config, "sliding_window", 4096)
