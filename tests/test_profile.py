"""The profiler on the devices at hand, and its profile in place of published figures in the simulator."""

from __future__ import annotations

import random
from pathlib import Path

import jax
import numpy as np
import pytest

from ds_jax import latency
from ds_jax.config import CacheConfig, Config, DecodeConfig, ModelConfig, PrefillConfig, SchedulerConfig
from ds_jax.engine import step_times
from ds_jax.protocol import Instance, Request, Role
from ds_jax.runtime.measure import Work, decode_grid, mixed_grid, prefill_grid, spread
from ds_jax.scheduling import create_scheduler
from ds_jax.simulation import simulate
from ds_jax.simulation.latency import Links, PlacedLatency
from ds_jax.workload import Submission
from experiments import profile
from experiments.profile import KINDS, Measured
from tests.runtime.harness import write_config


def test_coefficients_are_found_again_from_what_they_make_and_are_never_negative() -> None:
    draw = np.random.default_rng(0)
    rows = np.stack([np.ones(60), draw.integers(1, 512, 60), draw.integers(1, 512, 60) ** 2], axis=1)
    for true in ([0.005, 2e-4, 3e-8], [0.005, 2e-4, 0.0], [0.0, 1e-4, 0.0]):
        seconds = rows @ true
        assert profile.nonnegative(rows.tolist(), seconds.tolist()) == pytest.approx(true, rel=1e-6, abs=1e-15)
    falling = [3.0 - 0.01 * row for row in range(60)]
    found = profile.nonnegative([(1.0, float(row)) for row in range(60)], falling)
    assert found[1] == 0.0 and 2.4 < found[0] < 3.0


def test_a_fit_of_exact_step_times_has_no_error() -> None:
    true = latency.StepFit(2, (0.004, 1e-4, 2e-8), (0.006, 1e-6, 2e-4), mixed_s=0.001)
    found = Measured(2)
    grids = prefill_grid(256, 8, 512), decode_grid(16, 512), mixed_grid(256, 16, 512)
    for kind, grid in zip(KINDS, grids, strict=True):
        found.steps[kind] = [(work, true.step_s(work.chunks, len(work.contexts), sum(work.contexts))) for work in grid]
    fitted = profile.fit(found)
    assert fitted.prefill == pytest.approx(true.prefill) and fitted.decode == pytest.approx(true.decode)
    assert fitted.mixed_s == pytest.approx(true.mixed_s)
    assert max(fitted.prefill_error or 0, fitted.decode_error or 0, fitted.mixed_error or 0) < 1e-6
    assert fitted.prompt_tokens == (1, 256) and fitted.batch == (1, 16)


def test_any_beginning_of_a_grid_covers_its_range() -> None:
    assert spread(list(range(9))) == [0, 8, 4, 2, 6, 1, 3, 5, 7]
    assert [spread(list(range(size))) for size in range(3)] == [[], [0], [0, 1]]
    for grid in (prefill_grid(2048, 16, 4096), decode_grid(256, 4096), mixed_grid(2048, 256, 4096)):
        assert len(grid) == len(set(grid)) > 20


@pytest.mark.filterwarnings("ignore:latency profile")  # a prompt or context that is shorter than any measured
def test_the_simulator_runs_on_a_profile_of_the_devices_at_hand(tmp_path: Path) -> None:
    config = Config(
        model=ModelConfig(path=write_config(tmp_path, max_position_embeddings=256), load_format="dummy"),
        prefill=PrefillConfig(max_step_tokens=32, max_step_sequences=4, token_buckets=(32,)),
        decode=DecodeConfig(slots=8),
        cache=CacheConfig(page_size=8, num_pages=512),
    )
    found = profile.measure(config, 1, jax.devices()[:2], limit_s=20.0)
    assert all(seconds > 0 for kind in KINDS for _, seconds in found.steps[kind])
    assert found.copies.keys() == {"device", "to host", "from host"}
    made = profile.profile_of([found], "cpu", "tiny")
    made.save(tmp_path / "profile.json")
    loaded = latency.load(tmp_path / "profile.json")
    assert loaded == made
    assert len(list(profile.report([found], loaded))) == 3
    assert profile.picture(found, loaded).axes

    step_time = loaded.step_time(1)
    assert step_time.step_s(((0, 16),), 0, 0) > 0 and step_time.step_s((), 4, 64) > 0
    links = Links(loaded.copy_bytes_per_s, host_bytes_per_s=loaded.host_bytes_per_s, latency_s=loaded.copy_latency_s)
    truth = PlacedLatency({0: step_time, 1: step_time}, links, page_bytes=loaded.kv_bytes_per_token * 8)
    instances = [
        Instance(0, Role.PREFILL, 0, 64, 8, max_step_tokens=32, max_step_sequences=4),
        Instance(1, Role.DECODE, 0, 64, 8, slots=8),
    ]
    draw = random.Random(0)
    requests = [Submission(i * 5_000_000, Request(i, draw.randint(1, 30), 20), 20) for i in range(20)]
    simulated = simulate(create_scheduler("disaggregated"), instances, requests, truth, strict=True)
    assert len(simulated.times) == 20
    assert all(times.tpot_ns is not None and times.tpot_ns > 0 for times in simulated.times.values())


def test_work_that_an_instance_cannot_hold_is_left_out() -> None:
    mixed = Instance(0, Role.MIXED, 0, 64, 8, slots=8, max_step_tokens=32, max_step_sequences=4)
    for work in (Work(((0, 40),)), Work(contexts=(8,) * 9), Work(((0, 6),) * 5), Work(contexts=(90,))):
        assert not work.fits(mixed, longest=100)
    assert Work(((0, 16), (16, 16)), (20,) * 8).fits(mixed, longest=100)


def test_schedulers_are_given_the_step_times_of_a_profile_by_each_instances_parallelism(tmp_path: Path) -> None:
    fits = {tp: latency.StepFit(tp, (0.004 / tp, 1e-4, 0.0), (0.006 / tp, 0.0, 0.0)) for tp in (1, 2)}
    latency.LatencyProfile("cpu", "tiny", "float32", fits).save(tmp_path / "profile.json")
    options = SchedulerConfig(latency_profile=str(tmp_path / "profile.json"))
    predictor = step_times(Config(prefill=PrefillConfig(tp=2), decode=DecodeConfig(instances=2), scheduler=options))
    assert predictor is not None
    for instance, tp in ((0, 2), (1, 1), (2, 1)):
        found = predictor(Instance(instance, Role.MIXED, 0, 8, 8))
        assert found is not None and found.step_s((), 1, 5) == 0.006 / tp
    assert step_times(Config()) is None
    with pytest.raises(ValueError, match="tp = 4 is not in the latency profile of tiny on cpu: it has 1, 2"):
        step_times(Config(prefill=PrefillConfig(tp=4), scheduler=options))
