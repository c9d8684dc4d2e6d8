"""How the goldens beside this file were made. Tests do not run it: they read what it wrote.

    python make_goldens.py --make_checkpoint=PATH --oracle=PATH [--out=FOLDER]

Needs Python with torch and transformers (5.19 was used), and two programs:

* make_checkpoint.py OUT_DIR --family --hidden --layers --heads ... writes a random Hugging Face checkpoint. Norms and
  biases are random too, so that one left out shows. Parts of it are wrapped here: `make_config(args)`, for the fields
  of config.json that it has no argument for and for families that it does not know (`model_type` among the changes),
  and `random_tensor` and `make_weights`, for the parameters of those.
* oracle.py CHECKPOINT --prompts FILE --max-tokens N --out FILE.npz writes what transformers computes in float32 with
  eager attention: per prompt i, tokens_i (greedy, going on past the end token), top2_margin_i (best minus second best
  logit where each was chosen) and prefill_logits_i [prompt, vocabulary].

The sizes are odd on purpose: a vocabulary that no tp divides, heads whose width together is not the hidden size, KV
heads fewer than tp. They are small so that float32 weights can be committed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

MAX_TOKENS = 12
PROMPT_TOKENS = (1, 9, 37)
VOCAB = 263
LOGIT_STEPS = 2**14
COMMON = {"layers": 2, "vocab": VOCAB, "max-positions": 128}

NOT_OF_OTHERS = ("mlp_bias", "pretraining_tp", "transformers_version")
"""Fields of a Llama config that families made from one do not have."""
EXPERT_NAMES = {
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (arguments, changes to config.json)
    "llama_gqa": (
        {"family": "llama", "hidden": 48, "heads": 4, "kv-heads": 2, "intermediate": 80, "shards": 2},
        {},
    ),
    "llama3_mqa": (
        {"family": "llama", "hidden": 40, "heads": 8, "kv-heads": 1, "head-dim": 12, "intermediate": 72, "tie": True},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama_linear_biases": (
        {"family": "llama", "hidden": 32, "heads": 4, "intermediate": 48, "tie": True},
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "opt": ({"family": "opt", "hidden": 48, "heads": 4, "intermediate": 80}, {}),
    "gpt2": ({"family": "gpt2", "hidden": 40, "heads": 4, "intermediate": 72}, {}),
    "mistral": (
        {"family": "mistral", "hidden": 32, "heads": 8, "kv-heads": 2, "head-dim": 6, "intermediate": 48},
        {"sliding_window": 9},
    ),
    "qwen2": (
        {"family": "qwen2", "hidden": 24, "heads": 4, "intermediate": 56, "tie": True},
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1, "layer_types": None},
    ),
    "qwen3": (
        {"family": "qwen3", "hidden": 32, "heads": 8, "kv-heads": 4, "head-dim": 10, "intermediate": 48, "shards": 3},
        {},
    ),
    "qwen3_moe": (
        {"family": "llama", "hidden": 24, "heads": 4, "kv-heads": 1, "head-dim": 8, "intermediate": 20, "tie": True},
        {
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 20,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "use_sliding_window": False,
        },
    ),
    "mixtral": (
        {"family": "llama", "hidden": 24, "heads": 4, "kv-heads": 2, "intermediate": 28, "tie": True},
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 13},
    ),
    "gemma2": (
        {"family": "llama", "hidden": 32, "heads": 8, "kv-heads": 2, "head-dim": 6, "intermediate": 40, "tie": True},
        {
            "model_type": "gemma2",
            "sliding_window": 8,
            "attn_logit_softcapping": 2.5,
            "final_logit_softcapping": 7.0,
            "query_pre_attn_scalar": 5,
        },
    ),
    "gemma3": (
        {"family": "llama", "hidden": 32, "heads": 4, "kv-heads": 1, "head-dim": 12, "intermediate": 40, "tie": True},
        {
            "model_type": "gemma3_text",
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 10,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    # As OPT-350m: norms after the sums, none at the end, and embeddings narrower than the rest.
    "opt_norm_last": (
        {"family": "opt", "hidden": 32, "heads": 4, "intermediate": 64},
        {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    ),
}


def make_checkpoint(program: Path, folder: Path, arguments: dict[str, Any], changes: dict[str, Any]) -> None:
    spec = importlib.util.spec_from_file_location("make_checkpoint", program)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    original = tool.make_config

    def changed(args: argparse.Namespace) -> Any:
        config = original(args)
        fields = {**config.to_dict(), **changes}
        if "model_type" not in changes:
            return type(config)(**fields)
        for name in NOT_OF_OTHERS:
            fields.pop(name)
        return tool.AutoConfig.for_model(**fields)

    tool.make_config = changed
    tool.random_tensor = functools.partial(random_tensor, tool, tool.random_tensor)
    tool.make_weights = functools.partial(separate_experts, tool.make_weights)
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in {**COMMON, **arguments}.items()]
    sys.argv = [str(program), str(folder), *flags]
    tool.main()


def random_tensor(tool: Any, original: Any, model: Any, name: str, shape: Any, generator: Any) -> Any:
    """A random parameter, of the families too that the program has no rule for."""
    owner = name.rpartition(".")[0]
    if "expert" in name or owner.endswith(("mlp.gate", "block_sparse_moe.gate")):
        # Experts of about the size of an MLP; a router that is seldom in doubt.
        noise = tool.torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return noise * (3.0 if len(shape) == 2 else tool.WRITE_SCALE**0.5)
    weight = original(model, name, shape, generator)
    if model.config.model_type.startswith("gemma") and len(shape) == 1:
        # Stored around zero. Between block and sum stands a norm, so it has to make what is written large enough.
        writes = owner.endswith(("post_attention_layernorm", "post_feedforward_layernorm"))
        return weight * (tool.WRITE_SCALE if writes else 1) - 1
    return weight


def separate_experts(original: Any, config: Any, seed: int) -> Any:
    """Weights under the names of published checkpoints, where each expert has matrices of its own."""
    weights, class_name = original(config, seed)
    block, *parts = EXPERT_NAMES.get(config.model_type, ("mlp",))
    separate = {}
    for name, weight in weights.items():
        before, _, kind = name.partition(".mlp.experts.")
        if not kind:
            separate[name.replace(".mlp.gate.weight", f".{block}.gate.weight")] = weight
            continue
        for number, matrix in enumerate(weight):
            gate, up, down = (f"{before}.{block}.experts.{number}.{part}.weight" for part in parts)
            cut = {gate: matrix.chunk(2)[0], up: matrix.chunk(2)[1]} if kind == "gate_up_proj" else {down: matrix}
            separate |= {name: part.contiguous() for name, part in cut.items()}
    return separate, class_name


def run_oracle(program: Path, folder: Path, outputs: Path, prompt_seed: int = 0) -> None:
    random = np.random.default_rng(prompt_seed)
    prompts = [random.integers(4, VOCAB, length).tolist() for length in PROMPT_TOKENS]
    with tempfile.TemporaryDirectory() as scratch:
        prompts_file, full = Path(scratch, "prompts.json"), Path(scratch, "full.npz")
        prompts_file.write_text(json.dumps(prompts))
        command = [sys.executable, program, folder, "--prompts", prompts_file, "--max-tokens", str(MAX_TOKENS)]
        subprocess.run([*map(str, command), "--out", str(full)], check=True)
        with np.load(full) as arrays:
            kept = {name: arrays[name] for name in arrays.files if not name.startswith("logits_")}
    for name in kept:
        if name.startswith("prefill_logits_"):
            # Digits that no test looks at do not compress. What is left is right to 2 ** -15.
            kept[name] = np.round(kept[name] * LOGIT_STEPS) / np.float32(LOGIT_STEPS)
    np.savez_compressed(outputs, **kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make_checkpoint", type=Path, required=True)
    parser.add_argument("--oracle", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", choices=CASES, nargs="*")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts; the goldens have 0")
    args = parser.parse_args()
    for name, (arguments, changes) in CASES.items():
        if not args.only or name in args.only:
            make_checkpoint(args.make_checkpoint, args.out / name, {"seed": args.seed, **arguments}, changes)
            run_oracle(args.oracle, args.out / name, args.out / f"{name}.npz", args.seed)


if __name__ == "__main__":
    main()
