"""GPT-2: layer norms, learned positions, a plain MLP, biases everywhere, matrices kept as [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture
from models.families.reading import InOut, WeightNames, activation, integer, number, refuse

CLASS_NAME = "GPT2LMHeadModel"
PREFIX = "transformer."


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a GPT-2 config.json."""
    hidden, heads = integer(config, "n_embd", 768), integer(config, "n_head", 12)
    if hidden % heads:
        raise ValueError(f"config.json: n_embd = {hidden} must be divisible by n_head = {heads}")
    refuse(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return Architecture(
        family="gpt2",
        vocab_size=integer(config, "vocab_size", 50257),
        hidden_size=hidden,
        num_layers=integer(config, "n_layer", 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=integer(config, "n_inner", 4 * hidden),
        max_positions=integer(config, "n_positions", 1024),
        norm="layer",
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        activation=activation(config, "activation_function", "gelu_new"),
        gated_mlp=False,
        positions="learned",
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
    )


def weight_names(arch: Architecture) -> WeightNames:
    """Where a GPT-2 checkpoint keeps each parameter."""
    names: WeightNames = {
        ("embedding",): (PREFIX + "wte.weight",),
        ("positions",): (PREFIX + "wpe.weight",),
        ("final_norm", "weight"): (PREFIX + "ln_f.weight",),
        ("final_norm", "bias"): (PREFIX + "ln_f.bias",),
    }
    if not arch.tie_embeddings:
        names["head",] = ("lm_head.weight",)
    for layer in range(arch.num_layers):
        at, path = f"{PREFIX}h.{layer}.", ("layers", layer)
        for norm, name in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            names[(*path, norm, "weight")] = (f"{at}{name}.weight",)
            names[(*path, norm, "bias")] = (f"{at}{name}.bias",)
        for block, part, name, parts in (
            ("attention", "qkv", "attn.c_attn", 3),  # Query, key and value in one tensor
            ("attention", "out", "attn.c_proj", 1),
            ("mlp", "up", "mlp.c_fc", 1),
            ("mlp", "down", "mlp.c_proj", 1),
        ):
            names[(*path, block, part)] = (InOut(f"{at}{name}.weight"),) * parts
            names[(*path, block, part + "_bias")] = (f"{at}{name}.bias",) * parts
    return names
