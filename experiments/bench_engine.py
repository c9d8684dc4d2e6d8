"""Measure the offline engine on batches of random prompts.

python -m experiments.bench_engine --config=configs/offline_cpu.py --cases=cases.json --output_dir=out/bench

CASES.json is a list of {"name", "batch", "prompt_tokens", "output_tokens"}, and of {"name", "requests"} with a list of
[prompt tokens, output tokens]. All prompts of a case are given at once; outputs are greedy and go past the end token.
Each case is warmed up with other prompts, then measured --repeats times: equal requests with one output token each
(prefill) and with all of them (total), unequal ones once for all.

OUTPUT_DIR gets config.json, and summary.json after every case, with `cases`, medians of each: prefill_seconds,
total_seconds, prefill_tokens_per_s, and decode_tokens_per_s: the output tokens after the first over total - prefill;
beside a roofline from the copy and matmul rates measured in the same run. Where prefill takes far longer than decode,
total - prefill is a small difference of large numbers: decode_direct_tokens_per_s is of one run, from the last first
token to the first sequence that ends. Unequal requests have total_tokens_per_s and output_tokens_per_s.

--trace_case=NAME traces one more run of that case on a GPU, and says how idle the device is (device_trace.py).
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from absl import flags
from tqdm import tqdm

from ds_jax.architecture import DTYPE_BYTES, Architecture
from ds_jax.flags import define_config, load_config, run
from experiments.ceilings import Ceilings, measure
from experiments.engine_cases import Case, read_cases
from experiments.engine_runs import Bench
from experiments.output import Output, table

if TYPE_CHECKING:
    from ds_jax.engine import Update

define_config(default_file="configs/offline_cpu.py")
_CASES = flags.DEFINE_string("cases", None, "JSON list of cases.", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_TRACE_CASE = flags.DEFINE_string("trace_case", "", "Case of which a further run is traced on the device.")
_TIME_LIMIT_S = flags.DEFINE_float("time_limit_s", 1e9, "When it is over, cases that are left are left out.", 1.0)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements of each case.", 1)


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


def compared(case: Case, arch: Architecture, dtype: str, ceilings: Ceilings, result: dict[str, Any]) -> dict[str, Any]:
    """The result beside its roofline."""
    bounds = roofline(case, arch, dtype, ceilings)
    shares = {}
    for name, phase in (("prefill", "prefill"), ("decode", "decode"), ("decode_direct", "decode")):
        rate = result[f"{name}_tokens_per_s"]
        shares[f"{name}_of_roofline"] = rate and rate / bounds[f"roofline_{phase}_tokens_per_s"]
    return result | bounds | shares


def main(argv: list[str]) -> None:
    """Measure every case, print and write the results."""
    begin = time.perf_counter()
    config, cases = load_config(), read_cases(Path(_CASES.value))
    if _TRACE_CASE.value and _TRACE_CASE.value not in [case.name for case in cases if isinstance(case, Case)]:
        raise ValueError(f"--trace_case={_TRACE_CASE.value} names none of the cases with a batch")

    import importlib.metadata

    from ds_jax.engine import Engine
    from ds_jax.runtime.platform import force_host_devices

    output = Output(_OUTPUT_DIR.value)
    output.config(config)
    force_host_devices(config)
    ceilings = measure(config.model.dtype)  # before the engine takes the memory
    updates: SimpleQueue[list[Update]] = SimpleQueue()
    engine = Engine(config, updates.put)
    engine.start()
    arch, dtype = engine.executor.arch, engine.executor.dtype
    results: list[dict[str, Any]] = []
    summary: dict[str, Any] = {
        "cases": results,
        "dtype": dtype,
        "ceilings": dataclasses.asdict(ceilings),
        "instances": [dataclasses.asdict(instance) for instance in engine.executor.instances],
        "build_seconds": time.perf_counter() - begin,
        "jax": importlib.metadata.version("jax"),
    }

    def write() -> None:
        summary["compilations_while_serving"] = engine.statistics()["compilations_while_serving"]
        output.summary(summary | {"left_out": len(cases) - len(results)})

    try:
        write()
        for case in cases:
            if case.longest > engine.max_model_len:
                raise ValueError(
                    f"case {case.name}: needs {case.longest} positions, the engine has {engine.max_model_len}"
                )  # fmt: skip
        bench = Bench(engine, updates)
        for seed, case in enumerate(tqdm(cases, desc="cases")):
            if time.perf_counter() - begin > _TIME_LIMIT_S.value:
                break
            if isinstance(case, Case):
                found = bench.measure(case, arch.vocab_size, _REPEATS.value, seed)
                found = compared(case, arch, dtype, ceilings, found)
            else:
                found = bench.measure_mixed(case, arch.vocab_size, _REPEATS.value, seed)
            results.append(found)
            write()
            if case.name == _TRACE_CASE.value and isinstance(case, Case) and found["decode_step_seconds"]:
                step_s = found["decode_step_seconds"]
                summary["trace"] = {"case": case.name}
                summary["trace"] |= bench.trace(case, arch.vocab_size, step_s, output.folder / "trace")
                write()
    finally:
        engine.close()
    columns = (
        "prefill_tokens_per_s",
        "prefill_of_roofline",
        "decode_tokens_per_s",
        "decode_of_roofline",
        "decode_direct_tokens_per_s",
        "decode_direct_of_roofline",
        "total_tokens_per_s",
    )
    header = (
        "case",
        "prefill tok/s",
        "of roofline",
        "decode tok/s",
        "of roofline",
        "direct",
        "of roofline",
        "total tok/s",
    )
    print(table(header, [(result["name"], *(result.get(column) for column in columns)) for result in results]))
    if "trace" in summary:
        print({name: value for name, value in summary["trace"].items() if name != "kernels"})
    print(f"{len(cases) - len(results)} of {len(cases)} cases left out; written to {output.folder}")


if __name__ == "__main__":
    run(main)
