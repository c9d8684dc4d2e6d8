"""Joins one scheduler to an executor in real time: requests in, tokens out.

One thread, the dispatch thread, owns the scheduler and starts all device work; nothing on it blocks. Everything else
talks to it through `call_soon`: front ends submit and stop requests, the executor's readers bring results. Tokens leave
through one `listener`, called once per step with all updates of that step, so that a front end pays one wake-up per
step and not one per token.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from ds_jax import latency
from ds_jax.config import Config, SloConfig
from ds_jax.errors import Draining, Overloaded, RequestError
from ds_jax.metrics import RequestTimes, StageClock
from ds_jax.protocol import (
    NO_TARGET_NS,
    Arrived,
    Copy,
    CopyDone,
    Event,
    Instance,
    InstanceLost,
    InstanceUp,
    Reject,
    Request,
    Run,
    SetTimer,
    Slo,
    StepDone,
    Stopped,
    Timer,
)
from ds_jax.recorder import Recorder
from ds_jax.runtime.executor import InProcessExecutor, Scores
from ds_jax.runtime.sequence import Sequence
from ds_jax.sampling import SamplingParams, TokenLogprobs
from ds_jax.scheduling import create_scheduler
from ds_jax.text import Tokenizer

log = logging.getLogger(__name__)


class Update(NamedTuple):
    """What one step, or one ending, brought for one sequence."""

    sequence: int
    token_ids: list[int]
    finish_reason: str | None = None
    """stop, length, abort, deadline or error; None while the sequence goes on."""
    times: RequestTimes | None = None
    """Stages and latencies, with the last update."""
    error: str | None = None
    retry_after_s: float | None = None
    """With an error that trying again later may help."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each of `token_ids`, if the request asks for them."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """One for each token of the prompt but the first, with the first update, if the request asks for them."""


Listener = Callable[[list[Update]], None]


