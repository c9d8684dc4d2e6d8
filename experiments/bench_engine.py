"""Measure the offline engine on batches of random prompts of fixed lengths.

python -m experiments.bench_engine --config=configs/offline_cpu.py --cases=cases.json --output_dir=out/bench

CASES.json is a list of {"name", "batch", "prompt_tokens", "output_tokens"}. All prompts of a case are given at once;
outputs are greedy and go past the end token. Each case is warmed up with other prompts, then measured --repeats times
with one output token each (prefill) and with all of them (total). OUTPUT_DIR gets summary.json with `cases`, medians of
each: prefill_seconds, total_seconds, prefill_tokens_per_s, and decode_tokens_per_s: the output tokens after the first
over total - prefill; beside a roofline from the copy and matmul rates measured in the same run. And config.json.
"""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import TYPE_CHECKING, Any

from absl import flags
from tqdm import tqdm

from ds_jax.architecture import DTYPE_BYTES, Architecture
from ds_jax.flags import define_config, load_config, run
from experiments.ceilings import Ceilings, measure
from experiments.engine_cases import Case, read_cases
from experiments.output import Output, table

if TYPE_CHECKING:
    from ds_jax.engine import Engine, Update

define_config(default_file="configs/offline_cpu.py")
_CASES = flags.DEFINE_string("cases", None, "JSON list of cases.", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements of each case.", 1)


class Bench:
    """An engine that serves nobody else."""

    def __init__(self, engine: Engine, updates: SimpleQueue[list[Update]]):
        self.engine, self._updates = engine, updates

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """From the first submission to the last token."""
        from ds_jax.sampling import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        missing = {id: tokens for prompt in prompts for id in self.engine.submit(prompt, params)}
        while missing:
            for update in self._updates.get():
                missing[update.sequence] -= len(update.token_ids)
                if update.finish_reason is not None and missing.pop(update.sequence):
                    raise RuntimeError(f"a sequence ended early: {update.finish_reason} {update.error or ''}")
        return time.perf_counter() - start

    def measure(self, case: Case, vocab: int, repeats: int, seed: int) -> dict[str, Any]:
        """The case with its times."""
        generator = random.Random(seed)

        def prompts() -> list[list[int]]:
            return [[generator.randrange(vocab) for _ in range(case.prompt_tokens)] for _ in range(case.batch)]

        warm_up, batch = prompts(), prompts()
        self.seconds(warm_up, min(case.output_tokens, 4))
        prefills, totals = [], []
        for _ in range(repeats):
            prefills.append(self.seconds(batch, 1))
            totals.append(self.seconds(batch, case.output_tokens))
        prefill, total = median(prefills), median(totals)
        decoded = case.batch * (case.output_tokens - 1)
        return {
            **dataclasses.asdict(case),
            "prefill_seconds": prefill,
            "total_seconds": total,
            "prefill_tokens_per_s": case.batch * case.prompt_tokens / prefill,
            "decode_tokens_per_s": decoded / (total - prefill) if decoded and total > prefill else None,
            "all_prefill_seconds": prefills,
            "all_total_seconds": totals,
        }


def roofline(case: Case, arch: Architecture, dtype: str, ceilings: Ceilings) -> dict[str, float]:
    """Tokens per second that the measured rates allow: prefill by arithmetic, decode by bytes or arithmetic.

    Counted: every weight of a dense model, read once per step; keys and values of the mean context.
    """
    table = arch.vocab_size * arch.token_width  # looked up at the bottom, multiplied with at the top
    layers = arch.parameters() - table * (1 if arch.tie_embeddings else 2)
    context = case.prompt_tokens + case.output_tokens / 2
    attention = 4 * arch.num_layers * arch.num_heads * arch.head_dim
    read = (layers + table) * DTYPE_BYTES[dtype] + case.batch * context * arch.kv_bytes_per_token(dtype)
    computed_s = case.batch * (2 * (layers + table) + attention * context) / ceilings.matmul_flops_per_s
    prefill_flops = 2 * layers + attention * case.prompt_tokens / 2
    return {
        "roofline_prefill_tokens_per_s": ceilings.matmul_flops_per_s / prefill_flops,
        "roofline_decode_tokens_per_s": case.batch / max(read / ceilings.read_bytes_per_s, computed_s),
    }


def main(argv: list[str]) -> None:
    """Measure every case, print and write the results."""
    config, cases = load_config(), read_cases(Path(_CASES.value))

    import importlib.metadata

    from ds_jax.engine import Engine
    from ds_jax.runtime.platform import force_host_devices

    output = Output(_OUTPUT_DIR.value)
    output.config(config)
    force_host_devices(config)
    updates: SimpleQueue[list[Update]] = SimpleQueue()
    engine = Engine(config, updates.put)
    engine.start()
    results = []
    try:
        arch, dtype = engine.executor.arch, engine.executor.dtype
        for case in cases:
            needed = case.prompt_tokens + case.output_tokens
            if needed > engine.max_model_len:
                raise ValueError(f"case {case.name}: needs {needed} positions, the engine has {engine.max_model_len}")
        bench = Bench(engine, updates)
        for seed, case in enumerate(tqdm(cases, desc="cases")):
            results.append(bench.measure(case, arch.vocab_size, _REPEATS.value, seed))
        compilations = engine.statistics()["compilations_while_serving"]
    finally:
        engine.close()
    ceilings = measure(dtype)
    for case, result in zip(cases, results, strict=True):
        result |= roofline(case, arch, dtype, ceilings)
        for phase in ("prefill", "decode"):
            rate = result[f"{phase}_tokens_per_s"]
            result[f"{phase}_of_roofline"] = rate and rate / result[f"roofline_{phase}_tokens_per_s"]
    output.summary(
        {
            "cases": results,
            "dtype": dtype,
            "ceilings": dataclasses.asdict(ceilings),
            "compilations_while_serving": compilations,
            "jax": importlib.metadata.version("jax"),
        }
    )
    columns = ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_of_roofline", "decode_of_roofline")
    header = ("case", "prefill tok/s", "decode tok/s", "of roofline", "of roofline")
    print(table(header, [(result["name"], *(result[column] for column in columns)) for result in results]))
    print(f"written to {output.folder}")


if __name__ == "__main__":
    run(main)
