"""Gemma 2: Llama with norms on both sides of attention and MLP, soft caps, and a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture, LayerKind
from models.families import llama
from models.families.reading import WeightNames, activation, integer, layer_kinds, number, refuse, rope, soft_cap

CLASS_NAME = "Gemma2ForCausalLM"


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Gemma 2 config.json."""
    window = integer(config, "sliding_window", 4096)
    return common(
        config,
        family="gemma2",
        max_positions=integer(config, "max_position_embeddings", 8192),
        attention_soft_cap=soft_cap(config, "attn_logit_softcapping", 50.0),
        logit_soft_cap=soft_cap(config, "final_logit_softcapping", 30.0),
        layer_kinds=layer_kinds(config, [True, False], LayerKind(window, **rope(config)), LayerKind(**rope(config))),
    )


def common(config: Mapping[str, Any], **fields: Any) -> Architecture:
    """What Gemma 2 and 3 have in common."""
    refuse(config, use_bidirectional_attention=False)
    return llama.architecture(
        config,
        head_dim=integer(config, "head_dim", 256),
        activation=activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        norms="around",
        norm_offset=1.0,
        embedding_scale=integer(config, "hidden_size") ** 0.5,
        query_scalar=number(config, "query_pre_attn_scalar", 256),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        **fields,
    )


def weight_names(arch: Architecture) -> WeightNames:
    """Where a Gemma 2 or 3 checkpoint keeps each parameter."""
    names = llama.weight_names(arch)
    for layer in range(arch.num_layers):
        for norm, name in (
            ("attention_out_norm", "post_attention"),
            ("mlp_norm", "pre_feedforward"),
            ("mlp_out_norm", "post_feedforward"),
        ):
            names["layers", layer, norm, "weight"] = (f"model.layers.{layer}.{name}_layernorm.weight",)
    return names
