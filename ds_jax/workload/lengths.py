"""How long requests are: distributions of (prompt, output) tokens, and the published ones by name.

What is known of each is in its class: ShareGPT has been measured, of HumanEval, LongBench and the Mooncake
conversations only the means are published, and their shape here is assumed. `assumed` says so wherever results appear.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from ds_jax.workload.sharegpt import OUTPUT_QUANTILES, PROBABILITIES, PROMPT_QUANTILES


class Lengths(NamedTuple):
    """Tokens of one request."""

    prompt: int
    output: int


class Distribution(Protocol):
    """Where lengths come from."""

    @property
    def assumed(self) -> str:
        """Empty, or what of it nobody has measured."""
        ...

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and output tokens of `count` requests, whole numbers of at least 1."""
        ...


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


@dataclass(frozen=True)
class QuantileTable:
    """Quantiles of the prompt, and of the output given the prompt's rank: their correlation, whatever its form.

    Drawn by inversion, linearly between the quantiles: u picks the prompt and, by its rank, the row of outputs.
    """

    probabilities: Sequence[float]
    prompts: Sequence[int]
    """Prompt tokens at each probability."""
    outputs: Sequence[Sequence[int]]
    """Rows of output tokens at each probability: of the requests with the shortest prompts first, all rows equally
    many requests."""
    assumed: str = ""

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        rank, level = random.random((2, count))
        prompts = np.interp(rank, self.probabilities, self.prompts)
        rows = (rank * len(self.outputs)).astype(int)
        outputs = np.empty(count)
        for row, quantiles in enumerate(self.outputs):
            chosen = rows == row
            outputs[chosen] = np.interp(level[chosen], self.probabilities, quantiles)
        return _whole(prompts), _whole(outputs)


@dataclass(frozen=True)
class Means:
    """Prompt and output drawn independently around their means: all that a workload's means alone can give.

    Gamma distributions of the given coefficients of variation; a prompt with a longest length is Beta-distributed on
    [0, longest] instead, because cutting a Gamma off would move its mean.
    """

    prompt: float
    output: float
    prompt_cv: float = 1.0
    output_cv: float = 1.0
    longest_prompt: int | None = None
    assumed: str = field(default="shape (Gamma) and independence of prompt and output", kw_only=True)

    def __post_init__(self) -> None:
        for name in ("prompt", "output"):
            if not (mean := getattr(self, name)) >= 1:
                raise ValueError(f"mean {name} length = {mean} tokens must be at least 1")
        for name in ("prompt_cv", "output_cv"):
            if not (cv := getattr(self, name)) >= 0:
                raise ValueError(f"{name} = {cv} must be 0 or more")
        if self.longest_prompt is not None:
            if not self.prompt < self.longest_prompt:
                raise ValueError(
                    f"mean prompt length = {self.prompt} must be below longest_prompt = {self.longest_prompt}"
                )
            widest = (self.longest_prompt / self.prompt - 1) ** 0.5
            if not self.prompt_cv < widest:
                raise ValueError(
                    f"prompt_cv = {self.prompt_cv} must be below {widest:.3g} for lengths up to the longest"
                )

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        longest = self.longest_prompt
        if longest is None or not self.prompt_cv:
            prompts = _around(random, self.prompt, self.prompt_cv, count)
        else:
            mean, spread = self.prompt / longest, self.prompt_cv * self.prompt / longest
            weight = mean * (1 - mean) / spread**2 - 1
            prompts = longest * random.beta(mean * weight, (1 - mean) * weight, count)
        return _whole(prompts), _whole(_around(random, self.output, self.output_cv, count))


@dataclass(frozen=True)
class Empirical:
    """Drawn, with replacement, from requests that were seen: a data set of the user's own."""

    lengths: Sequence[Lengths]
    assumed: str = ""

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("no lengths were given to draw from")

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.asarray(self.lengths)[random.integers(len(self.lengths), size=count)]
        return chosen[:, 0], chosen[:, 1]


SHAREGPT = QuantileTable(PROBABILITIES, PROMPT_QUANTILES, OUTPUT_QUANTILES)
HUMANEVAL = Means(
    171.3, 98.2, 0.4, 0.6, assumed="only the means are published; Gamma shapes of cv 0.4 and 0.6 are assumed"
)
LONGBENCH = Means(
    1738.3,
    90.7,
    0.2,
    1.0,
    longest_prompt=2048,
    assumed="only the means are published; prompts Beta of cv 0.2 up to 2048, outputs Gamma of cv 1 are assumed",
)
MOONCAKE = Means(
    12035.1,
    342.6,
    1.3,
    0.75,
    assumed="stand-in for the trace: its means (12035, 342.6); Gamma shapes of cv 1.3 and 0.75 are assumed",
)
"""Of the public conversation trace."""

PUBLISHED: dict[str, Distribution] = {
    "sharegpt": SHAREGPT,
    "humaneval": HUMANEVAL,
    "longbench": LONGBENCH,
    "mooncake": MOONCAKE,
}


def _around(random: np.random.Generator, mean: float, cv: float, count: int) -> np.ndarray:
    return random.gamma(cv**-2, mean * cv**2, count) if cv else np.full(count, mean)


def _whole(tokens: np.ndarray) -> np.ndarray:
    return np.maximum(np.rint(tokens).astype(np.int64), 1)


def stream(lengths: Distribution, random: np.random.Generator, block: int = 1024) -> Iterable[Lengths]:
    """Lengths one by one without end, drawn in blocks."""
    while True:
        prompts, outputs = lengths.draw(random, block)
        yield from map(Lengths, prompts.tolist(), outputs.tolist())
