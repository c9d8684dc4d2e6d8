"""Drives an executor by hand: a sink whose callbacks the test runs, and the steps of whole generations."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_jax import protocol
from ds_jax.config import Config
from ds_jax.protocol import Copy, Decode, Place, Prefill, Role, Step, pages_for
from ds_jax.runtime.executor import InProcessExecutor, Scores
from ds_jax.runtime.sequence import Sequence
from ds_jax.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


class Bench:
    """An executor, its answers, and pages handed out one after the other."""

    def __init__(self, executor: InProcessExecutor):
        self.executor = executor
        self.calls: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = queue.SimpleQueue()
        self.steps: dict[int, dict[int, int]] = {}
        self.scores: dict[int, Scores] = {}
        self.copies: dict[int, bool] = {}
        self.heard: list[tuple[Any, ...]] = []
        """Everything, in order."""
        self.instances = {instance.id: instance for instance in executor.instances}
        self.sequences: dict[int, Sequence] = {}
        self._ids = 0
        self._page: dict[int, int] = {}
        executor.start(self)

    # the sink

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        self.calls.put((callback, args))

    def step_done(self, step_id: int, tokens: dict[int, int], scores: Scores) -> None:
        assert step_id not in self.steps, "a step is answered once"
        self.scores[step_id] = scores
        self.steps[step_id] = tokens
        self.heard.append(("step", step_id))

    def copy_done(self, copy_id: int, ok: bool) -> None:
        assert copy_id not in self.copies, "a copy is answered once"
        self.copies[copy_id] = ok
        self.heard.append(("copy", copy_id, ok))

    def instance_lost(self, instance: int, epoch: int, why: str) -> None:
        self.heard.append(("lost", instance, epoch))

    def instance_up(self, instance: protocol.Instance) -> None:
        self.instances[instance.id] = instance
        self._page.pop(instance.id, None)
        self.heard.append(("up", instance.id, instance.epoch))

    def instance_gone(self, instance: int, why: str) -> None:
        self.heard.append(("gone", instance))

    def turn(self, timeout_s: float = 60) -> None:
        """Run the next callback."""
        callback, args = self.calls.get(timeout=timeout_s)
        callback(*args)

    def wait(self, done: Callable[[], bool]) -> None:
        while not done():
            self.turn()

    # commands

    def of(self, role: Role) -> protocol.Instance:
        return next(instance for instance in self.instances.values() if instance.role is role)

    def add(self, prompt: list[int], sampling: SamplingParams = GREEDY, seed: int = 0, index: int = 0) -> Sequence:
        sequence = Sequence(len(self.sequences), prompt, sampling, seed, index)
        self.sequences[sequence.id] = sequence
        return sequence

    def pages(self, instance: int, count: int) -> tuple[int, ...]:
        """Pages that nobody else has; skips every other one, so that none are neighbours."""
        first = self._page.get(instance, 0)
        self._page[instance] = first + 2 * count
        assert first + 2 * count <= self.instances[instance].pages, "the bench has run out of pages"
        return tuple(range(first, first + 2 * count, 2))

    def run(self, instance: int, prefills: tuple[Prefill, ...] = (), decodes: tuple[Decode, ...] = ()) -> int:
        self._ids += 1
        step = Step(self._ids, instance, self.instances[instance].epoch, 0, prefills, decodes)
        self.executor.run(step, self.sequences)
        return step.id

    def finish(self, step: int) -> dict[int, int]:
        """Wait for a step; its tokens join their sequences."""
        self.wait(lambda: step in self.steps)
        for sequence, token in self.steps[step].items():
            self.sequences[sequence].output.append(token)
        return self.steps[step]

    def prefill(self, sequence: Sequence, instance: int, chunk: int = 0) -> list[int]:
        """Run prompt + output, and take the token that follows; returns the pages, with room for one token more."""
        total, size = len(sequence), self.instances[instance].page_size
        chunk = chunk or total
        pages = self.pages(instance, pages_for(total, size))
        for start in range(0, total, chunk):
            length = min(chunk, total - start)
            last = start + length == total
            step = self.run(instance, (Prefill(sequence.id, start, length, last, pages if start == 0 else ()),))
            self.finish(step)
        return list(pages)

    def start_copy(self, sequence: Sequence, source: int, here: list[int], destination: int, last: bool = True) -> Copy:
        self._ids += 1
        there = self.pages(destination, len(here))
        ends = (Place(i, self.instances[i].epoch) for i in (source, destination))
        copy = Copy(self._ids, sequence.id, *ends, tuple(zip(here, there, strict=True)), last)
        self.executor.copy(copy)
        return copy

    def finish_copy(self, copy: Copy) -> list[int]:
        self.wait(lambda: copy.id in self.copies)
        assert self.copies[copy.id]
        return [there for _, there in copy.pages]

    def decode(self, slots: dict[int, Sequence], instance: int, have: dict[int, int], ahead: int = 0) -> int:
        """A decode step of slot -> sequence; `have` counts each sequence's pages and is kept up to date."""
        decodes = []
        for slot, sequence in slots.items():
            tokens = len(sequence) + ahead
            missing = pages_for(tokens, self.instances[instance].page_size) - have[sequence.id]
            decodes.append(Decode(sequence.id, slot, self.pages(instance, max(missing, 0))))
            have[sequence.id] += max(missing, 0)
        return self.run(instance, decodes=tuple(decodes))

    def generate(self, sequence: Sequence, tokens: int, slot: int = 0) -> list[int]:
        """One sequence, all the way: prefill, hand-over, decode with two steps in flight."""
        source, destination = self.of(Role.PREFILL).id, self.of(Role.DECODE).id
        here = self.prefill(sequence, source)
        there = self.finish_copy(self.start_copy(sequence, source, here, destination))
        have, flying = {sequence.id: len(there)}, []
        for _ in range(tokens - 1):
            flying.append(self.decode({slot: sequence}, destination, have, ahead=len(flying)))
            if len(flying) == 2:
                self.finish(flying.pop(0))
        for step in flying:
            self.finish(step)
        return sequence.output


@contextmanager
def bench(config: Config) -> Iterator[Bench]:
    executor = InProcessExecutor(config)
    executor.build(progress=False)
    try:
        yield Bench(executor)
    finally:
        executor.close()


def write_config(folder: Path, **changes: Any) -> str:
    """A tiny Llama's config.json, for dummy weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)
