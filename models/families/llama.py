"""Llama 2 and 3: RMS norms, rotary positions, grouped-query attention, a gated MLP, no biases.

Most later families are Llama with a few changes: they start from what is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture, LayerKind
from models.families.reading import WeightNames, activation, integer, number, rope

CLASS_NAME = "LlamaForCausalLM"


def architecture(config: Mapping[str, Any], **changes: Any) -> Architecture:
    """The architecture of a Llama config.json, or of one that is like it but for some fields of Architecture."""
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    bias = bool(config.get("attention_bias", False))
    fields: dict[str, Any] = {
        "family": "llama",
        "vocab_size": integer(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": integer(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": integer(config, "num_key_value_heads", heads),
        "head_dim": integer(config, "head_dim", hidden // heads),
        "max_positions": integer(config, "max_position_embeddings", 2048),
        "norm_eps": number(config, "rms_norm_eps", 1e-6),
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    fields |= changes
    # Read only where the family does not have them elsewhere: what it does not have must not be asked for.
    if "intermediate_size" not in fields:
        fields["intermediate_size"] = integer(config, "intermediate_size")
    if "activation" not in fields:
        fields["activation"] = activation(config, "hidden_act", "silu")
    if "layer_kinds" not in fields:
        fields["layer_kinds"] = (LayerKind(**rope(config)),)
    return Architecture(**fields)


def weight_names(arch: Architecture) -> WeightNames:
    """Where a Llama checkpoint keeps each parameter, and those of the families that are like it."""
    names: WeightNames = {
        ("embedding",): ("model.embed_tokens.weight",),
        ("final_norm", "weight"): ("model.norm.weight",),
    }
    if not arch.tie_embeddings:
        names["head",] = ("lm_head.weight",)
    for layer in range(arch.num_layers):
        at = f"model.layers.{layer}."
        qkv = [at + f"self_attn.{part}_proj." for part in "qkv"]
        block: WeightNames = {
            ("attention_norm", "weight"): (at + "input_layernorm.weight",),
            ("attention", "qkv"): tuple(name + "weight" for name in qkv),
            ("attention", "out"): (at + "self_attn.o_proj.weight",),
            ("mlp_norm", "weight"): (at + "post_attention_layernorm.weight",),
        }
        if arch.attention_bias:
            block["attention", "qkv_bias"] = tuple(name + "bias" for name in qkv)
        if arch.attention_output_bias:
            block["attention", "out_bias"] = (at + "self_attn.o_proj.bias",)
        if arch.query_key_norm:
            block["attention", "query_norm", "weight"] = (at + "self_attn.q_norm.weight",)
            block["attention", "key_norm", "weight"] = (at + "self_attn.k_norm.weight",)
        if arch.experts is None:
            up = [at + "mlp.gate_proj.", at + "mlp.up_proj."]
            block["mlp", "up"] = tuple(name + "weight" for name in up)
            block["mlp", "down"] = (at + "mlp.down_proj.weight",)
            if arch.mlp_bias:
                block["mlp", "up_bias"] = tuple(name + "bias" for name in up)
                block["mlp", "down_bias"] = (at + "mlp.down_proj.bias",)
        names |= {("layers", layer, *path): found for path, found in block.items()}
    return names
