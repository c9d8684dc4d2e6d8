"""The families of checkpoints that are understood: one short file each, and the way to find it.

A family says two things: how its config.json reads as an `Architecture`, and under which names a Hugging Face
checkpoint keeps each parameter. docs/families.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_jax.architecture import Architecture
from models.families import gemma2, gemma3, gpt2, llama, mistral, mixtral, opt, qwen2, qwen3, qwen3_moe
from models.families.reading import InOut, WeightNames

FAMILIES = {
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "opt": opt,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}
"""By `model_type` in config.json."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a checkpoint's config.json describes.

    Raises:
        ValueError: a family, a field or a variant that is not supported; one sentence naming it.
    """
    known = ", ".join(f"{family.CLASS_NAME} ({name})" for name, family in FAMILIES.items())
    model_type, classes = config.get("model_type"), config.get("architectures")
    for name, family in FAMILIES.items():
        if family.CLASS_NAME in classes if classes else model_type == name:
            return family.architecture(config)
    raise ValueError(f"the model is a {(classes or [model_type])[0]}, which is not supported; known are {known}")


def prefix(arch: Architecture) -> str:
    """What stands before all names but the output weights'; files of the model without its head leave it out."""
    return getattr(FAMILIES[arch.family], "PREFIX", "model.")


def weight_names(arch: Architecture) -> WeightNames:
    """The names in a checkpoint of every parameter: several where parameters are held as one array."""
    return FAMILIES[arch.family].weight_names(arch)


__all__ = ["FAMILIES", "InOut", "WeightNames", "architecture_of", "prefix", "weight_names"]
