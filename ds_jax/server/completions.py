"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ds_jax.errors import RequestError
from ds_jax.server.generation import Generation, check_model, collect, fitted, head, renamed, tokenized
from ds_jax.server.logprobs import CompletionLogprobs, prompt_logprobs
from ds_jax.server.schemas import CompletionRequest
from ds_jax.server.streaming import DONE, EventStream, event, unless_hung_up

if TYPE_CHECKING:
    from ds_jax.async_engine import AsyncEngine

DEFAULT_MAX_TOKENS = 16

router = APIRouter()


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Go on from a text, or from each of several texts; texts may be given as token ids."""
    engine: AsyncEngine = request.app.state.engine
    check_model(engine, body.model)
    body.check()
    texts = body.prompts()
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = body.sampling(max_tokens, engine.sampling_defaults)
    prompts = await tokenized(sum(map(len, texts)), lambda: _all_token_ids(engine, texts))
    each = [params] * len(prompts)
    if body.max_tokens is None:
        each = fitted(engine, params, prompts, DEFAULT_MAX_TOKENS)
    targets = body.targets(engine.config.slo)
    generation = Generation(engine, prompts, each, deadline_s=body.deadline_s, slo=targets)
    start = head("cmpl", "text_completion", engine)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(_events(generation, start, with_usage))
    choices = await unless_hung_up(request.receive, collect(generation))
    answers = []
    for index, choice in enumerate(choices):
        scores = None
        if choice.logprobs is not None:
            scores = CompletionLogprobs(engine.tokenizer).push(choice.token_ids, choice.logprobs)
        answers.append(_choice(index, choice.text, choice.finish_reason, choice.stages_s, scores))
        prompt, first = prompts[index // params.n], choices[index - index % params.n]
        if first.prompt_logprobs is not None:
            answers[-1]["prompt_logprobs"] = prompt_logprobs(engine.tokenizer, prompt, first.prompt_logprobs)
    return JSONResponse({**start, "choices": answers, "usage": generation.usage()})


async def _events(generation: Generation, start: dict[str, Any], with_usage: bool) -> AsyncGenerator[bytes, None]:
    if with_usage:
        start = {**start, "usage": None}
    scores = [CompletionLogprobs(generation.engine.tokenizer) for _ in range(generation.choices)]
    async with aclosing(generation.outputs()) as outputs:
        async for index, output in outputs:
            if output.text or output.finish_reason is not None or output.logprobs is not None:
                found = None
                if output.logprobs is not None:
                    found = scores[index].push(output.token_ids, output.logprobs)
                choice = _choice(index, output.text, output.finish_reason, output.stages_s, found)
                yield event({**start, "choices": [choice]})
    if with_usage:
        yield event({**start, "choices": [], "usage": generation.usage()})
    yield DONE


def _choice(
    index: int,
    text: str,
    finish_reason: str | None,
    stages_s: dict[str, float] | None,
    logprobs: dict[str, Any] | None,
) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
    return choice if stages_s is None else {**choice, "stages_s": stages_s}


def _all_token_ids(engine: AsyncEngine, texts: Sequence[str | list[int]]) -> list[list[int]]:
    prompts = []
    for index, text in enumerate(texts):
        try:
            prompts.append(_token_ids(engine, text))
        except RequestError as error:
            raise renamed(error, {}, index if len(texts) > 1 else None) from error
    return prompts


def _token_ids(engine: AsyncEngine, prompt: str | list[int]) -> list[int]:
    if not prompt:
        raise RequestError("prompt is empty: at least 1 token is needed", "prompt")
    if isinstance(prompt, list):
        return prompt
    try:
        return engine.tokenizer.encode(prompt)
    except ValueError as error:
        raise RequestError(f"prompt cannot be read: {error}", "prompt") from error
