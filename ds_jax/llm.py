"""Offline generation: many prompts in, all outputs out."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ds_jax.config import Config
from ds_jax.engine import Engine, Update
from ds_jax.errors import RequestError
from ds_jax.metrics import RequestTimes
from ds_jax.runtime.platform import force_host_devices
from ds_jax.sampling import SamplingParams
from ds_jax.text import TextStream


@dataclass(frozen=True)
class RequestOutput:
    """One finished request."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    times: RequestTimes | None
    error: str | None = None

    @property
    def stages_s(self) -> dict[str, float] | None:
        """Seconds in each of the five stages."""
        return None if self.times is None else self.times.stages_s()


class LLM:
    """An engine that serves this process alone. Close it, or use it as a context manager, to free the devices.

    On a machine without accelerators as many host devices as the config needs are made, if jax has not started yet.

    Raises:
        ValueError, FileNotFoundError: config, checkpoint and devices do not fit together; one sentence.
    """

    def __init__(self, config: Config | None = None, *, devices: Any = None, progress: bool = True):
        config = config or Config()
        if devices is None:
            force_host_devices(config)
        self._updates: queue.SimpleQueue[list[Update]] = queue.SimpleQueue()
        self.engine = Engine(config, self._updates.put, devices=devices, progress=progress)
        self.tokenizer = self.engine.tokenizer
        self._window = config.engine.max_waiting
        self._progress = progress
        self.engine.start()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete all prompts (texts or token ids); outputs come in the order of the prompts.

        Raises:
            RequestError: a prompt can never run; nothing was started then, and the message names it.
        """
        tokens = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        params = params or SamplingParams()
        each = [params] * len(tokens) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(tokens):
            raise ValueError(f"{len(each)} sampling parameters for {len(tokens)} prompts: give one, or one per prompt")
        for index, (prompt, wanted) in enumerate(zip(tokens, each, strict=True)):
            try:
                self.engine.check(prompt, wanted)
            except RequestError as error:
                raise RequestError(f"prompts[{index}]: {error}", error.param) from error
        return self._generate(tokens, each)

    def _generate(self, prompts: list[list[int]], each: list[SamplingParams]) -> list[RequestOutput]:
        outputs: list[RequestOutput | None] = [None] * len(prompts)
        running: dict[int, _Running] = {}
        submitted = 0
        with tqdm(total=len(prompts), desc="requests", unit="req", disable=not self._progress) as bar:
            generated = 0
            try:
                while submitted < len(prompts) or running:
                    while submitted < len(prompts) and len(running) < self._window:
                        request = self.engine.submit(prompts[submitted], each[submitted])
                        running[request] = _Running(submitted, TextStream(self.tokenizer, each[submitted].stop))
                        submitted += 1
                    for update in self._updates.get():
                        one = running.get(update.request)
                        if one is None:
                            continue  # of an earlier call that was interrupted
                        generated += len(update.token_ids)
                        one.add(update)
                        if one.stream.stopped and not one.stopping:
                            one.stopping = True
                            self.engine.stop(update.request, "stop")
                        if update.finish_reason is not None:
                            del running[update.request]
                            outputs[one.index] = one.output(prompts[one.index], update)
                            bar.update()
                    bar.set_postfix(tokens=generated, refresh=False)
            finally:
                for request in running:
                    self.engine.stop(request)
        return [output for output in outputs if output is not None]

    def close(self) -> None:
        """Stop the engine and free the devices."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Running:
    """A request on its way, and its text so far."""

    def __init__(self, index: int, stream: TextStream):
        self.index = index
        self.stream = stream
        self.stopping = False
        self.token_ids: list[int] = []
        self.text: list[str] = []

    def add(self, update: Update) -> None:
        if not self.stopping:
            self.token_ids += update.token_ids
            self.text.append(self.stream.push(update.token_ids))

    def output(self, prompt: list[int], last: Update) -> RequestOutput:
        assert last.finish_reason is not None
        if not self.stream.stopped:
            self.text.append(self.stream.finish())
        reason = "stop" if self.stream.stopped else last.finish_reason
        return RequestOutput(prompt, self.token_ids, "".join(self.text), reason, last.times, last.error)
