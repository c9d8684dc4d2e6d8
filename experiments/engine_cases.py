"""Cases of the engine's benchmark: batches of equal requests, and lists of unequal ones.

Needs Python's own library only, since peers read these cases in environments of theirs (peer_worker.py).
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

FIELDS = {"name": str, "batch": int, "prompt_tokens": int, "output_tokens": int}


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of equal requests."""

    name: str
    batch: int
    prompt_tokens: int
    output_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.output_tokens

    def prompts(self, vocab: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """As many prompts to warm up with, and those to measure."""
        warm_up, batch = (random_prompts([self.prompt_tokens] * self.batch, vocab, (seed, part)) for part in range(2))
        return warm_up, batch

    def results(self, prefills: Sequence[float], totals: Sequence[float]) -> dict[str, Any]:
        """What runs come to that took so many seconds: with one output token each, and with all of them."""
        prefill, total, decoded = median(prefills), median(totals), self.batch * (self.output_tokens - 1)
        return {
            **dataclasses.asdict(self),
            "prefill_seconds": prefill,
            "total_seconds": total,
            "prefill_tokens_per_s": self.batch * self.prompt_tokens / prefill,
            "decode_tokens_per_s": decoded / (total - prefill) if decoded and total > prefill else None,
            "all_prefill_seconds": list(prefills),
            "all_total_seconds": list(totals),
        }


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Requests of all lengths, given at once."""

    name: str
    requests: tuple[tuple[int, int], ...]
    """(prompt tokens, output tokens) of each."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(prompt + output for prompt, output in self.requests)

    @property
    def output_tokens(self) -> list[int]:
        """Of each request."""
        return [output for _, output in self.requests]

    def prompts(self, vocab: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """An eighth of the requests' lengths to warm up with, and all of them, of other tokens."""
        lengths = [prompt for prompt, _ in self.requests]
        warm_up, batch = (random_prompts(lengths, vocab, (seed, part)) for part in range(2))
        return warm_up[: len(warm_up) // 8 + 1], batch

    def results(self, seconds: Sequence[float]) -> dict[str, Any]:
        """What runs that took so long come to."""
        total, output = median(seconds), sum(self.output_tokens)
        return {
            "name": self.name,
            "requests": [list(pair) for pair in self.requests],
            "total_seconds": total,
            "total_tokens_per_s": (sum(prompt for prompt, _ in self.requests) + output) / total,
            "output_tokens_per_s": output / total,
            "all_total_seconds": list(seconds),
        }


def read_cases(path: Path) -> list[Case | Mixed]:
    """The cases of a file.

    Raises:
        ValueError: it is not a list of cases; names the place.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} must hold a JSON list of at least one case")
    return [_case(f"{path}: cases[{index}]", case) for index, case in enumerate(found)]


def mixed_requests(count: int, longest_prompt: int, longest_output: int, seed: int = 0) -> list[list[int]]:
    """[prompt tokens, output tokens] of unlike requests: most are short, some are as long as allowed."""
    generator = random.Random(seed)

    def length(longest: int) -> int:
        return max(1, min(longest, round(generator.lognormvariate(0, 1) * longest / 4)))

    return [[length(longest_prompt), length(longest_output)] for _ in range(count)]


def random_prompts(lengths: Sequence[int], vocab: int, seed: tuple[int, int]) -> list[list[int]]:
    """Prompts of these lengths; the same for everybody who asks with this seed (number of the case, which batch)."""
    generator = random.Random(f"{seed[0]}/{seed[1]}")
    return [[generator.randrange(vocab) for _ in range(length)] for length in lengths]


def _case(where: str, case: Any) -> Case | Mixed:
    if isinstance(case, dict) and case.keys() == {"name", "requests"}:
        pairs = case["requests"]
        good = isinstance(pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 1 for n in pair) for pair in pairs
        )
        if not good or not pairs:
            raise ValueError(f"{where}.requests must be a list of [prompt tokens, output tokens], all at least 1")
        if type(case["name"]) is not str:
            raise ValueError(f"{where}.name = {case['name']!r} must be a str")
        return Mixed(case["name"], tuple((prompt, output) for prompt, output in pairs))
    if not isinstance(case, dict) or case.keys() != FIELDS.keys():
        raise ValueError(
            f"{where} must have exactly the keys {', '.join(FIELDS)}, or name, requests; got {case!r:.80}"
        )  # fmt: skip
    for field, kind in FIELDS.items():
        if type(case[field]) is not kind or (kind is int and case[field] < 1):
            raise ValueError(f"{where}.{field} = {case[field]!r} must be a positive {kind.__name__}")
    return Case(**case)
