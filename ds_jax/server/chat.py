"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ds_jax.errors import RequestError
from ds_jax.server.errors import shown
from ds_jax.server.generation import Choice, Generation, check_model, collect, fitted, head, renamed, tokenized
from ds_jax.server.logprobs import chat_logprobs, prompt_logprobs
from ds_jax.server.schemas import ChatRequest, Message
from ds_jax.server.streaming import DONE, EventStream, event, unless_hung_up

if TYPE_CHECKING:
    from ds_jax.async_engine import AsyncEngine

_ANY = 2**31 - 1
"""Stands for max_tokens until it is known how much the prompt leaves."""

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation. Its prompt is written by the checkpoint's chat template."""
    engine: AsyncEngine = request.app.state.engine
    check_model(engine, body.model)
    body.check()
    max_tokens, field = body.max_tokens, "max_tokens"
    if body.max_completion_tokens is not None:
        max_tokens, field = body.max_completion_tokens, "max_completion_tokens"
    names = {"prompt": "messages", "max_tokens": field, "logprobs": "top_logprobs"}
    try:
        params = body.sampling(_ANY if max_tokens is None else max_tokens, engine.sampling_defaults)
    except RequestError as error:
        raise renamed(error, names) from error
    turns = _turns(body.messages)
    prompt = await tokenized(sum(len(turn["content"]) for turn in turns), lambda: _prompt(engine, turns))
    each = [params] if max_tokens is not None else fitted(engine, params, [prompt], None)
    targets = body.targets(engine.config.slo)
    generation = Generation(engine, [prompt], each, names, deadline_s=body.deadline_s, slo=targets)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(_events(generation, head("chatcmpl", "chat.completion.chunk", engine), with_usage))
    answers = await unless_hung_up(request.receive, collect(generation))
    whole = {
        **head("chatcmpl", "chat.completion", engine),
        "choices": [_choice(engine, index, answer) for index, answer in enumerate(answers)],
        "usage": generation.usage(),
    }
    if answers[0].prompt_logprobs is not None:
        whole["prompt_logprobs"] = prompt_logprobs(engine.tokenizer, prompt, answers[0].prompt_logprobs)
    return JSONResponse(whole)


def _choice(engine: AsyncEngine, index: int, answer: Choice) -> dict[str, Any]:
    logprobs = None
    if answer.logprobs is not None:
        logprobs = chat_logprobs(engine.tokenizer, answer.token_ids, answer.logprobs)
    choice = {
        "index": index,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
    }
    return choice if answer.stages_s is None else {**choice, "stages_s": answer.stages_s}


async def _events(generation: Generation, start: dict[str, Any], with_usage: bool) -> AsyncGenerator[bytes, None]:
    if with_usage:
        start = {**start, "usage": None}

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return event({**start, "choices": [choice]})

    begun = set()
    async with aclosing(generation.outputs()) as outputs:
        async for index, output in outputs:
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            if output.logprobs is not None:
                logprobs = chat_logprobs(generation.engine.tokenizer, output.token_ids, output.logprobs)
                yield chunk(index, {"content": output.text}, logprobs=logprobs)
            elif output.text:
                yield chunk(index, {"content": output.text})
            if output.finish_reason is not None:
                stages = {} if output.stages_s is None else {"stages_s": output.stages_s}
                yield chunk(index, {}, finish_reason=output.finish_reason, **stages)
    if with_usage:
        yield event({**start, "choices": [], "usage": generation.usage()})
    yield DONE


def _prompt(engine: AsyncEngine, turns: Sequence[dict[str, Any]]) -> list[int]:
    try:
        return engine.tokenizer.apply_chat_template(turns)
    except ValueError as error:
        raise RequestError(f"messages cannot be made a prompt: {error}", "messages") from error


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What a template gets to see: plain texts, and `system` where newer clients say `developer`."""
    if not messages:
        raise RequestError("messages is empty: at least 1 message is needed", "messages")
    return [
        {
            **(message.model_extra or {}),
            "role": "system" if message.role == "developer" else message.role,
            "content": _text(message, f"messages[{index}]"),
        }
        for index, message in enumerate(messages)
    ]


def _text(message: Message, place: str) -> str:
    for field in ("tool_calls", "function_call", "audio"):
        if (message.model_extra or {}).get(field):
            raise RequestError(f"{place}.{field} is not supported yet", f"{place}.{field}")
    if message.content is None:
        raise RequestError(f"{place}.content is missing", f"{place}.content")
    if isinstance(message.content, str):
        return message.content
    texts = []
    for index, part in enumerate(message.content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            field = f"{place}.content[{index}]"
            raise RequestError(f'{field} = {shown(part)} is not supported, only {{"type": "text", "text": …}}', field)
        texts.append(text)
    return "\n".join(texts)
