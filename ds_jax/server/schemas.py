"""What clients may send: OpenAI's field names, and vLLM's where OpenAI has none.

Unknown fields are ignored, so that clients with newer fields work. Fields that would change the answer and that we do
not support yet are refused unless they say what happens anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainValidator

from ds_jax.config import SloConfig
from ds_jax.errors import RequestError
from ds_jax.sampling import SamplingParams
from ds_jax.server.errors import shown

MAX_PROMPTS = 1024
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 4096

_NOT_YET: dict[str, tuple[object, ...]] = {
    # OpenAI
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    # vLLM
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "return_token_ids": (False,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
"""Fields that are known and not supported yet, with the values that ask for nothing (null does so, too)."""

_AS_GIVEN = (
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "prompt_logprobs",
)
"""Fields that mean what SamplingParams means by them."""

_NOT_YET_IN_COMPLETIONS = _NOT_YET | {"add_special_tokens": (True,)}
_NOT_YET_IN_CHAT = _NOT_YET | {
    "add_special_tokens": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
}


def _strings(value: Any) -> Any:
    if value is None or isinstance(value, str) or (isinstance(value, list) and _all(value, str)):
        return value
    raise ValueError("must be a string or a list of strings")


def _prompts(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and (_all(value, int) or _all(value, str))):
        return value
    if isinstance(value, list) and _all(value, list) and all(_all(one, int) for one in value):
        return value
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists")


def _all(values: list[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)  # true and false are no token ids


# Validated by hand: pydantic would explain one wrong token among many in as many words as there are kinds and tokens.
Stop = Annotated[str | list[str] | None, PlainValidator(_strings, json_schema_input_type=str | list[str] | None)]
_Prompts = str | list[str] | list[int] | list[list[int]]
Prompts = Annotated[_Prompts, PlainValidator(_prompts, json_schema_input_type=_Prompts)]


class StreamOptions(BaseModel):
    """`stream_options`: what a stream tells besides text."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class Targets(BaseModel):
    """`slo`: latency targets of a request; what is left out is as the server's configuration says, 0 is none."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ttft_s: float | None = None
    tpot_s: float | None = None


class GenerationRequest(BaseModel):
    """What both kinds of generation understand."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    """Missing: the one that is served."""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """vLLM's: 0 or -1 keeps all tokens."""
    seed: int | None = None
    stop: Stop = None
    n: int | None = None
    """Choices for each prompt."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    """Token id, written as a string -> what is added to its logit."""
    min_p: float | None = None
    """vLLM's, as all that follow: keep tokens of at least this share of the largest probability."""
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    """Tokens that come before any end or stop token can."""
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    """Go on past the model's end token."""
    prompt_logprobs: int | None = None
    """Log-probabilities of the prompt's tokens, and of so many of the likeliest in their places."""
    slo: Targets | None = None
    """Ours: the scheduler may act by these targets."""
    deadline_s: float | None = None
    """Ours: seconds after which the request ends wherever it is."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def refuse_unsupported(self, not_yet: dict[str, tuple[object, ...]]) -> None:
        """Refuse what would be ignored although it matters.

        Raises:
            RequestError: names the field and the values that are supported.
        """
        for field, value in (self.model_extra or {}).items():
            if field in not_yet and value is not None and not any(_same(value, one) for one in not_yet[field]):
                supported = " or ".join(map(repr, not_yet[field])) or "leaving it out"
                raise RequestError(f"{field} = {shown(value)} is not supported yet, only {supported}", field)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream = true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is only allowed without stream", "prompt_logprobs")

    def targets(self, default: SloConfig) -> SloConfig:
        """The request's latency targets."""
        given = {} if self.slo is None else self.slo.model_dump(exclude_none=True)
        return replace(default, **given)

    def top_tokens(self) -> int | None:
        """How many of the likeliest tokens to tell at each place; None if no log-probabilities are asked for.

        Raises:
            RequestError: fields that do not fit together.
        """
        return None

    def sampling(self, max_tokens: int, defaults: Mapping[str, Any]) -> SamplingParams:
        """Our sampling parameters; what the request leaves out is as the checkpoint's `defaults`, else as OpenAI's.

        Raises:
            RequestError: a value outside its range.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop")
        longest = max(map(len, stop), default=0)
        if longest > MAX_STOP_CHARACTERS:
            raise RequestError(f"stop has a string of {longest} characters; the limit is {MAX_STOP_CHARACTERS}", "stop")
        given = dict(defaults)
        given |= {field: getattr(self, field) for field in _AS_GIVEN if getattr(self, field) is not None}
        if self.top_k is not None:
            given["top_k"] = 0 if self.top_k == -1 else self.top_k
        biases, top_tokens = _biases(self.logit_bias or {}), self.top_tokens()
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                seed=self.seed,
                stop=tuple(stop),
                ignore_eos=bool(self.ignore_eos),
                logit_bias=biases,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                logprobs=top_tokens,
                **given,
            )
        except ValueError as error:
            raise RequestError(str(error), str(error).split(" = ")[0]) from error


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Prompts
    logprobs: int | None = None
    """Log-probabilities of the tokens, and of so many of the likeliest in their places."""

    def top_tokens(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or many, as a list.

        Raises:
            RequestError: there are none, or too many.
        """
        prompt: Any = self.prompt
        prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        if len(prompts) > MAX_PROMPTS:
            raise RequestError(f"prompt has {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed", "prompt")
        return prompts

    def check(self) -> None:
        """Raises: RequestError."""
        self.refuse_unsupported(_NOT_YET_IN_COMPLETIONS)


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Any] | None = None
    """Text, or a list of parts {"type": "text", "text": …}."""


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    """OpenAI's newer name of max_tokens; goes before it."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    """How many of the likeliest tokens to tell at each place, with logprobs = true."""

    def top_tokens(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs = true", "top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None

    def check(self) -> None:
        """Raises: RequestError."""
        self.refuse_unsupported(_NOT_YET_IN_CHAT)


def _biases(given: dict[str, float]) -> dict[int, float]:
    for token in given:
        if not (token.isascii() and token.isdigit()):
            raise RequestError(f"logit_bias has {shown(token)}, which is no token id", "logit_bias")
    return {int(token): bias for token, bias in given.items()}


def _same(value: object, neutral: object) -> bool:
    """Equal, but 0 is not false: logprobs = 0 asks for something."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
