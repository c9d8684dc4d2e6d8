"""vLLM as the other side of experiments.beside_vllm: serves batches that come as lines of JSON on its input.

Runs in an environment that has vLLM and need not have this project: only Python's own library is used beside it. The
first answer is {"vllm", "vocab"}; then {"prompts": [[token]], "output_tokens": [count]} is answered by {"seconds"}.
Outputs are greedy and go past the end token. All that vLLM prints goes to the error output.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "auto",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""On a CPU: every core, and no network. Read when vLLM is imported; a caller's own values win."""


def preload_openmp() -> None:
    """Start again with the environment's Intel OpenMP, if there is one: vLLM shares cores better with it."""
    library = Path(sys.prefix, "lib", "libiomp5.so")
    preloaded = os.environ.get("LD_PRELOAD", "")
    if library.exists() and "libiomp" not in preloaded:
        os.environ["LD_PRELOAD"] = f"{library}:{preloaded}".rstrip(":")
        os.execv(sys.executable, sys.orig_argv)


def seconds(model: Any, parameters: Any, prompts: list[list[int]], counts: list[int]) -> float:
    """Serve the prompts, all given at once."""
    options = [parameters(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False) for count in counts]
    start = time.perf_counter()
    found = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)
    took = time.perf_counter() - start
    if any(len(one.outputs[0].token_ids) != count for one, count in zip(found, counts, strict=True)):
        raise RuntimeError("an output has not as many tokens as it was asked for")
    return took


def main() -> None:
    """Answer until the input ends."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", required=True, help="Hugging Face folder")
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("--max_model_len", type=int)
    given = arguments.parse_args()
    preload_openmp()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    vllm = importlib.import_module("vllm")
    model = vllm.LLM(
        given.model, dtype=given.dtype, enable_prefix_caching=False, max_model_len=given.max_model_len
    )  # fmt: skip
    answer({"vllm": vllm.__version__, "vocab": model.llm_engine.vllm_config.model_config.get_vocab_size()})
    for line in sys.stdin:
        job = json.loads(line)
        answer({"seconds": seconds(model, vllm.SamplingParams, job["prompts"], job["output_tokens"])})


if __name__ == "__main__":
    main()
