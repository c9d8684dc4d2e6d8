"""Qwen3 with a mixture of experts in each layer (Qwen3-30B-A3B, Qwen3-235B-A22B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture, Experts, LayerKind
from models.families import llama, qwen2
from models.families.reading import WeightNames, expert_names, integer, refuse, rope

CLASS_NAME = "Qwen3MoeForCausalLM"


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Qwen3-MoE config.json."""
    refuse(config, decoder_sparse_step=1, mlp_only_layers=[])  # Layers with a plain MLP between the others
    return llama.architecture(
        config,
        family="qwen3_moe",
        intermediate_size=integer(config, "moe_intermediate_size", 768),
        max_positions=integer(config, "max_position_embeddings", 32768),
        query_key_norm=True,
        experts=Experts(
            integer(config, "num_experts" if "num_experts" in config else "num_local_experts", 128),
            integer(config, "num_experts_per_tok", 8),
            normalised=bool(config.get("norm_topk_prob", False)),
        ),
        layer_kinds=(LayerKind(qwen2.window(config), **rope(config)),),
    )


def weight_names(arch: Architecture) -> WeightNames:
    """Where a Qwen3-MoE checkpoint keeps each parameter."""
    return llama.weight_names(arch) | expert_names(arch, "mlp", gate="gate_proj", up="up_proj", down="down_proj")
