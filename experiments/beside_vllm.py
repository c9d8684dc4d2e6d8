"""Measure the offline engine beside vLLM, both up at once and their runs in turns.

python -m experiments.beside_vllm --peer_python=VENV/bin/python --config=configs/offline_cpu.py \
    --config.model.path=FOLDER --cases=cases.json --output_dir=out/beside

The cases are those of experiments.bench_engine. vLLM runs in an environment and a process of its own
(peer_worker.py), with the same checkpoint, type and tokens. For each case both are warmed up with other prompts; then,
--rounds times, one after the other serves the prompts, beginning with either in turn: equal requests with one output
token each (prefill) and with all of them (total), unequal ones once for all. A machine that is slower for a minute is
so for both. --settle_s lets a machine recover from building the programs, --gap_s from the run before.

OUTPUT_DIR gets config.json, a figure, and summary.json after every case, with `cases`: `name`, results of `ours` and
`vllm` (medians, and the seconds of every run), and `ratios`, ours over theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from absl import flags
from tqdm import tqdm

from ds_jax.flags import define_config, load_config, run
from experiments.engine_cases import Case, Mixed, read_cases
from experiments.engine_runs import Bench
from experiments.output import Output, axes, table

if TYPE_CHECKING:
    from ds_jax.config import Config
    from ds_jax.engine import Update

define_config(default_file="configs/offline_cpu.py")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of an environment with vLLM.", required=True)
_CASES = flags.DEFINE_string("cases", None, "JSON list of cases.", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of each case and side.", 1)
_SETTLE_S = flags.DEFINE_float("settle_s", 30.0, "Seconds to wait before the first case.", 0.0)
_GAP_S = flags.DEFINE_float("gap_s", 2.0, "Seconds to wait before each run.", 0.0)

Serve = Callable[[list[list[int]], list[int]], float]
"""(prompts, output tokens of each) -> seconds."""
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s", "total_tokens_per_s")


class Peer:
    """vLLM in its own process.

    Raises:
        RuntimeError: it ended; its last words are in the log.
    """

    def __init__(self, python: str, config: Config, dtype: str, log: Path):
        self._log = log
        command = [python, "-m", "experiments.peer_worker", "--model", config.model.path, "--dtype", dtype]
        if config.model.max_model_len:
            command += ["--max_model_len", str(config.model.max_model_len)]
        with log.open("w", encoding="utf-8") as words:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                cwd=Path(__file__).resolve().parents[1],
                start_new_session=True,  # a process group, with the processes that vLLM starts
            )

    def answer(self) -> dict[str, Any]:
        """The next one."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with code {self._process.wait()}; see {self._log}")
        return json.loads(line)

    def serve(self, prompts: list[list[int]], output_tokens: list[int]) -> float:
        """Seconds that it takes."""
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "output_tokens": output_tokens}), file=self._process.stdin, flush=True)
        return self.answer()["seconds"]

    def close(self) -> None:
        """Let it end, and see to it that nothing of it is left: vLLM's workers outlive a parent that was killed, and
        poll for work."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # where it has ended already
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def measure(
    case: Case | Mixed, sides: dict[str, Serve], vocab: int, seed: int, rounds: int, gap_s: float
) -> dict[str, Any]:
    """The case served by both sides in turns."""
    warm_up, batch = case.prompts(vocab, seed)
    counts = [case.output_tokens] * case.batch if isinstance(case, Case) else case.output_tokens
    for serve in sides.values():
        serve(warm_up, [min(count, 4) for count in counts[: len(warm_up)]])
    prefills: dict[str, list[float]] = {name: [] for name in sides}
    totals: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            time.sleep(gap_s)
            if isinstance(case, Case):
                prefills[name].append(sides[name](batch, [1] * case.batch))
            totals[name].append(sides[name](batch, counts))
    found: dict[str, Any] = {"name": case.name}
    for name in sides:
        found[name] = (
            case.results(prefills[name], totals[name]) if isinstance(case, Case) else case.results(totals[name])
        )
    return found | {"ratios": ratios(found["ours"], found["vllm"])}


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Ours over theirs, of every rate that both have."""
    return {rate: ours[rate] / theirs[rate] for rate in RATES if ours.get(rate) and theirs.get(rate)}


def draw(results: Sequence[dict[str, Any]], output: Output) -> None:
    """The ratios of every case."""
    figure, (panel,) = axes(width=1.6 + 1.1 * len(results))
    for index, rate in enumerate(RATES):
        bars = [(place, result["ratios"][rate]) for place, result in enumerate(results) if rate in result["ratios"]]
        if bars:
            panel.bar([place + 0.25 * (index - 1) for place, _ in bars], [bar for _, bar in bars], 0.23,
                      label=rate.removesuffix("_tokens_per_s"))  # fmt: skip
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xticks(range(len(results)), [result["name"] for result in results], rotation=20)
    panel.set_ylabel("tokens/s, ours / vLLM")
    panel.legend()
    output.figure("ratios", figure)


def main(argv: list[str]) -> None:
    """Measure every case on both sides, print and write the results."""
    config, cases = load_config(), read_cases(Path(_CASES.value))
    if not Path(_PEER_PYTHON.value).is_file():
        raise ValueError(f"--peer_python={_PEER_PYTHON.value} is no file: name the Python of an environment with vLLM")

    from ds_jax.engine import Engine
    from ds_jax.runtime.platform import force_host_devices

    output = Output(_OUTPUT_DIR.value)
    output.config(config)
    force_host_devices(config)
    updates: SimpleQueue[list[Update]] = SimpleQueue()
    engine = Engine(config, updates.put)
    peer = Peer(_PEER_PYTHON.value, config, engine.executor.dtype, output.folder / "vllm.log")
    results: list[dict[str, Any]] = []
    try:
        engine.start()
        about, vocab = peer.answer(), engine.executor.arch.vocab_size
        bench = Bench(engine, updates)
        sides: dict[str, Serve] = {
            "ours": lambda prompts, counts: bench.timed(prompts, counts).seconds,
            "vllm": peer.serve,
        }
        time.sleep(_SETTLE_S.value)
        for seed, case in enumerate(tqdm(cases, desc="cases")):
            results.append(measure(case, sides, min(vocab, about["vocab"]), seed, _ROUNDS.value, _GAP_S.value))
            output.summary({"cases": results, "dtype": engine.executor.dtype, "vllm": about["vllm"]})
    finally:
        engine.close()
        peer.close()
    draw(results, output)
    header = (
        "case",
        *(f"{rate.removesuffix('_tokens_per_s')} {what}" for rate in RATES for what in ("ours", "vllm", "ratio")),
    )
    rows = [
        (found["name"], *(value for rate in RATES for value in (
            found["ours"].get(rate), found["vllm"].get(rate), found["ratios"].get(rate))))
        for found in results
    ]  # fmt: skip
    print(table(header, rows))
    print(f"written to {output.folder}")


if __name__ == "__main__":
    run(main)
