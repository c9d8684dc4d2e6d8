"""Measure how long steps and copies take on the devices at hand, and fit a latency profile.

python -m experiments.profile --config=configs/story.py --output_dir=out/profile

For every tensor parallelism in the configuration one instance that prefills and decodes is built, with the
configuration's step sizes and slots, and one beside it to copy pages to, where there are devices for it. OUTPUT_DIR
gets profile.json, for `scheduler.latency_profile` and the simulator, first of few measurements and then of more;
summary.json with every measurement and what the fit makes of it; config.json, and figures of measured against fitted.
"""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from tqdm import tqdm

from ds_jax.config import CacheConfig, Config, DecodeConfig, MixedConfig, PrefillConfig, SchedulerConfig
from ds_jax.flags import define_config, load_config, run
from ds_jax.latency import LatencyProfile, StepFit
from ds_jax.protocol import Role
from experiments.output import PALETTE, Output, axes, table

if TYPE_CHECKING:
    import jax
    from matplotlib.figure import Figure

    from ds_jax.runtime.measure import Work

define_config(default_file="configs/story.py")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_TIME_LIMIT_S = flags.DEFINE_float(
    "time_limit_s", 40.0, "Longest time to measure each tensor parallelism, in seconds; compiling comes on top.", 1.0
)

KINDS = ("prefill", "decode", "mixed")
FEWEST = 3
"""Measurements of a kind without which there is no fit."""
SAVE_EVERY = 12
"""Steps measured between two versions of profile.json."""
COPY_PAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HOST_PAGES = 64


