"""Gemma 3 (text): Gemma 2 with norms of query and key for soft caps, and other rotary positions in local layers.

The 1B checkpoints are this; larger ones hold a vision model too, and are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture, LayerKind
from models.families import gemma2
from models.families.reading import integer, layer_kinds, number, rope, soft_cap

CLASS_NAME = "Gemma3ForCausalLM"
weight_names = gemma2.weight_names


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Gemma 3 text config.json."""
    return gemma2.common(
        config,
        family="gemma3_text",
        max_positions=integer(config, "max_position_embeddings", 131072),
        query_key_norm=True,
        attention_soft_cap=soft_cap(config, "attn_logit_softcapping"),
        logit_soft_cap=soft_cap(config, "final_logit_softcapping"),
        layer_kinds=_kinds(config),
    )


def _kinds(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    """Newer files have rotary fields for each kind of layer; older ones rope_theta, and rope_local_base_freq."""
    every = integer(config, "sliding_window_pattern", 6)
    fields = config.get("rope_parameters") or {}
    old = {name: config.get(name) for name in ("rope_theta", "rope_scaling")}
    local_theta = number(config, "rope_local_base_freq", 10000.0)
    local = rope({"rope_parameters": fields.get("sliding_attention")}, local_theta)
    full = rope(old | {"rope_parameters": fields.get("full_attention")}, 1e6)
    window = integer(config, "sliding_window", 4096)
    return layer_kinds(config, [True] * (every - 1) + [False], LayerKind(window, **local), LayerKind(**full))
