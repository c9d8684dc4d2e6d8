"""Mixtral: Mistral with a mixture of experts in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture, Experts, LayerKind
from models.families import llama
from models.families.reading import WeightNames, expert_names, integer, number, rope

CLASS_NAME = "MixtralForCausalLM"


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Mixtral config.json."""
    window = None if config.get("sliding_window") is None else integer(config, "sliding_window")
    return llama.architecture(
        config,
        family="mixtral",
        max_positions=integer(config, "max_position_embeddings", 4096 * 32),
        norm_eps=number(config, "rms_norm_eps", 1e-5),
        experts=Experts(integer(config, "num_local_experts", 8), integer(config, "num_experts_per_tok", 2)),
        layer_kinds=(LayerKind(window, **rope(config, 1e6)),),
    )


def weight_names(arch: Architecture) -> WeightNames:
    """Where a Mixtral checkpoint keeps each parameter."""
    return llama.weight_names(arch) | expert_names(arch, "block_sparse_moe", gate="w1", up="w3", down="w2")
