"""Writing a trained model as a Hugging Face folder, and its training state to go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from ds_jax.architecture import Architecture
from experiments.story.tokenizer import end_id, save_tokenizer
from models.layout import parameters
from models.transformer import Params


def config_json(arch: Architecture, dtype: str, end: int) -> dict[str, Any]:
    """The config.json of a Llama model of this architecture."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.intermediate_size,
        "max_position_embeddings": arch.max_positions,
        "hidden_act": arch.activation,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.kind(0).rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": arch.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def export(folder: Path, arch: Architecture, params: Params, tokenizer: Tokenizer, dtype: str = "bfloat16") -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    end = end_id(tokenizer)
    _write_json(folder / "config.json", config_json(arch, dtype, end))
    _write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": end})
    tensors: dict[str, np.ndarray] = {}
    for parameter in parameters(arch, 1):
        value: Any = params
        for key in parameter.path:
            value = value[key]
        parts = parameter.split(np.asarray(value))
        tensors |= dict(
            zip(parameter.names, (np.ascontiguousarray(part.astype(jnp.dtype(dtype))) for part in parts), strict=True)
        )
    # transformers asks for this note on where the tensors come from.
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder, arch.max_positions)


def save_state(file: Path, step: int, losses: list[float], *trees: Any) -> None:
    """Write the state of a training run; a run that is killed meanwhile leaves the previous file whole."""
    leaves: dict[str, Any] = {f"leaf{number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(trees))}
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, step=step, losses=np.array(losses), **leaves)
    partial.replace(file)


def load_state(file: Path, *trees: Any) -> tuple[int, list[float], tuple[Any, ...]]:
    """Read what `save_state` wrote, into trees of the same structure.

    Raises:
        ValueError: the file is of another model or optimiser.
    """
    leaves, structure = jax.tree.flatten(trees)
    with np.load(file) as saved:
        stored = [saved[f"leaf{number}"] for number in range(len(saved.files) - 2)]
        if [leaf.shape for leaf in stored] != [leaf.shape for leaf in leaves]:
            raise ValueError(f"{file} holds the state of another model; remove it or choose another --output_dir")
        loaded = [jnp.asarray(leaf) for leaf in stored]
        return int(saved["step"]), saved["losses"].tolist(), jax.tree.unflatten(structure, loaded)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