class Engine:
    """Serves token ids; the front ends (`llm.py`, `async_engine.py`) make text of them with its tokenizer.

    `listener` is called on the dispatch thread and must not block. All public methods may be called from any thread.

    Raises:
        ValueError, FileNotFoundError: config, checkpoint and devices do not fit together; one sentence.
    """

    def __init__(self, config: Config, listener: Listener, *, devices: Any = None, progress: bool = True):
        config.check()
        self.config = config
        self.scheduler = create_scheduler(config.policy, config.scheduler, step_times(config))
        self.recorder = Recorder(config.engine.log_capacity)
        self._ask = self.recorder.wrap(self.scheduler).handle
        self.executor = InProcessExecutor(config, devices=devices)
        self.tokenizer = self._open_tokenizer()
        try:
            self.executor.build(progress)
        except BaseException:
            self.executor.close()
            raise
        self.max_model_len = self.executor.max_model_len
        self._eos = frozenset(self.executor.checkpoint.eos_token_ids)
        self._most_outputs = max(instance.max_step_sequences for instance in self.executor.instances)
        self._listener = listener
        self._clock = StageClock()
        self._inbox: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ds-jax-dispatch", daemon=True)
        self._now_ns = 0
        self._more = False
        """Whether another request arrives at once after the one that does now."""
        self._timers: list[tuple[int, str]] = []
        self._living: dict[int, Sequence] = {}
        self._deadlines: dict[int, int] = {}
        self._unstarted: set[int] = set()
        self._updates: list[Update] = []
        self._alive: dict[int, Instance] = {}
        self._next_id = 0
        self._submitting = threading.Lock()
        self._draining = False
        self._closed = False
        self._failure: str | None = None
        self._idle_waiters: list[Future[None]] = []
        self._counts = {"finished": 0, "prompt_tokens": 0, "output_tokens": 0}

    # --- any thread ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve."""
        self.executor.start(self)
        for instance in self.executor.instances:
            self.call_soon(self.instance_up, instance)
        self._thread.start()

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Refuse what can never run.

        Raises:
            RequestError: one sentence with field, value and limit.
        """
        vocabulary = self.executor.arch.vocab_size
        if not prompt:
            raise RequestError("prompt is empty: at least 1 token is needed", "prompt")
        if not all(isinstance(token, int) and 0 <= token < vocabulary for token in prompt):
            wrong = next(token for token in prompt if not isinstance(token, int) or not 0 <= token < vocabulary)
            raise RequestError(f"prompt has token id {wrong!r}; the vocabulary is 0 to {vocabulary - 1}", "prompt")
        limit = self.max_model_len
        whose = "the model" if self.executor.limit_reason == "model" else "the pool of KV pages"
        if len(prompt) >= limit:
            raise RequestError(f"prompt has {len(prompt)} tokens; {whose} allows {limit} with the output", "prompt")
        if len(prompt) + params.max_tokens > limit:
            raise RequestError(
                f"max_tokens = {params.max_tokens} with a prompt of {len(prompt)} tokens exceeds the {limit} tokens "
                f"that {whose} allows: at most {limit - len(prompt)}",
                "max_tokens",
            )
        if params.n > self._most_outputs:
            raise RequestError(
                f"n = {params.n} must be at most {self._most_outputs} here (prefill.max_step_sequences)", "n"
            )
        for name, ids in (("logit_bias", dict(params.logit_bias)), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if token >= vocabulary:
                    raise RequestError(f"{name} has token id {token}; the vocabulary is 0 to {vocabulary - 1}", name)

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        deadline_s: float | None = None,
        slo: SloConfig | None = None,
    ) -> range:
        """Queue a request; updates of its `params.n` sequences go to the listener under the ids returned.

        Args:
            prompt: token ids.
            params: how to choose tokens.
            deadline_s: seconds after which the request ends wherever it is; None: `engine.deadline_s`.
            slo: latency targets, which the scheduler may act by; None: those of the config.

        Raises:
            RequestError: it can never run.
            Overloaded: `engine.max_waiting` requests wait already.
            Draining: the engine is shutting down, or has failed.
        """
        self.check(prompt, params)
        targets = _targets(self.config.slo if slo is None else slo)
        deadline_s = deadline_s if deadline_s is not None else self.config.engine.deadline_s or None
        if deadline_s is not None and not 0 < deadline_s < NO_TARGET_NS / 1e9:
            raise RequestError(f"deadline_s = {deadline_s} must be greater than 0", "deadline_s")
        if self._failure is not None:
            raise Draining(f"the engine has failed: {self._failure}")
        if self._draining:
            raise Draining("the server is shutting down")
        if len(self._unstarted) >= self.config.engine.max_waiting:
            raise Overloaded(f"{len(self._unstarted)} requests are waiting already (engine.max_waiting)", 1.0)
        seed = random.getrandbits(63) if params.seed is None else params.seed
        deadline_ns = None if deadline_s is None else time.monotonic_ns() + int(deadline_s * 1e9)
        with self._submitting:
            if self._closed:
                raise Draining("the engine is closed")
            ids = range(self._next_id, self._next_id + params.n)
            self._next_id = ids.stop
            self._unstarted.add(ids.start)
            end_ids = (*self._eos, *params.stop_token_ids)
            sequences = [Sequence(id, prompt, params, seed, index, end_ids=end_ids) for index, id in enumerate(ids)]
            self.call_soon(self._arrive, sequences, deadline_ns, targets)
        return ids

    def stop(self, sequence: int, reason: str = "abort") -> None:
        """End a sequence (client gone, stop string); nothing happens if it is over already."""
        self.call_soon(self._stop, sequence, reason)

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        """Run the callback on the dispatch thread."""
        self._inbox.put((callback, args))

    @property
    def healthy(self) -> bool:
        """Whether every role of the config has a living instance and the engine itself is well."""
        roles = {instance.role for instance in self._alive.values()}
        return self._failure is None and all(role in roles for role, _ in self.config.groups())

    def statistics(self) -> dict[str, Any]:
        """Counters and gauges of the moment."""
        ledgers: Mapping[int, Any] = getattr(self.scheduler, "ledgers", {})
        return {
            "requests": len(self._living),
            "waiting": len(self._unstarted),
            **self._counts,
            "compilations_while_serving": self.executor.compilations.count,
            "instances": [
                {"id": id, "role": instance.role.value, "epoch": instance.epoch, "pages": instance.pages}
                | ({"pages_used": ledgers[id].used} if id in ledgers else {})
                for id, instance in sorted(self._alive.copy().items())
            ],
        }

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no new requests and wait until all are done; False if that took longer than `timeout_s`."""
        self._draining = True
        idle: Future[None] = Future()
        self.call_soon(self._when_idle, idle)
        try:
            idle.result(timeout_s)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Abort what still runs, stop the thread, free the devices."""
        with self._submitting:  # what was submitted before is aborted below, nothing is submitted after
            if self._closed:
                return
            self._draining = self._closed = True
        if self._thread.is_alive():
            self.call_soon(self._abort_all)
            self._inbox.put((_quit, ()))
            self._thread.join()
        self.executor.close()

    def _open_tokenizer(self) -> Tokenizer:
        """The checkpoint's; one of bytes for random weights whose folder has none."""
        try:
            return Tokenizer.from_folder(self.executor.checkpoint.folder)
        except FileNotFoundError:
            if self.config.model.load_format != "dummy":
                raise
            return Tokenizer.of_bytes()

    # --- the dispatch thread: requests --------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            for (callback, args), (following, _) in itertools.pairwise([*self._calls(), (_nothing, ())]):
                if callback is _quit:
                    return
                if not self._more:  # those that arrive together do so at one time
                    self._now_ns = time.monotonic_ns()
                self._more = callback == following == self._arrive
                try:
                    callback(*args)
                    self._ring()
                except Exception as error:  # a bug: nobody must wait for tokens that will never come
                    log.exception("the engine failed")
                    self._fail(f"{type(error).__name__}: {error}")
                self._deliver()

    def _calls(self) -> list[tuple[Callable[..., None], tuple[Any, ...]]]:
        """What is to be called, as much as there is; waits for something to come, or for the next timer."""
        calls = []
        with contextlib.suppress(queue.Empty):
            calls.append(self._inbox.get(timeout=self._until_next_timer_s()))
            while True:
                calls.append(self._inbox.get_nowait())
        return calls or [(_nothing, ())]

    def _until_next_timer_s(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, (self._timers[0][0] - time.monotonic_ns()) / 1e9)

    def _ring(self) -> None:
        while self._timers and self._timers[0][0] <= self._now_ns:
            self._handle(Timer(heapq.heappop(self._timers)[1]))

    def _arrive(self, sequences: list[Sequence], deadline_ns: int | None, slo: Slo | None) -> None:
        for sequence in sequences:
            self._living[sequence.id] = sequence
            if deadline_ns is not None:
                self._deadlines[sequence.id] = deadline_ns
        if self._failure is not None:
            return self._fail(self._failure)
        leader = sequences[0]
        params = leader.sampling
        request = Request(
            id=leader.id,
            prompt_tokens=len(leader.prompt),
            max_tokens=params.max_tokens,
            seed=leader.seed,
            deadline_ns=deadline_ns,
            slo=slo,
            n=len(sequences),
        )
        self._handle(Arrived(request, self._more))

    def _stop(self, id: int, reason: str) -> None:
        sequence = self._living.get(id)
        if sequence is not None:
            self._handle(Stopped(id, reason))
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: str, error: str | None = None, retry: float | None = None) -> None:
        """The sequence is over: tell the listener, forget it everywhere."""
        del self._living[sequence.id]
        self._unstarted.discard(sequence.id)
        self._deadlines.pop(sequence.id, None)
        self.executor.forget(sequence.id)
        times = self._clock.pop(sequence.id) if self._clock.ended(sequence.id) else None
        self._updates.append(Update(sequence.id, [], reason, times, error, retry))
        self._counts["finished"] += 1
        self._counts["prompt_tokens"] += 0 if sequence.index else len(sequence.prompt)
        self._counts["output_tokens"] += len(sequence.output)

    def _deliver(self) -> None:
        if self._updates:
            updates, self._updates = self._updates, []
            self._listener(updates)
        if not self._living and self._idle_waiters:
            for idle in self._idle_waiters:
                idle.set_result(None)
            self._idle_waiters = []

    def _when_idle(self, idle: Future[None]) -> None:
        self._idle_waiters.append(idle)

    def _abort_all(self) -> None:
        for id in list(self._living):
            self._stop(id, "abort")

    def _fail(self, why: str) -> None:
        self._failure = why
        for sequence in list(self._living.values()):
            self._finish(sequence, "error", error=f"the engine failed: {why}")

    # --- the dispatch thread: scheduler and executor ------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        """Ask the scheduler, stamp the stages, carry out."""
        if self._failure is not None:
            return
        now_ns = self._now_ns
        commands = self._ask(event, now_ns)
        self._clock.hear(event, commands, now_ns)
        for command in commands:
            match command:
                case Run(step):
                    self._unstarted.difference_update(prefill.sequence for prefill in step.prefills)
                    self.executor.run(step, self._living)
                case Copy():
                    self.executor.copy(command)
                case SetTimer(key, at_ns):
                    heapq.heappush(self._timers, (at_ns, key))
                case Reject(sequence, why, retry_after_s):
                    late = self._deadlines.get(sequence, now_ns + 1) <= now_ns
                    self._finish(self._living[sequence], "deadline" if late else "error", why, retry_after_s)

    def step_done(self, step_id: int, tokens: dict[int, int], scores: Scores) -> None:
        """A step's tokens are on the host. Those of sequences that are over are surplus and dropped."""
        for id, (first, found) in scores.prompts.items():
            if (sequence := self._living.get(id)) is not None:
                sequence.prompt_logprobs[first - 1 :] = found
        kept = {id: token for id, token in tokens.items() if id in self._living}
        for id, token in kept.items():
            sequence = self._living[id]
            sequence.output.append(token)
            self._updates.append(_update(sequence, token, scores.tokens.get(id)))
        self._handle(StepDone(step_id, dict.fromkeys(kept, 1)))
        for id, token in kept.items():
            sequence = self._living.get(id)
            if sequence is None:
                continue
            params = sequence.sampling
            if token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
                self._stop(id, "stop")
            elif len(sequence.output) >= params.max_tokens:
                self._finish(sequence, "length")

    def copy_done(self, copy_id: int, ok: bool) -> None:
        """A copy has landed, or never will."""
        self._handle(CopyDone(copy_id, ok))

    def instance_up(self, instance: Instance) -> None:
        """An instance takes work from now on."""
        self._alive[instance.id] = instance
        self._handle(InstanceUp(instance))

    def instance_lost(self, instance: int, epoch: int, why: str) -> None:
        """An instance lost its pages; whatever ran there is replayed elsewhere, or there once it is back."""
        self._alive.pop(instance, None)
        self._handle(InstanceLost(instance, epoch))

    def instance_gone(self, instance: int, why: str) -> None:
        """A lost instance will not come back. If it was the last of its role, waiting would be in vain."""
        log.error("instance %d stays lost: %s", instance, why)
        if self._failure is None and not self.healthy:
            self._fail(f"instance {instance} stays lost: {why}")


