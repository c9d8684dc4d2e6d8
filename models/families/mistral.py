"""Mistral: Llama with attention to the last tokens only, as many as sliding_window says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture, LayerKind
from models.families import llama
from models.families.reading import integer, rope

CLASS_NAME = "MistralForCausalLM"
weight_names = llama.weight_names


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Mistral config.json."""
    # Null says that there is no window; where the field is absent, transformers takes 4096.
    window = None if config.get("sliding_window", 4096) is None else integer(config, "sliding_window", 4096)
    return llama.architecture(
        config,
        family="mistral",
        max_positions=integer(config, "max_position_embeddings", 4096 * 32),
        layer_kinds=(LayerKind(window, **rope(config)),),
    )
