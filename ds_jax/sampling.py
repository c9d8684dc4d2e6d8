"""How a request wants its tokens chosen: plain values, checked where they come in (no jax)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MOST_TOP_LOGPROBS = 20
"""Tokens whose log-probability can be had at one place, beside the chosen one's."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request, named as in the OpenAI API and vLLM.

    They apply in this order: logit_bias and min_tokens, repetition_penalty, presence_penalty and frequency_penalty,
    temperature, then min_p, top_k and top_p. Log-probabilities are those of the model, before any of it.

    Raises:
        ValueError: a value outside its range; one sentence with field, value and limit.
    """

    max_tokens: int = 16
    """Most tokens to generate (>= 1)."""
    n: int = 1
    """Outputs to generate, each from random numbers of its own."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this, in (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the likeliest token's probability, in [0, 1]; 0 keeps all."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that are in the output, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token as often as it is in the output, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the output, in [0.01, 100]."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens, from -100 to 100; kept as pairs."""
    min_tokens: int = 0
    """Tokens that come before any end token or stop token can."""
    seed: int | None = None
    """Seed of this request's random numbers; None draws one."""
    stop: tuple[str, ...] = ()
    """End, without them in the text, when one of these strings appears."""
    stop_token_ids: tuple[int, ...] = ()
    """End with one of these tokens."""
    ignore_eos: bool = False
    """Go on past the model's end token."""
    logprobs: int | None = None
    """Give the log-probability of each token of the output, and of so many likeliest tokens in its place (0 to 20)."""
    prompt_logprobs: int | None = None
    """The same of each token of the prompt but the first."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("n", self.n, 1, 128)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _real("temperature", self.temperature, 0.0, 100.0)
        _real("top_p", self.top_p, 0.0, 1.0)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.top_p == 0.0:
            raise ValueError("top_p = 0.0 must be greater than 0 and at most 1")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} must be at most max_tokens = {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _integer(name, value, 0, MOST_TOP_LOGPROBS)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop = {list(self.stop)!r} must be non-empty strings")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)
        biases = dict(self.logit_bias)
        object.__setattr__(self, "logit_bias", tuple(biases.items()))
        for token, bias in biases.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _real(f"logit_bias[{token}]", bias, -100.0, 100.0)


@dataclass(frozen=True)
class TokenLogprobs:
    """What the model thought of one token, as natural logarithms of probabilities."""

    logprob: float
    """Of the token itself."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place, (id, log-probability), the likeliest first."""


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} = {value!r} must be a whole number from {low} to {high}")


def _real(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type, operator]
        raise ValueError(f"{name} = {value!r} must be a number from {low:g} to {high:g}")