def step_times(config: Config) -> latency.Predictor | None:
    """Step times of every instance by `scheduler.latency_profile`; None without one.

    Raises:
        ValueError, FileNotFoundError: there is no such profile, or none of a group's parallelism.
    """
    if not config.scheduler.latency_profile:
        return None
    profile = latency.load(config.scheduler.latency_profile)
    times = [profile.step_time(group.tp, group.pp) for _, group in config.groups() for _ in range(group.instances)]
    return lambda instance: times[instance.id]


def _targets(slo: SloConfig) -> Slo | None:
    """The targets as schedulers see them; None if there is none.

    Raises:
        RequestError: one that is negative, or no number.
    """
    for name, value in (("ttft_s", slo.ttft_s), ("tpot_s", slo.tpot_s)):
        if not 0 <= value < NO_TARGET_NS / 1e9:
            raise RequestError(f"slo.{name} = {value} must be 0 or more", "slo")
    if not slo.ttft_s and not slo.tpot_s:
        return None
    ttft_ns, tpot_ns = (round(value * 1e9) or NO_TARGET_NS for value in (slo.ttft_s, slo.tpot_s))
    return Slo(ttft_ns, tpot_ns)


def _update(sequence: Sequence, token: int, found: TokenLogprobs | None) -> Update:
    """What a step brought for a sequence that goes on."""
    params = sequence.sampling
    with_prompt = params.prompt_logprobs is not None and len(sequence.output) == 1 and sequence.index == 0
    return Update(
        sequence.id,
        [token],
        logprobs=None if found is None else [found],
        prompt_logprobs=sequence.prompt_logprobs if with_prompt else None,
    )


def _quit() -> None:
    """Ends the dispatch thread."""


def _nothing() -> None:
    """Only a timer is due."""
