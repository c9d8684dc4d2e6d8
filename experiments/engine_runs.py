"""Runs of an engine that serves nobody else: how long batches take."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import TYPE_CHECKING, Any

from experiments import device_trace
from experiments.engine_cases import Case, Mixed, random_prompts

if TYPE_CHECKING:
    from ds_jax.engine import Engine, Update


@dataclasses.dataclass(frozen=True)
class Timed:
    """One run, in seconds since its first submission."""

    seconds: float
    """Until the last token."""
    decode_tokens_per_s: float | None
    """Between the last first token and the first sequence that ends, when all decode; None: there is no such time."""
    step_s: float | None
    """Median time between the updates in that time."""
    first_token_s: list[float]
    """Of every request in turn."""
    end_s: list[float]
    """Likewise."""


class Bench:
    """An engine that serves nobody else."""

    def __init__(self, engine: Engine, updates: SimpleQueue[list[Update]]):
        self.engine, self._updates = engine, updates

    def timed(self, prompts: Sequence[list[int]], tokens: Sequence[int]) -> Timed:
        """Give all prompts at once, and wait for so many output tokens of each."""
        from ds_jax.sampling import SamplingParams

        start = time.perf_counter()
        missing: dict[int, int] = {}
        for prompt, count in zip(prompts, tokens, strict=True):
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            missing |= dict.fromkeys(self.engine.submit(prompt, params), count)
        order, firsts, ends = list(missing), dict[int, float](), dict[int, float]()
        heard: list[tuple[float, int]] = []
        while missing:
            updates = self._updates.get()
            now = time.perf_counter() - start
            heard.append((now, sum(len(update.token_ids) for update in updates)))
            for update in updates:
                firsts.setdefault(update.sequence, now)
                missing[update.sequence] -= len(update.token_ids)
                if update.finish_reason is not None:
                    ends[update.sequence] = now
                    if missing.pop(update.sequence):
                        raise RuntimeError(f"a sequence ended early: {update.finish_reason} {update.error or ''}")
        rate, step_s = decode_rate(heard, max(firsts.values()), min(ends.values()))
        return Timed(heard[-1][0], rate, step_s, [firsts[id] for id in order], [ends[id] for id in order])

    def measure(self, case: Case, vocab: int, repeats: int, seed: int) -> dict[str, Any]:
        """The case with its times."""
        warm_up, batch = case.prompts(vocab, seed)
        self.timed(warm_up, [min(case.output_tokens, 4)] * case.batch)
        prefills, runs = [], []
        for _ in range(repeats):
            prefills.append(self.timed(batch, [1] * case.batch).seconds)
            runs.append(self.timed(batch, [case.output_tokens] * case.batch))
        direct = [run.decode_tokens_per_s for run in runs if run.decode_tokens_per_s]
        steps = [run.step_s for run in runs if run.step_s]
        return case.results(prefills, [run.seconds for run in runs]) | {
            "decode_direct_tokens_per_s": median(direct) if direct else None,
            "decode_step_seconds": median(steps) if steps else None,
        }

    def measure_mixed(self, case: Mixed, vocab: int, repeats: int, seed: int) -> dict[str, Any]:
        """The case with its times; of the last run also when each request began and ended to answer."""
        warm_up, batch = case.prompts(vocab, seed)
        self.timed(warm_up, [min(count, 4) for count in case.output_tokens[: len(warm_up)]])
        runs = [self.timed(batch, case.output_tokens) for _ in range(repeats)]
        last = {"first_token_s": runs[-1].first_token_s, "end_s": runs[-1].end_s}
        return case.results([run.seconds for run in runs]) | last

    def trace(self, case: Case, vocab: int, step_s: float, folder: Path) -> dict[str, Any]:
        """How idle the device is while a batch is decoded."""
        try:
            return self._traced(case, vocab, step_s, folder)
        except Exception as reason:  # a profiler that does not work here must not end the benchmark
            return {"missing": f"{type(reason).__name__}: {reason}"[:300]}

    def _traced(self, case: Case, vocab: int, step_s: float, folder: Path) -> dict[str, Any]:
        device_trace.warm_up(folder)
        prompts = random_prompts([case.prompt_tokens] * case.batch, vocab, (0, 2))
        with device_trace.tracing(folder):
            self.timed(prompts, [case.output_tokens] * case.batch)
        found = device_trace.gaps(device_trace.read(folder), max(case.output_tokens * 3 // 4, 1), step_s)
        return found or {"missing": "no kernels of a GPU in the trace"}


def decode_rate(heard: Sequence[tuple[float, int]], begin: float, end: float) -> tuple[float | None, float | None]:
    """Tokens per second after `begin` and before or at `end`, and the median time between two updates there.

    Args:
        heard: (time, tokens) of each update, in order.
    """
    inside = [(now, count) for now, count in heard if begin < now <= end]
    if not inside or end <= begin:
        return None, None
    times = [begin, *(now for now, _ in inside)]
    return sum(count for _, count in inside) / (end - begin), median(b - a for a, b in itertools.pairwise(times))
