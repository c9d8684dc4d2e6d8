"""Offline generation: many prompts in, all outputs out."""

from __future__ import annotations

import operator
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from tqdm import tqdm

from ds_jax.config import Config, SloConfig
from ds_jax.engine import Engine, Update
from ds_jax.errors import RequestError
from ds_jax.metrics import RequestTimes
from ds_jax.runtime.platform import force_host_devices
from ds_jax.sampling import SamplingParams, TokenLogprobs
from ds_jax.text import TextStream


@dataclass(frozen=True)
class Completion:
    """One finished output of a prompt."""

    token_ids: list[int]
    text: str
    finish_reason: str
    times: RequestTimes | None
    error: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    """One for each token, if they were asked for."""

    @property
    def stages_s(self) -> dict[str, float] | None:
        """Seconds in each of the five stages."""
        return None if self.times is None else self.times.stages_s()


@dataclass(frozen=True)
class RequestOutput:
    """One finished request: a prompt and its n completions. What it says of itself is said of the first."""

    prompt_token_ids: list[int]
    completions: tuple[Completion, ...]
    prompt_logprobs: list[TokenLogprobs] | None = None
    """One for each token of the prompt but the first, if they were asked for."""

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def finish_reason(self) -> str:
        return self.completions[0].finish_reason

    @property
    def times(self) -> RequestTimes | None:
        return self.completions[0].times

    @property
    def stages_s(self) -> dict[str, float] | None:
        return self.completions[0].stages_s

    @property
    def error(self) -> str | None:
        return self.completions[0].error


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
        errors: Literal["raise", "return"] = "raise",
        *,
        slo: SloConfig | None = None,
        deadline_s: float | None = None,
    ) -> list[RequestOutput]:
        """Complete all prompts (texts or token ids); outputs come in the order of the prompts.

        Without `params` each prompt gets 16 tokens, chosen as the checkpoint's generation_config.json says.

        A prompt that can never run raises before anything is started, or with errors="return" gets an output of its
        own, with finish_reason "error" and the reason, and the others are served.

        `slo` and `deadline_s` hold for each of the prompts, as `Engine.submit` takes them.

        Raises:
            RequestError: a prompt can never run; the message names it.
        """
        tokens = [self._token_ids(prompt) for prompt in prompts]
        if params is None:
            params = SamplingParams(**self.engine.executor.checkpoint.sampling_defaults)  # type: ignore[arg-type]
        each = [params] * len(tokens) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(tokens):
            raise ValueError(f"{len(each)} sampling parameters for {len(tokens)} prompts: give one, or one per prompt")
        refused: dict[int, RequestOutput] = {}
        for index, (prompt, wanted) in enumerate(zip(tokens, each, strict=True)):
            try:
                self.engine.check(prompt, wanted)
            except RequestError as error:
                why = f"prompts[{index}]: {error}"
                if errors == "raise":
                    raise RequestError(why, error.param) from error
                refused[index] = RequestOutput(prompt, (Completion([], "", "error", None, why),) * wanted.n)
        good = [index for index in range(len(tokens)) if index not in refused]
        served = self._generate([tokens[index] for index in good], [each[index] for index in good], deadline_s, slo)
        outputs = refused | dict(zip(good, served, strict=True))
        return [outputs[index] for index in range(len(tokens))]

    def _generate(
        self, prompts: list[list[int]], each: list[SamplingParams], deadline_s: float | None, slo: SloConfig | None
    ) -> list[RequestOutput]:
        outputs: list[list[Completion | None]] = [[None] * params.n for params in each]
        scored: list[list[TokenLogprobs] | None] = [None] * len(prompts)
        running: dict[int, _Running] = {}
        submitted = 0
        total = sum(params.n for params in each)
        with tqdm(total=total, desc="sequences", unit="seq", disable=not self._progress) as bar:
            generated = 0
            try:
                while submitted < len(prompts) or running:
                    while submitted < len(prompts) and len(running) < self._window:
                        params = each[submitted]
                        for index, id in enumerate(self.engine.submit(prompts[submitted], params, deadline_s, slo)):
                            running[id] = _Running((submitted, index), TextStream(self.tokenizer, params.stop))
                        submitted += 1
                    for update in self._updates.get():
                        one = running.get(update.sequence)
                        if one is None:
                            continue  # of an earlier call that was interrupted
                        generated += len(update.token_ids)
                        one.add(update)
                        if update.prompt_logprobs is not None:
                            scored[one.place[0]] = update.prompt_logprobs
                        if one.stream.stopped and not one.stopping:
                            one.stopping = True
                            self.engine.stop(update.sequence, "stop")
                        if update.finish_reason is not None:
                            del running[update.sequence]
                            request, index = one.place
                            outputs[request][index] = one.completion(update)
                            bar.update()
                    bar.set_postfix(tokens=generated, refresh=False)
            finally:
                for id in running:
                    self.engine.stop(id)
        return [
            RequestOutput(prompt, tuple(one for one in completions if one is not None), prompt_logprobs)
            for prompt, completions, prompt_logprobs in zip(prompts, outputs, scored, strict=True)
        ]

    def _token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """An empty text stays empty, although the tokenizer may put a token in front of it: it is refused."""
        if not isinstance(prompt, str):
            return [token if isinstance(token, int) else operator.index(token) for token in prompt]
        return self.tokenizer.encode(prompt) if prompt else []

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
    """A sequence on its way, and its text so far."""

    def __init__(self, place: tuple[int, int], stream: TextStream):
        self.place = place
        """Which prompt, and which of its outputs."""
        self.stream = stream
        self.stopping = False
        self.token_ids: list[int] = []
        self.text: list[str] = []
        self.logprobs: list[TokenLogprobs] | None = None

    def add(self, update: Update) -> None:
        if not self.stopping:
            self.token_ids += update.token_ids
            self.text.append(self.stream.push(update.token_ids))
            if update.logprobs is not None:
                self.logprobs = self.logprobs or []
                self.logprobs += update.logprobs

    def completion(self, last: Update) -> Completion:
        assert last.finish_reason is not None
        if not self.stream.stopped:
            self.text.append(self.stream.finish())
        reason = "stop" if self.stream.stopped else last.finish_reason
        return Completion(self.token_ids, "".join(self.text), reason, last.times, last.error, self.logprobs)
