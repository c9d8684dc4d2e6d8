"""Every policy serves the embedded model: the same tokens everywhere, a log that is enough to repeat every decision,
and a simulator that, fed with the engine's durations, repeats every step. With aborts, and with preemptions of both
kinds, since the pools are small."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import Any

import jax
import pytest

from ds_jax import protocol, recorder
from ds_jax.config import (
    ROLES,
    CacheConfig,
    Config,
    DecodeConfig,
    EngineConfig,
    MixedConfig,
    ModelConfig,
    PrefillConfig,
    SchedulerConfig,
)
from ds_jax.llm import LLM
from ds_jax.protocol import Copy, Medium, Role, Stopped
from ds_jax.recorder import Log
from ds_jax.sampling import SamplingParams
from ds_jax.scheduling import POLICIES, create_scheduler
from ds_jax.simulation import Contract, RecordedDurations, recorded_workload, simulate, steps_of

PAGE, PAGES, LONGEST = 8, 20, 128
PREEMPTIONS = ("recompute", "swap")
STEP: dict[str, Any] = {"max_step_tokens": 64, "max_step_sequences": 4, "saturation_tokens": 32, "token_buckets": (64,)}


def config_for(policy: str, preemption: Any) -> Config:
    """One instance of each role that the policy needs, one program of each kind that it uses."""
    count = {role: int(role in ROLES[policy]) for role in Role}
    return Config(
        model=ModelConfig(path="models/embedded/story", max_model_len=LONGEST),
        policy=policy,
        prefill=PrefillConfig(instances=count[Role.PREFILL], **STEP),
        decode=DecodeConfig(instances=count[Role.DECODE], slots=8),
        mixed=MixedConfig(instances=count[Role.MIXED], slots=8, **STEP),
        cache=CacheConfig(page_size=PAGE, num_pages=PAGES, host_pages=PAGES if preemption == "swap" else 0),
        scheduler=SchedulerConfig(preemption=preemption, **({"token_budget": 64} if policy == "chunked" else {})),
        engine=EngineConfig(compilation_cache="", log_capacity=100_000),
    )


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts shorter and longer than a step; greedy, sampled, and two outputs of one prompt."""
    draw = random.Random(0)
    lengths = [draw.choice((1, 2, 7, 8, 9, 15, 16, 17, 40, 64, 70, 100)) for _ in range(24)]
    prompts = [[draw.randrange(1, 2048) for _ in range(length)] for length in lengths]
    params = [
        SamplingParams(
            max_tokens=draw.randint(1, 28),
            n=1 + (index % 6 == 5),
            temperature=index % 2 * 0.8,
            top_p=0.95,
            seed=index,
            ignore_eos=index % 3 > 0,
        )
        for index in range(len(prompts))
    ]
    return prompts, params


@dataclass
class Run:
    config: Config
    tokens: list[list[list[int]]]
    """By request and output."""
    reasons: list[str]
    log: Log
    replays: int
    pages_left: int
    compilations: int


def run(config: Config) -> Run:
    # What several policies use is on the same device in each, so that it comes out of the cache of compiled programs.
    first, second, *_ = jax.devices()
    devices = [second, first] if len(config.groups()) > 1 else [first]
    with LLM(config, devices=devices, progress=False) as llm:
        engine = llm.engine
        long = SamplingParams(max_tokens=100, ignore_eos=True)
        aborted = [engine.submit([5, 6, 7 + index], long).start for index in range(4)]
        for delay_s, sequence in zip((0.001, 0.02, 0.05, 0.1), aborted, strict=True):
            threading.Timer(delay_s, engine.stop, (sequence,)).start()
        outputs = llm.generate(*requests())
        assert engine.drain(60)
        completions = [one for output in outputs for one in output.completions]
        return Run(
            config,
            [[one.token_ids for one in output.completions] for output in outputs],
            [one.finish_reason for one in completions],
            engine.recorder.log(),
            sum(one.times.replays for one in completions if one.times is not None),
            sum(instance["pages_used"] for instance in engine.statistics()["instances"]),
            engine.statistics()["compilations_while_serving"],
        )


@pytest.fixture(
    scope="module",
    params=[(policy, preemption) for policy in sorted(POLICIES) for preemption in PREEMPTIONS],
    ids="-".join,
)
def served(request: pytest.FixtureRequest) -> Run:
    return run(config_for(*request.param))


@pytest.fixture(scope="module")
def alone() -> list[list[list[int]]]:
    """What each request gets when nobody else is there."""
    with LLM(config_for("disaggregated", "recompute"), devices=jax.devices()[1::-1], progress=False) as llm:
        outputs = [llm.generate([prompt], params)[0] for prompt, params in zip(*requests(), strict=True)]
        return [[one.token_ids for one in output.completions] for output in outputs]


def test_the_tokens_are_those_that_each_request_gets_alone(served: Run, alone: list[list[list[int]]]) -> None:
    assert served.tokens == alone
    assert set(served.reasons) <= {"stop", "length"}
    assert served.pages_left == 0 and served.compilations == 0


def test_the_trace_has_aborts_and_preemptions_of_the_kind_that_was_asked_for(served: Run) -> None:
    assert any(isinstance(entry.event, Stopped) and entry.event.reason == "abort" for entry in served.log.entries)
    copies = [command for entry in served.log.entries for command in entry.commands if isinstance(command, Copy)]
    out, back = (
        {copy.sequence for copy in copies if getattr(copy, end).medium is Medium.HOST}
        for end in ("destination", "source")
    )
    if served.config.scheduler.preemption == "swap":
        assert out and back
    else:
        assert served.replays and not out


def test_a_policy_uses_what_is_compiled_for_it(served: Run) -> None:
    """Steps with chunks and decodes together come where there are programs for them, and nowhere else.

    `deflected` mixes as the slack of its decodes allows, which in real time may be never.
    """
    steps = [one.step for entry in served.log.entries for one in entry.commands if isinstance(one, protocol.Run)]
    mixed = any(step.prefills and step.decodes for step in steps)
    assert mixed == served.config.mixes or (not mixed and served.config.policy == "deflected")


def test_a_fresh_scheduler_answers_the_log_with_the_same_commands(served: Run) -> None:
    assert recorder.replay(served.log, create_scheduler(served.config.policy, served.config.scheduler)) is None


def test_the_engine_and_its_scheduler_kept_the_contract(served: Run) -> None:
    contract = Contract()
    for now_ns, event, commands in served.log.entries:
        contract.hear(event, commands, now_ns)
    assert not contract.living()


def test_the_simulator_fed_with_the_engines_durations_gives_the_same_steps(served: Run) -> None:
    workload, events = recorded_workload(served.log)
    simulated = simulate(
        create_scheduler(served.config.policy, served.config.scheduler),
        (),
        workload,
        RecordedDurations(served.log),
        events=events,
        steps=True,
        strict=True,
    )
    assert simulated.steps == steps_of(served.log)
