"""Llama 2 and 3: RMS norms, rotary positions, grouped-query attention, a gated MLP, no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture, LinearScaling, Llama3Scaling, RopeScaling
from models.families.reading import WeightNames, activation, integer, number

CLASS_NAME = "LlamaForCausalLM"


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Llama config.json."""
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    # Older files keep it in two fields, newer ones under rope_parameters.
    rope = {"rope_theta": config.get("rope_theta")}
    rope |= (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    bias = bool(config.get("attention_bias", False))
    return Architecture(
        family="llama",
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=integer(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=integer(config, "num_key_value_heads", heads),
        head_dim=integer(config, "head_dim", hidden // heads),
        intermediate_size=integer(config, "intermediate_size"),
        max_positions=integer(config, "max_position_embeddings", 2048),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        activation=activation(config, "hidden_act", "silu"),
        rope_theta=number(rope, "rope_theta", 10000.0),
        rope_scaling=rope_scaling(rope),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


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
            raise ValueError(f"config.json: rope scaling {other!r} is not supported; known are default, linear, llama3")


def weight_names(arch: Architecture) -> WeightNames:
    """Where a Llama checkpoint keeps each parameter."""
    names: WeightNames = {
        ("embedding",): ("model.embed_tokens.weight",),
        ("final_norm", "weight"): ("model.norm.weight",),
    }
    if not arch.tie_embeddings:
        names["head",] = ("lm_head.weight",)
    for layer in range(arch.num_layers):
        at = f"model.layers.{layer}."
        qkv = [at + f"self_attn.{part}_proj." for part in "qkv"]
        up = [at + "mlp.gate_proj.", at + "mlp.up_proj."]
        block = {
            ("attention_norm", "weight"): (at + "input_layernorm.weight",),
            ("attention", "qkv"): tuple(name + "weight" for name in qkv),
            ("attention", "out"): (at + "self_attn.o_proj.weight",),
            ("mlp_norm", "weight"): (at + "post_attention_layernorm.weight",),
            ("mlp", "up"): tuple(name + "weight" for name in up),
            ("mlp", "down"): (at + "mlp.down_proj.weight",),
        }
        if arch.attention_bias:
            block["attention", "qkv_bias"] = tuple(name + "bias" for name in qkv)
            block["attention", "out_bias"] = (at + "self_attn.o_proj.bias",)
        if arch.mlp_bias:
            block["mlp", "up_bias"] = tuple(name + "bias" for name in up)
            block["mlp", "down_bias"] = (at + "mlp.down_proj.bias",)
        names |= {("layers", layer, *path): found for path, found in block.items()}
    return names
