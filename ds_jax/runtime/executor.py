"""The executor that holds all instances in this process.

One thread, the caller's, dispatches to every device and never waits. Results are waited for elsewhere: by one reader
per instance for tokens, and one per sending instance for pages on their way. What they learn comes back through
`Sink.call_soon`, so that all state here belongs to the dispatch thread.

    run ──▶ program ──▶ reader ──▶ call_soon ──▶ step_done
    copy ─▶ gather, pieces to the other devices ──▶ reader ──▶ call_soon ──▶ insert, copy_done
            (to or from host memory: the reader starts the pieces on their way)

Pieces are inserted only when they have landed: an insert dispatched earlier would hold up every later decode step
until the prefill instance had come to the gather.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ds_jax import protocol
from ds_jax.config import Config
from ds_jax.protocol import Copy, Medium, Step
from ds_jax.runtime import handover, logprobs, mesh, platform
from ds_jax.runtime.compilation import CompilationCounter, compiling, keep_compiled_programs
from ds_jax.runtime.handover import Cut, Route
from ds_jax.runtime.instance import Instance, Result, describe, takes_long
from ds_jax.runtime.pool import plan
from ds_jax.runtime.programs import Model
from ds_jax.runtime.reader import Reader
from ds_jax.runtime.sequence import Sequence as TokenSequence
from ds_jax.sampling import TokenLogprobs
from models.checkpoint import bytes_to_read, dummy_params, load_params, open_checkpoint
from models.transformer import abstract_params

log = logging.getLogger(__name__)

LIVES_WITHOUT_A_STEP = 3
"""An instance that is lost this often, without one good step in between, stays lost."""


@dataclass
class Scores:
    """Log-probabilities that a step found, for the sequences that ask for them."""

    tokens: dict[int, TokenLogprobs] = field(default_factory=dict)
    """Sequence -> those of its token of this step."""
    prompts: dict[int, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    """Sequence -> position in its prompt, and those of the prompt's tokens from there on: one chunk's."""


class Sink(Protocol):
    """Who hears what becomes of steps, copies and instances."""

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        """Run the callback on the dispatch thread. May be called from any thread; the rest only from that one."""

    def step_done(self, step_id: int, tokens: dict[int, int], scores: Scores) -> None:
        """A step's tokens are on the host: sequence -> token, of every decode and every prefill that samples."""

    def copy_done(self, copy_id: int, ok: bool) -> None:
        """A copy has landed, or never will."""

    def instance_lost(self, instance: int, epoch: int, why: str) -> None:
        """An instance's life is over; nothing comes back from it."""

    def instance_up(self, instance: protocol.Instance) -> None:
        """An instance has come back, empty."""

    def instance_gone(self, instance: int, why: str) -> None:
        """An instance that was lost will not come back."""


@dataclass
class CopyInFlight:
    copy: Copy
    put: Callable[[list[jax.Array]], None]
    """Puts pieces that have landed where they belong."""
    wanted: bool = True
    """False once its sequence is over: then the pieces need not be put anywhere."""


