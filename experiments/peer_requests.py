"""Serve the unequal requests of a case file with vLLM, as experiments.bench_engine does with this engine.

PEER/bin/python -m experiments.peer_requests --model=FOLDER --cases=cases.json --out=peer.json

Runs in an environment that has vLLM and need not have this project: only Python's own library is used beside it. The
prompts are the same tokens, all given at once; outputs are greedy and go past the end token; an eighth of as many, with
four tokens each, warms up. OUT gets `cases` with total_seconds, total_tokens_per_s and output_tokens_per_s, medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

from experiments.engine_cases import Mixed, read_cases

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "auto",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""On a CPU: every core, and no network. Read when vLLM is imported; a caller's own values win."""


def measure(model: Any, parameters: Any, case: Mixed, vocab: int, repeats: int, seed: int) -> dict[str, Any]:
    """The case with its times."""

    def seconds(prompts: list[list[int]], counts: list[int]) -> float:
        options = [
            parameters(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False) for count in counts
        ]  # fmt: skip
        start = time.perf_counter()
        found = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)
        took = time.perf_counter() - start
        if any(len(one.outputs[0].token_ids) != count for one, count in zip(found, counts, strict=True)):
            raise RuntimeError(f"case {case.name}: an output has not as many tokens as it was asked for")
        return took

    warm_up, batch = case.prompts(vocab, seed)
    seconds(warm_up, [min(count, 4) for count in case.output_tokens[: len(warm_up)]])
    return case.results([seconds(batch, case.output_tokens) for _ in range(repeats)])


def main() -> None:
    """Measure every case that is a list of requests, print and write the results."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", required=True, help="Hugging Face folder")
    arguments.add_argument("--cases", type=Path, required=True)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("--repeats", type=int, default=3)
    given = arguments.parse_args()
    cases = read_cases(given.cases)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    vllm = importlib.import_module("vllm")
    model = vllm.LLM(given.model, dtype=given.dtype, enable_prefix_caching=False)
    vocab = model.llm_engine.vllm_config.model_config.get_vocab_size()
    results = []
    for seed, case in enumerate(cases):  # the seed is the place in the file, as in bench_engine
        if isinstance(case, Mixed):
            results.append(measure(model, vllm.SamplingParams, case, vocab, given.repeats, seed))
            print({name: value for name, value in results[-1].items() if name.endswith("per_s")}, flush=True)
    record = {"vllm": vllm.__version__, "dtype": given.dtype, "cases": results}
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
