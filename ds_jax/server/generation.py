"""From a checked request to the engine's outputs: what completions and chat have in common."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from ds_jax.config import SloConfig
from ds_jax.errors import Overloaded, RequestError
from ds_jax.sampling import SamplingParams, TokenLogprobs
from ds_jax.server.errors import GenerationFailed, ModelNotFound, shown

if TYPE_CHECKING:
    from ds_jax.async_engine import AsyncEngine, Output


_SHORT_TEXT_CHARACTERS = 4096
"""Text up to this long is tokenized on the event loop, longer text beside it."""


@dataclass
class Generation:
    """One or many prompts on their way through the engine, and what came out so far."""

    engine: AsyncEngine
    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    """One for each prompt."""
    names: dict[str, str] = field(default_factory=dict)
    """What the client calls the fields that the engine's refusals name, where it calls them otherwise."""
    deadline_s: float | None = None
    slo: SloConfig | None = None
    output_tokens: int = 0

    async def outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        """Outputs as they come, each with the number of its choice: the first prompt's come first. Closing it aborts
        what still runs.

        Raises:
            RequestError, Overloaded, Draining: as `AsyncEngine.generate`, for any of the prompts.
            Overloaded: the scheduler turned it away, and says when to try again.
            GenerationFailed: the engine gave up.
        """
        streams = [self._stream(index) for index in range(len(self.prompts))]
        async with aclosing(_merged(streams)) as merged:
            async for index, output in merged:
                if output.finish_reason == "error" and output.retry_after_s is not None:
                    raise Overloaded(output.error or "the scheduler turned the request away", output.retry_after_s)
                if output.finish_reason == "error":
                    raise GenerationFailed(output.error or "the engine gave the request up")
                self.output_tokens += len(output.token_ids)
                yield index * self.params[index].n + output.index, output

    @property
    def choices(self) -> int:
        """Outputs of all prompts."""
        return sum(params.n for params in self.params)

    async def _stream(self, index: int) -> AsyncGenerator[Output, None]:
        outputs = self.engine.generate(self.prompts[index], self.params[index], self.deadline_s, self.slo)
        generate = cast("AsyncGenerator[Output, None]", outputs)
        try:
            async with aclosing(generate) as outputs:
                async for output in outputs:
                    yield output
        except RequestError as error:
            raise renamed(error, self.names, index if len(self.prompts) > 1 else None) from error

    def usage(self) -> dict[str, int]:
        """OpenAI's usage object."""
        prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": prompt_tokens + self.output_tokens,
        }


@dataclass
class Choice:
    """One output of a prompt, put together."""

    text: str = ""
    finish_reason: str | None = None
    stages_s: dict[str, float] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the prompt, told with the first of its outputs."""


async def collect(generation: Generation) -> list[Choice]:
    """Wait for all outputs of all prompts."""
    choices = [Choice() for _ in range(generation.choices)]
    texts: list[list[str]] = [[] for _ in choices]
    async with aclosing(generation.outputs()) as outputs:
        async for index, output in outputs:
            choice = choices[index]
            texts[index].append(output.text)
            choice.finish_reason, choice.stages_s = output.finish_reason, output.stages_s
            choice.token_ids += output.token_ids
            if output.logprobs is not None:
                choice.logprobs = choice.logprobs or []
                choice.logprobs += output.logprobs
            if output.prompt_logprobs is not None:
                choice.prompt_logprobs = output.prompt_logprobs
    for choice, parts in zip(choices, texts, strict=True):
        choice.text = "".join(parts)
    return choices


def head(prefix: str, kind: str, engine: AsyncEngine) -> dict[str, Any]:
    """What every answer and every chunk of it begins with."""
    identity = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": identity, "object": kind, "created": int(time.time()), "model": engine.served_name}


def check_model(engine: AsyncEngine, name: str | None) -> None:
    """Raises: ModelNotFound, if the request names another model than the one that is served."""
    if name is not None and name != engine.served_name:
        raise ModelNotFound(f"model {shown(name)} is not served here, only {engine.served_name!r}")


def fitted(
    engine: AsyncEngine, params: SamplingParams, prompts: Sequence[list[int]], default: int | None
) -> list[SamplingParams]:
    """The parameters for each prompt of a request that leaves max_tokens out: `default`, or what the model has left.

    Raises:
        RequestError: that is less than min_tokens.
    """
    room = [max(1, engine.max_model_len - len(prompt)) for prompt in prompts]
    try:
        return [replace(params, max_tokens=left if default is None else min(default, left)) for left in room]
    except ValueError as error:
        raise RequestError(str(error), "min_tokens") from error


def renamed(error: RequestError, names: Mapping[str, str], index: int | None = None) -> RequestError:
    """The refusal in the client's words: its name of the field, and which of many prompts (`index`) it is about."""
    if error.param is None:
        return error
    name = names.get(error.param, error.param)
    place = f"{name}[{index}]" if name == "prompt" and index is not None else name
    message = str(error)
    if message.startswith(error.param):
        message = place + message.removeprefix(error.param)
    return RequestError(message, name)


async def tokenized[T](characters: int, work: Callable[[], T]) -> T:
    """Do the work of a tokenizer, on another thread if it would hold up the streams of others."""
    return work() if characters <= _SHORT_TEXT_CHARACTERS else await asyncio.to_thread(work)


async def _merged(streams: Sequence[AsyncGenerator[Output, None]]) -> AsyncGenerator[tuple[int, Output], None]:
    """Outputs of all streams in the order in which they come. The first error ends all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for output in only:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Output]) -> None:
        try:
            async for output in stream:
                queue.put_nowait((index, output))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
