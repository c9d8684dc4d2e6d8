"""OPT: layer norms, learned positions that start at row 2, a plain MLP, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture
from models.families.reading import WeightNames, activation, integer

CLASS_NAME = "OPTForCausalLM"
POSITION_OFFSET = 2  # Its embedding table was made with rows for padding first, and kept them.


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of an OPT config.json."""
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    if hidden % heads:
        raise ValueError(f"config.json: hidden_size = {hidden} must be divisible by num_attention_heads = {heads}")
    for flag in ("enable_bias", "layer_norm_elementwise_affine"):
        if not config.get(flag, True):
            raise ValueError(f"config.json: {flag} = false is not supported; it must be true")
    norm_first = bool(config.get("do_layer_norm_before", True))
    return Architecture(
        family="opt",
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=integer(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=integer(config, "ffn_dim"),
        max_positions=integer(config, "max_position_embeddings", 2048),
        norm="layer",
        norm_eps=1e-5,
        norms="before" if norm_first else "after",
        final_norm=norm_first and not config.get("_remove_final_layer_norm", False),
        activation=activation(config, "activation_function", "relu"),
        gated_mlp=False,
        positions="learned",
        position_offset=POSITION_OFFSET,
        embedding_size=integer(config, "word_embed_proj_dim", hidden),
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
    )


def weight_names(arch: Architecture) -> WeightNames:
    """Where an OPT checkpoint keeps each parameter."""
    decoder = "model.decoder."
    names: WeightNames = {
        ("embedding",): (decoder + "embed_tokens.weight",),
        ("positions",): (decoder + "embed_positions.weight",),
    }
    if arch.token_width != arch.hidden_size:
        names["project_in",] = (decoder + "project_in.weight",)
        names["project_out",] = (decoder + "project_out.weight",)
    if arch.final_norm:
        names |= _both(("final_norm",), "weight", "bias", decoder + "final_layer_norm.")
    if not arch.tie_embeddings:
        names["head",] = ("lm_head.weight",)
    for layer in range(arch.num_layers):
        at, path = f"{decoder}layers.{layer}.", ("layers", layer)
        qkv = [at + f"self_attn.{part}_proj." for part in "qkv"]
        names |= _both((*path, "attention_norm"), "weight", "bias", at + "self_attn_layer_norm.")
        names |= _both((*path, "attention"), "qkv", "qkv_bias", *qkv)
        names |= _both((*path, "attention"), "out", "out_bias", at + "self_attn.out_proj.")
        names |= _both((*path, "mlp_norm"), "weight", "bias", at + "final_layer_norm.")
        names |= _both((*path, "mlp"), "up", "up_bias", at + "fc1.")
        names |= _both((*path, "mlp"), "down", "down_bias", at + "fc2.")
    return names


def _both(path: tuple[str | int, ...], weight: str, bias: str, *owners: str) -> WeightNames:
    return {
        (*path, weight): tuple(owner + "weight" for owner in owners),
        (*path, bias): tuple(owner + "bias" for owner in owners),
    }