@dataclass
class Measured:
    """What was found of one tensor parallelism."""

    tp: int
    steps: dict[str, list[tuple[Work, float]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    copies: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """By route: (bytes, seconds)."""
    left_out: int = 0
    """Points of the grid for which there was no time."""
    dtype: str = ""
    kv_bytes_per_token: int = 0
    kv_tokens: int = 0


def main(argv: list[str]) -> None:
    """Measure, fit, print, write."""
    config = load_config()
    tps = sorted({group.tp for _, group in config.groups()})
    output = Output(_OUTPUT_DIR.value)
    output.config(config)

    from ds_jax.runtime.platform import force_host_devices

    force_host_devices(bench_config(config, max(tps), 2))

    import jax

    devices = jax.devices()
    named = {"device": devices[0].device_kind, "model": Path(config.model.path).name}
    found: list[Measured] = []

    def save(so_far: Measured) -> None:
        """What there is already is of use to somebody who has no time for the rest."""
        profile_of([*found, so_far], **named).save(output.folder / "profile.json")

    for tp in tps:
        found.append(measure(config, tp, devices, _TIME_LIMIT_S.value, save))
    profile = profile_of(found, **named)
    profile.save(output.folder / "profile.json")
    rows = list(report(found, profile))
    for one in found:
        output.figure(f"measured_tp{one.tp}", picture(one, profile))
    output.summary(
        {
            "device": profile.device,
            "model": profile.model,
            "dtype": profile.dtype,
            "saturation_tokens": profile.saturation_tokens,
            "kv_tokens": profile.kv_tokens,
            "copy_bytes_per_s": profile.copy_bytes_per_s,
            "copy_latency_s": profile.copy_latency_s,
            "host_bytes_per_s": profile.host_bytes_per_s,
            "fits": [dict(zip(HEADER, row, strict=True)) for row in rows],
            "left_out": sum(one.left_out for one in found),
            "measurements": [point for one in found for point in points(one, profile)],
        }
    )

    print(table(HEADER, rows))
    for tp, tokens in profile.saturation_tokens.items():
        print(f"tp {tp}: L_m = {tokens} tokens")
    if profile.copy_bytes_per_s:
        print(f"copies: {profile.copy_bytes_per_s / 1e9:.3g} GB/s and {profile.copy_latency_s * 1e3:.3g} ms")
    if left := sum(one.left_out for one in found):
        print(f"{left} points of the grid were left out: --time_limit_s={_TIME_LIMIT_S.value:g} was over")
    print(f"written to {output.folder}")


# --- measuring --------------------------------------------------------------------------------------------------------


def bench_config(config: Config, tp: int, instances: int) -> Config:
    """One instance that does everything, with the configuration's sizes; and with two, one that only receives pages."""
    prompts = config.prefill if config.prefill.instances else config.mixed
    slots = config.mixed.slots if config.mixed.instances else config.decode.slots
    steps = {name: getattr(prompts, name) for name in ("max_step_tokens", "max_step_sequences", "token_buckets")}
    return replace(
        config,
        policy="experiments.profile:none",
        prefill=PrefillConfig(instances=0),
        decode=DecodeConfig(instances=instances - 1, tp=tp, slots=1),
        mixed=MixedConfig(instances=1, tp=tp, slots=slots, **steps),
        cache=CacheConfig(**{**vars(config.cache), "host_pages": config.cache.host_pages or HOST_PAGES}),
        scheduler=SchedulerConfig(),
    )


def measure(
    config: Config,
    tp: int,
    devices: Sequence[jax.Device],
    limit_s: float,
    save: Callable[[Measured], None] = lambda so_far: None,
) -> Measured:
    """Build instances with this tensor parallelism, and time a grid of steps and copies.

    Args:
        save: called now and then with what has been measured, once it is enough for a fit.

    Raises:
        ValueError: there are fewer devices than tp, or the model does not fit.
    """
    from ds_jax.runtime.executor import InProcessExecutor
    from ds_jax.runtime.measure import Stopwatch, decode_grid, mixed_grid, prefill_grid, routes
    from ds_jax.runtime.pool import page_bytes

    executor = InProcessExecutor(bench_config(config, tp, 2 if len(devices) >= 2 * tp else 1), devices=devices)
    try:
        executor.build()
        watch = Stopwatch(executor)
        instance = next(one for one in executor.instances if one.role is Role.MIXED)
        longest, most = executor.max_model_len, instance.max_step_tokens
        grids = {
            "prefill": prefill_grid(most, instance.max_step_sequences, longest),
            "decode": decode_grid(instance.slots, longest),
            "mixed": mixed_grid(most, instance.slots, longest),
        }
        jobs = [[(kind, work) for work in grid if work.fits(instance, longest)] for kind, grid in grids.items()]
        turns = [one for turn in itertools.zip_longest(*jobs) for one in turn if one is not None]
        dtype = executor.dtype
        of_page = page_bytes(executor.arch, dtype, 1, instance.page_size)
        found = Measured(tp, dtype=dtype, kv_bytes_per_token=of_page // instance.page_size)
        found.kv_tokens = instance.pages * instance.page_size
        end = time.monotonic() + limit_s
        for name, (here, there) in routes(executor.instances).items():
            most = instance.host_pages if "host" in name else max(one.pages for one in executor.instances)
            sizes = [pages for pages in COPY_PAGES if pages <= min(most, -(-longest // instance.page_size))]
            found.copies[name] = [(pages * of_page, watch.copy_s(here, there, pages)) for pages in sizes]
        with tqdm(turns, f"measure tp {tp}", unit="step") as bar:
            for done, (kind, work) in enumerate(bar):
                if time.monotonic() > end:
                    found.left_out = len(turns) - done
                    break
                found.steps[kind].append((work, watch.step_s(instance.id, work)))
                if done % SAVE_EVERY == SAVE_EVERY - 1 and all(len(found.steps[kind]) >= FEWEST for kind in KINDS):
                    save(found)
    finally:
        executor.close()
    for kind in KINDS:
        if len(found.steps[kind]) < FEWEST:
            raise ValueError(f"only {len(found.steps[kind])} {kind} steps could be measured, {FEWEST} are needed")
    return found


# --- fitting ----------------------------------------------------------------------------------------------------------


def profile_of(found: Sequence[Measured], device: str, model: str) -> LatencyProfile:
    """The latency profile of what was measured."""
    between = [point for one in found for point in one.copies.get("device", ())]
    with_host = [point for one in found for name, points in one.copies.items() if "host" in name for point in points]
    latency_s, per_byte_s = _line(between) if between else (0.0, 0.0)
    _, host_per_byte_s = _line(with_host) if with_host else (0.0, 0.0)
    return LatencyProfile(
        device=device,
        model=model,
        dtype=found[0].dtype,
        fits={one.tp: fit(one) for one in found},
        date=datetime.date.today().isoformat(),
        source="experiments.profile",
        saturation_tokens={one.tp: saturation_tokens(one) for one in found},
        kv_tokens={f"{one.tp},1": one.kv_tokens for one in found},
        kv_bytes_per_token=found[0].kv_bytes_per_token,
        copy_bytes_per_s=1 / per_byte_s if per_byte_s else 0.0,
        copy_latency_s=latency_s,
        host_bytes_per_s=1 / host_per_byte_s if host_per_byte_s else 0.0,
    )


def fit(found: Measured) -> StepFit:
    """Coefficients that make the mean squared relative error smallest, none of them negative."""
    prefill = nonnegative([(1.0, *_work(work)[:2]) for work, _ in found.steps["prefill"]], _seconds(found, "prefill"))
    decode = nonnegative(
        [(1.0, sum(work.contexts), len(work.contexts)) for work, _ in found.steps["decode"]], _seconds(found, "decode")
    )
    tokens = [sum(length for _, length in work.chunks) for kind in KINDS[::2] for work, _ in found.steps[kind]]
    batches = [work.contexts for kind in KINDS[1:] for work, _ in found.steps[kind]]
    apart = StepFit(found.tp, (prefill[0], prefill[1], prefill[2]), (decode[0], decode[1], decode[2]))
    # The x that makes the sum of ((predicted + x) / seconds - 1)^2 smallest.
    missing = [(1 - apart.step_s(*_arguments(work)) / seconds, 1 / seconds) for work, seconds in found.steps["mixed"]]
    beyond = sum(share * weight for share, weight in missing) / sum(weight * weight for _, weight in missing)
    fitted = replace(
        apart,
        mixed_s=beyond,
        prompt_tokens=(min(tokens), max(tokens)),
        batch=(min(map(len, batches)), max(map(len, batches))),
        context_tokens=(min(map(sum, batches)), max(map(sum, batches))),
    )
    prefill_error, decode_error, mixed_error = (mean(_errors(found, kind, fitted)) for kind in KINDS)
    return replace(fitted, prefill_error=prefill_error, decode_error=decode_error, mixed_error=mixed_error)


def nonnegative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients x >= 0 that make the sum of (row . x / seconds - 1)^2 smallest.

    The best x with some coefficients 0 and the others free is found for every such choice: there are few.
    """
    matrix = np.asarray(rows, float) / np.asarray(seconds)[:, None]
    count = matrix.shape[1]
    best, least = np.zeros(count), float(len(rows))
    for size in range(1, count + 1):
        for free in map(list, itertools.combinations(range(count), size)):
            scale = np.linalg.norm(matrix[:, free], axis=0)
            scale[scale == 0] = 1.0
            x = np.linalg.lstsq(matrix[:, free] / scale, np.ones(len(rows)), rcond=None)[0] / scale
            error = float(np.square(matrix[:, free] @ x - 1).sum())
            if (x >= 0).all() and error < least:
                best, least = np.zeros(count), error
                best[free] = x
    return best.tolist()


def saturation_tokens(found: Measured, share: float = 0.9) -> int:
    """L_m, as measured: the shortest prompt that runs at `share` of the best throughput (DistServe, section 3.1)."""
    alone = [(work.chunks[0][1], seconds) for work, seconds in found.steps["prefill"] if _is_alone(work)]
    best = max(tokens / seconds for tokens, seconds in alone)
    return min(tokens for tokens, seconds in alone if tokens / seconds >= share * best)


def _is_alone(work: Work) -> bool:
    return len(work.chunks) == 1 and work.chunks[0][0] == 0


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds, and seconds per byte, of copies. Copies so small that bytes do not show say at least how fast the
    largest of them went."""
    latency_s, per_byte_s = nonnegative([(1.0, of) for of, _ in points], [seconds for _, seconds in points])
    size, seconds = max(points)
    return latency_s, per_byte_s or seconds / size


def _arguments(work: Work) -> tuple[Sequence[tuple[int, int]], int, int]:
    return work.chunks, len(work.contexts), sum(work.contexts)


def _work(work: Work) -> tuple[int, int]:
    """Tokens of the chunks, and what grows as their attention does (`StepFit.step_s`)."""
    return sum(n for _, n in work.chunks), sum(n * (2 * start + n) for start, n in work.chunks)


def _seconds(found: Measured, kind: str) -> list[float]:
    return [seconds for _, seconds in found.steps[kind]]


def _errors(found: Measured, kind: str, fitted: StepFit) -> list[float]:
    return [abs(fitted.step_s(*_arguments(work)) / seconds - 1) for work, seconds in found.steps[kind]]


# --- telling ----------------------------------------------------------------------------------------------------------

HEADER = ("kind", "tp", "points", "mean error %", "worst error %", "from ms", "to ms")


def report(
    found: Sequence[Measured], profile: LatencyProfile
) -> Iterator[tuple[str, int, int, float, float, float, float]]:
    """How well the fit meets the measurements, a row for each kind of step and tp."""
    for one in found:
        for kind in KINDS:
            errors, seconds = _errors(one, kind, profile.fits[one.tp]), _seconds(one, kind)
            bounds = min(seconds) * 1e3, max(seconds) * 1e3
            yield kind, one.tp, len(errors), 100 * mean(errors), 100 * max(errors), *bounds


def points(found: Measured, profile: LatencyProfile) -> Iterator[dict[str, object]]:
    """Every measurement beside what the profile says."""
    for kind in KINDS:
        for work, seconds in found.steps[kind]:
            fitted = profile.fits[found.tp].step_s(*_arguments(work))
            yield {
                "kind": kind,
                "tp": found.tp,
                "chunks": work.chunks,
                "contexts": work.contexts,
                "measured_s": seconds,
                "fitted_s": fitted,
            }
    for name, copies in found.copies.items():
        for size, seconds in copies:
            yield {"kind": f"copy {name}", "tp": found.tp, "bytes": size, "measured_s": seconds}


def picture(found: Measured, profile: LatencyProfile) -> Figure:
    """Measured against fitted, and copies by their bytes."""
    figure, (steps, copies) = axes(1, 2)
    for kind in KINDS:
        fitted = [profile.fits[found.tp].step_s(*_arguments(work)) * 1e3 for work, _ in found.steps[kind]]
        steps.loglog(fitted, [seconds * 1e3 for seconds in _seconds(found, kind)], "o", markersize=3, label=kind)
    bounds = steps.get_xlim()
    steps.plot(bounds, bounds, color=PALETTE[6], linewidth=0.8)
    steps.set(xlabel="fitted (ms)", ylabel="measured (ms)", title=f"steps, tp {found.tp}")
    for name, of in found.copies.items():
        copies.loglog([size / 2**20 for size, _ in of], [seconds * 1e3 for _, seconds in of], "o-", ms=3, label=name)
    copies.set(xlabel="MiB", ylabel="ms", title="copies")
    for panel in (steps, copies):
        panel.legend()
    return figure


if __name__ == "__main__":
    run(main)
