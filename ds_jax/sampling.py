"""How a request wants its tokens chosen: plain values, checked where they come in (no jax)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request, named as in the OpenAI API and vLLM.

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
    seed: int | None = None
    """Seed of this request's random numbers; None draws one."""
    stop: tuple[str, ...] = ()
    """End, without them in the text, when one of these strings appears."""
    ignore_eos: bool = False
    """Go on past the model's end token."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("n", self.n, 1, 128)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _real("temperature", self.temperature, 0.0, 100.0)
        _real("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ValueError("top_p = 0.0 must be greater than 0 and at most 1")
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop = {list(self.stop)!r} must be non-empty strings")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} = {value!r} must be a whole number from {low} to {high}")


def _real(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type, operator]
        raise ValueError(f"{name} = {value!r} must be a number from {low:g} to {high:g}")
