"""How the goldens beside this file were made. Tests do not run it: they read what it wrote.

    python make_goldens.py --make_checkpoint=PATH --oracle=PATH [--out=FOLDER]

Needs Python with torch and transformers (5.19 was used), and two programs:

* make_checkpoint.py OUT_DIR --family --hidden --layers --heads ... writes a random Hugging Face checkpoint. Norms and
  biases are random too, so that one left out shows. Its `make_config(args)` is wrapped here, for the fields of
  config.json that it has no argument for.
* oracle.py CHECKPOINT --prompts FILE --max-tokens N --out FILE.npz writes what transformers computes in float32 with
  eager attention: per prompt i, tokens_i (greedy, going on past the end token), top2_margin_i (best minus second best
  logit where each was chosen) and prefill_logits_i [prompt, vocabulary].

The sizes are odd on purpose: a vocabulary that no tp divides, heads whose width together is not the hidden size, KV
heads fewer than tp. They are small so that float32 weights can be committed.
"""

from __future__ import annotations

import argparse
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
COMMON = {"layers": 2, "vocab": VOCAB, "max-positions": 128}

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
        return type(config)(**{**config.to_dict(), **changes})

    tool.make_config = changed
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in {**COMMON, **arguments}.items()]
    sys.argv = [str(program), str(folder), *flags]
    tool.main()


def run_oracle(program: Path, folder: Path, outputs: Path) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(4, VOCAB, length).tolist() for length in PROMPT_TOKENS]
    with tempfile.TemporaryDirectory() as scratch:
        prompts_file, full = Path(scratch, "prompts.json"), Path(scratch, "full.npz")
        prompts_file.write_text(json.dumps(prompts))
        command = [sys.executable, program, folder, "--prompts", prompts_file, "--max-tokens", str(MAX_TOKENS)]
        subprocess.run([*map(str, command), "--out", str(full)], check=True)
        with np.load(full) as arrays:
            kept = {name: arrays[name] for name in arrays.files if not name.startswith("logits_")}
    np.savez_compressed(outputs, **kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make_checkpoint", type=Path, required=True)
    parser.add_argument("--oracle", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", choices=CASES)
    args = parser.parse_args()
    for name, (arguments, changes) in CASES.items():
        if args.only in (None, name):
            make_checkpoint(args.make_checkpoint, args.out / name, arguments, changes)
            run_oracle(args.oracle, args.out / name, args.out / f"{name}.npz")


if __name__ == "__main__":
    main()
