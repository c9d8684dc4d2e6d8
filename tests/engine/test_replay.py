"""The engine's log is enough to repeat every decision, and the simulator repeats every step."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ds_jax import recorder
from ds_jax.config import SchedulerConfig
from ds_jax.protocol import Copy, Stopped
from ds_jax.recorder import Log
from ds_jax.sampling import SamplingParams
from ds_jax.scheduling import create_scheduler
from ds_jax.simulation import Contract, RecordedDurations, recorded_workload, simulate, steps_of
from tests import goldens
from tests.engine.serving import config_for, mixed_requests, serve

CASE = goldens.CASES[0]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """60 requests on 2 prefill and 2 decode instances with small pools: preemptions, stops and aborts among them."""
    config = config_for(CASE, prefill_instances=2, decode_instances=2, pages=14, log_capacity=100_000)
    with serve(config) as llm:
        prompts, params = mixed_requests(60, llm.engine.executor.arch.vocab_size, seed=1)
        engine = llm.engine
        aborted = [engine.submit([5, 6, 7], SamplingParams(max_tokens=80, ignore_eos=True)).start for _ in range(4)]
        for delay_s, sequence in zip((0.001, 0.01, 0.02, 0.03), aborted, strict=True):
            threading.Timer(delay_s, engine.stop, (sequence,)).start()
        outputs = llm.generate(prompts, params)
        assert sum(output.times.replays for output in outputs if output.times is not None), "nothing was preempted"
        engine.drain(60)
        saved = tmp_path_factory.mktemp("log") / "events.jsonl"
        engine.recorder.log().save(Path(saved))
    return recorder.load(saved)


def test_the_log_has_what_the_promise_is_about(log: Log) -> None:
    assert any(isinstance(entry.event, Stopped) for entry in log.entries)
    assert any(isinstance(command, Copy) for entry in log.entries for command in entry.commands)
    assert len(steps_of(log)) == 4, "every instance had steps"


def test_a_fresh_scheduler_answers_the_log_with_the_same_commands(log: Log) -> None:
    assert recorder.replay(log, create_scheduler("disaggregated", SchedulerConfig())) is None


def test_the_engine_and_its_scheduler_kept_the_contract(log: Log) -> None:
    contract = Contract()
    for now_ns, event, commands in log.entries:
        contract.hear(event, commands, now_ns)
    assert not contract.living()


def test_the_simulator_fed_with_the_engines_durations_gives_the_same_steps(log: Log) -> None:
    requests, events = recorded_workload(log)
    simulated = simulate(
        create_scheduler("disaggregated", SchedulerConfig()),
        (),
        requests,
        RecordedDurations(log),
        events=events,
        steps=True,
        strict=True,
    )
    assert simulated.steps == steps_of(log)