class InProcessExecutor:
    """Runs every instance of a configuration on the devices of this process.

    Making one finds out whether all fits together and is quick; `build` is what takes time, then `start` serves.

    Args:
        config: what to run.
        devices: to use; all of the default platform if None.

    Raises:
        ValueError, FileNotFoundError: config, checkpoint and devices do not fit together; one sentence.
    """

    def __init__(self, config: Config, *, devices: Sequence[jax.Device] | None = None):
        config.check()
        for role, group in config.groups():
            if group.pp != 1:
                raise ValueError(f"{role}.pp = {group.pp} cannot be served yet: pipeline parallelism must be 1")
        self.checkpoint = open_checkpoint(config.model.path, config.model.load_format)
        self.arch = self.checkpoint.arch
        devices = list(jax.devices() if devices is None else devices)
        sites = mesh.sites(config, self.arch, devices)
        dtype: str = config.model.dtype
        if dtype == "auto":
            dtype = "float32" if devices[0].platform == "cpu" else self.checkpoint.dtype
        self.dtype = dtype
        """Of weights, activations and KV."""
        self._dtype = jnp.dtype(dtype)
        options = platform.compiler_options(devices[0], dtype, config.kernels.cpu_matmul)
        keep_compiled_programs("" if options else config.engine.compilation_cache)  # oneDNN's cannot be kept
        self._policy = config.policy
        self._dummy = config.model.load_format == "dummy"
        models = [
            Model(
                self.arch,
                self._dtype,
                site.mesh,
                *abstract_params(self.arch, site.group.tp, self._dtype, site.mesh),
                backend=config.kernels.backend,
                compiler_options=options,
                plain=platform.waits_at_branches(site.mesh.devices.flat[0]),
            )
            for site in sites
        ]
        planned = plan(config, self.arch, dtype, sites, [model.params for model in models])
        self.max_model_len, self.limit_reason = planned.max_model_len, planned.limit_reason

        self._groups = [site.group for site in sites]
        self._instances = [
            Instance(id, site.role, model, shapes)
            for id, (site, model, shapes) in enumerate(zip(sites, models, planned.shapes, strict=True))
        ]
        self._routes = {
            (i, j): Route(Cut(self.arch.num_kv_heads, sites[i].group.tp, sites[j].group.tp), sites[j].mesh)
            for i, j in handover.routes([site.role for site in sites], config.copies)
        }
        self.compilations = CompilationCounter()
        self._alive = [True] * len(self._instances)
        self._deaths = [0] * len(self._instances)
        self._copies: dict[int, CopyInFlight] = {}
        self._readers: list[Reader] = []
        self._sink: Sink | None = None
        self._closed = False

    @property
    def instances(self) -> list[protocol.Instance]:
        """All instances, as schedulers see them."""
        return [describe(instance, group) for instance, group in zip(self._instances, self._groups, strict=True)]

    def build(self, progress: bool = True) -> None:
        """Load the weights, compile all programs, allocate the pools; with progress bars."""
        with compiling():
            self._load(progress)
            self._compile(progress)
            for instance in self._instances:
                instance.begin_life()

    def _load(self, progress: bool) -> None:
        if self._dummy:
            for instance in tqdm(self._instances, "make random weights", disable=not progress):
                instance.params = dummy_params(self.arch, instance.model.mesh, self._dtype)
            return
        total = sum(bytes_to_read(self.checkpoint, instance.model.mesh) for instance in self._instances)
        with tqdm(total=total, desc="load weights", unit="B", unit_scale=True, disable=not progress) as bar:
            for instance in self._instances:
                instance.params = load_params(self.checkpoint, instance.model.mesh, self._dtype, bar.update)

    def _compile(self, progress: bool) -> None:
        jobs: list[partial[None]] = []
        for instance in self._instances:
            sends = {route.cut for (i, _), route in self._routes.items() if i == instance.id}
            receives = {route.cut for (_, j), route in self._routes.items() if j == instance.id}
            jobs.extend(instance.compilations(sends, receives))
        # The long ones first, so that no core waits for another at the end.
        jobs.sort(key=lambda job: not takes_long(job))
        # XLA compiles without the interpreter's lock, so that threads use all cores.
        bar = tqdm(total=len(jobs), desc="compile programs", disable=not progress)
        with bar, ThreadPoolExecutor(os.cpu_count(), "compile") as threads:
            try:
                for compiled in as_completed([threads.submit(job) for job in jobs]):
                    compiled.result()
                    bar.update()
            except BaseException:
                threads.shutdown(cancel_futures=True)  # a failure, or Ctrl-C, does not wait for the rest
                raise

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, sink: Sink) -> None:
        """Begin to serve; every answer goes to `sink`."""
        self._sink = sink
        self._tokens = [Reader(f"tokens-{instance.id}") for instance in self._instances]
        senders = {i for i, _ in self._routes}
        self._landings = {i: Reader(f"copies-{i}") for i in sorted(senders)}
        swapping = [instance.id for instance in self._instances if instance.host.pages]
        self._swaps = {i: Reader(f"swaps-{i}") for i in swapping}
        self._readers = [*self._tokens, *self._landings.values(), *self._swaps.values()]
        self.compilations.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Wait for what is in flight, stop the threads and free the devices' memory. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for reader in self._readers:
            reader.close()
        self.compilations.stop()
        self._copies.clear()
        for instance in self._instances:
            instance.delete()

    # --- commands -----------------------------------------------------------------------------------------------------

    def run(self, step: Step, sequences: Mapping[int, TokenSequence]) -> None:
        """Dispatch a step; `sequences` holds at least those that it names. Steps of dead epochs are dropped."""
        if not self._living(step.instance, step.epoch):
            return
        try:
            results = self._instances[step.instance].run(step, sequences)
            for result in results:
                for array in result.arrays():
                    array.copy_to_host_async()
        except Exception as error:
            log.exception("step %d could not be dispatched to instance %d", step.id, step.instance)
            self._soon(self._lose, step.instance, step.epoch, _why(error))
            return
        self._tokens[step.instance].put(self._read_step, step, results)

    def copy(self, copy: Copy) -> None:
        """Start a copy. It is answered once, unless both its ends are dead."""
        source, destination = copy.source, copy.destination
        if not (self._living(*source[:2]) and self._living(*destination[:2])):
            self._soon(self._answer_copy, copy, False)
            return
        try:
            self._check_way(copy)
        except ValueError as error:
            log.error("copy %d: %s", copy.id, error)
            self._soon(self._answer_copy, copy, False)
            return
        try:
            if source == destination:
                # Whatever the instance runs later comes after it: there is nothing to wait for.
                self._instances[source.instance].duplicate(copy)
                self._soon(self._answer_copy, copy, True)
                return
            reader, move, put = self._send(copy)
        except Exception as error:
            log.exception("copy %d could not be started", copy.id)
            self._soon(self._lose_unreadable, copy, _why(error))
            return
        self._copies[copy.id] = CopyInFlight(copy, put)
        reader.put(self._await_copy, copy.id, move)

    def _check_way(self, copy: Copy) -> None:
        """Raises: ValueError, if nothing was compiled for such a copy."""
        (i, _, from_), (j, _, to) = copy.source, copy.destination
        if from_ is to is Medium.DEVICE:
            if i == j and not (self._instances[i].shapes.slots and self._instances[i].shapes.rows):
                raise ValueError(f"instance {i} prefills or decodes, not both: it has no copies within itself")
            if i != j and (i, j) not in self._routes:
                raise ValueError(f"policy = {self._policy} moves no pages from instance {i} to instance {j}")
            return
        if from_ is to:
            raise ValueError("pages do not move from host memory to host memory")
        here, there = self._instances[i], self._instances[j]
        if i != j and here.model.mesh.shape != there.model.mesh.shape:
            raise ValueError(f"pages move through host memory only between equal tp, not from {i} to {j}")
        for instance in (here, there):
            if not instance.host.pages:
                raise ValueError(f"instance {instance.id} has no host memory (cache.host_pages)")
        if to is Medium.HOST:
            there.host.check(number for _, number in copy.pages)
        else:
            here.host.check(number for number, _ in copy.pages)

    def _send(self, copy: Copy) -> tuple[Reader, Callable[[], list[jax.Array]], Callable[[list[jax.Array]], None]]:
        """Start a copy: the reader to wait on, what it waits for, and what to do with that on the dispatch thread."""
        (i, _, from_), (j, _, to) = copy.source, copy.destination
        here, there = self._instances[i], self._instances[j]
        sources, destinations = [number for number, _ in copy.pages], [number for _, number in copy.pages]
        if from_ is Medium.HOST:
            return self._swaps[i], partial(there.host.up, here.host.at(sources)), partial(there.restore, copy)
        if to is Medium.HOST:
            return self._swaps[i], partial(there.host.down, here.read(sources)), partial(there.host.keep, destinations)
        route = self._routes[i, j]
        pieces = here.send(route, sources)
        return self._landings[i], lambda: pieces, partial(there.receive, route, copy)

    def forget(self, sequence_id: int) -> None:
        """The sequence is over: no later command names it."""
        for instance in self._instances:
            instance.forget(sequence_id)
        for flight in self._copies.values():
            if flight.copy.sequence == sequence_id:
                flight.wanted = False

    # --- what comes back ----------------------------------------------------------------------------------------------

    def _read_step(self, step: Step, results: list[Result]) -> None:
        """On a reader: wait for a step's tokens."""
        try:
            tokens: dict[int, int] = {}
            scores = Scores()
            for result in results:
                values = np.asarray(result.tokens).tolist()
                tokens.update((sequence, values[row]) for sequence, row in result.rows)
                _read_scores(result, scores)
        except Exception as error:
            log.exception("step %d failed on instance %d", step.id, step.instance)
            self._soon(self._lose, step.instance, step.epoch, _why(error))
        else:
            self._soon(self._finish_step, step, tokens, scores)

    def _finish_step(self, step: Step, tokens: dict[int, int], scores: Scores) -> None:
        if self._living(step.instance, step.epoch):
            self._deaths[step.instance] = 0
            self._listener.step_done(step.id, tokens, scores)

    def _await_copy(self, copy_id: int, move: Callable[[], list[jax.Array]]) -> None:
        """On a reader: wait until pieces have landed."""
        try:
            pieces = jax.block_until_ready(move())
        except Exception as error:
            log.error("copy %d failed: %s", copy_id, _why(error))
            self._soon(self._fail_copy, copy_id, _why(error))
        else:
            self._soon(self._land_copy, copy_id, pieces)

    def _fail_copy(self, copy_id: int, why: str) -> None:
        flight = self._copies.pop(copy_id, None)
        if flight is not None:
            self._lose_unreadable(flight.copy, why)

    def _lose_unreadable(self, copy: Copy, why: str) -> None:
        """Pages that cannot be read are gone: asked for again they would fail again, for ever."""
        self._lose(copy.source.instance, copy.source.epoch, why)
        self._answer_copy(copy, False)

    def _land_copy(self, copy_id: int, pieces: list[jax.Array]) -> None:
        flight = self._copies.pop(copy_id, None)
        if flight is None:
            return  # an end was lost, and the copy answered, before it landed
        copy = flight.copy
        if flight.wanted:
            try:
                flight.put(pieces)
            except Exception as error:
                log.exception("copy %d could not be inserted", copy_id)
                self._answer_copy(copy, False)
                self._lose(copy.destination.instance, copy.destination.epoch, _why(error))
                return
        self._answer_copy(copy, True)

    def _answer_copy(self, copy: Copy, ok: bool) -> None:
        if self._living(*copy.source[:2]) or self._living(*copy.destination[:2]):
            self._listener.copy_done(copy.id, ok)

    # --- loss and return ----------------------------------------------------------------------------------------------

    def _lose(self, number: int, epoch: int, why: str) -> None:
        """End an instance's life, and begin the next."""
        if not self._living(number, epoch):
            return
        log.error("instance %d is lost (epoch %d): %s", number, epoch, why)
        instance = self._instances[number]
        self._alive[number] = False
        instance.end_life()
        hit = [flight.copy for flight in self._copies.values() if number in _ends(flight.copy)]
        for copy in hit:
            del self._copies[copy.id]
        self._listener.instance_lost(number, epoch, why)
        for copy in hit:
            self._answer_copy(copy, False)
        self._deaths[number] += 1
        if self._deaths[number] > LIVES_WITHOUT_A_STEP:
            why = f"{LIVES_WITHOUT_A_STEP} lives without one good step, the last one ended by {why}"
            return self._listener.instance_gone(number, why)
        try:
            instance.begin_life()
        except Exception as error:
            log.exception("instance %d cannot begin another life", number)
            return self._listener.instance_gone(number, f"its memory cannot be had again: {_why(error)}")
        instance.epoch += 1
        self._alive[number] = True
        self._listener.instance_up(describe(instance, self._groups[number]))

    def _living(self, number: int, epoch: int) -> bool:
        return self._alive[number] and self._instances[number].epoch == epoch

    @property
    def _listener(self) -> Sink:
        assert self._sink is not None, "start comes before run and copy"
        return self._sink

    def _soon(self, callback: Callable[..., None], *args: Any) -> None:
        if not self._closed:
            self._listener.call_soon(self._unless_closed, callback, *args)

    def _unless_closed(self, callback: Callable[..., None], *args: Any) -> None:
        if not self._closed:
            callback(*args)


def _read_scores(result: Result, scores: Scores) -> None:
    """Wait for log-probabilities, if any were asked for."""
    if result.logprobs is not None:
        found = np.asarray(result.logprobs)
        for sequence, row in result.rows:
            if (top := result.tops.get(sequence)) is not None:
                scores.tokens[sequence] = logprobs.read(found[row], top)
    if result.prompt_logprobs is not None:
        found = np.asarray(result.prompt_logprobs)
        for sequence, first, rows, top in result.scored:
            scores.prompts[sequence] = first, [logprobs.read(row, top) for row in found[rows]]


def _ends(copy: Copy) -> tuple[int, int]:
    return copy.source.instance, copy.destination.instance


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
