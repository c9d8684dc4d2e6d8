"""How long requests are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Lengths(NamedTuple):
    """Tokens of one request."""

    prompt: int
    output: int


def fixed(prompt: int, output: int, count: int) -> list[Lengths]:
    """The same lengths for all."""
    return [Lengths(prompt, output)] * count


def uniform(prompt: tuple[int, int], output: tuple[int, int], count: int, seed: int = 0) -> list[Lengths]:
    """Both lengths drawn uniformly from [low, high].

    Raises:
        ValueError: a range that is empty or begins below 1.
    """
    for name, (low, high) in (("prompt", prompt), ("output", output)):
        if not 1 <= low <= high:
            raise ValueError(f"{name} = ({low}, {high}) must be a range (low, high) with 1 <= low <= high")
    random = np.random.default_rng(seed)
    prompts = random.integers(*prompt, size=count, endpoint=True)
    outputs = random.integers(*output, size=count, endpoint=True)
    return [Lengths(int(p), int(o)) for p, o in zip(prompts, outputs, strict=True)]
