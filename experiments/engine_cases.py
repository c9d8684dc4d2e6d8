"""Cases of the engine's benchmark: batches of equal requests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

FIELDS = {"name": str, "batch": int, "prompt_tokens": int, "output_tokens": int}


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of equal requests."""

    name: str
    batch: int
    prompt_tokens: int
    output_tokens: int


def read_cases(path: Path) -> list[Case]:
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
    for index, case in enumerate(found):
        if not isinstance(case, dict) or case.keys() != FIELDS.keys():
            raise ValueError(f"{path}: cases[{index}] must have exactly the keys {', '.join(FIELDS)}, got {case!r:.80}")
        for field, kind in FIELDS.items():
            if type(case[field]) is not kind or (kind is int and case[field] < 1):
                raise ValueError(f"{path}: cases[{index}].{field} = {case[field]!r} must be a positive {kind.__name__}")
    return [Case(**case) for case in found]
