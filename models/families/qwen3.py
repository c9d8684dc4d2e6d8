"""Qwen3: Qwen2 without biases, with norms over each head of query and key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture
from models.families import llama, qwen2
from models.families.reading import integer

CLASS_NAME = "Qwen3ForCausalLM"
weight_names = llama.weight_names


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Qwen3 config.json."""
    return llama.architecture(
        config,
        family="qwen3",
        head_dim=integer(config, "head_dim", 128),
        max_positions=integer(config, "max_position_embeddings", 32768),
        query_key_norm=True,
        layer_kinds=qwen2.windowed_above(config),
    )
