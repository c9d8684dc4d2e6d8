"""Lengths from the users' own copies of the public data sets; a function counts their tokens.

Empirical(list(read_sharegpt("ShareGPT_V3.json", tokenizer.count)))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ds_jax.workload.lengths import Lengths

Count = Callable[[str], int]
"""Tokens of a text."""


def read_sharegpt(path: str | Path, count: Count, longest: int | None = None) -> Iterator[Lengths]:
    """ShareGPT's JSON: the first question and answer of every conversation that has both, as vLLM and DistServe do.

    Args:
        longest: leave out requests of more tokens than this, prompt and output together.

    Raises:
        ValueError: the file is no JSON list of conversations; names file and line, or conversation.
    """
    content = Path(path).read_bytes()
    try:
        conversations = json.loads(content.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: {error.reason} in UTF-8") from None
    if not isinstance(conversations, list):
        raise ValueError(f"{path}, line 1: a list of conversations is expected")
    for index, conversation in enumerate(conversations):
        try:
            turns = [(turn["from"], turn["value"]) for turn in conversation["conversations"][:2]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, conversation {index}: {error} is no turn with 'from' and 'value'") from None
        if not all(isinstance(text, str) for _, text in turns):
            raise ValueError(f"{path}, conversation {index}: the value of a turn must be a text")
        if len(turns) == 2 and turns[0][0] in ("human", "user"):
            yield from _within(longest, count(turns[0][1]), count(turns[1][1]))


def read_humaneval(path: str | Path, count: Count, longest: int | None = None) -> Iterator[Lengths]:
    """HumanEval's JSONL: `prompt` and `canonical_solution`.

    Raises:
        ValueError: a malformed line; names file and line.
    """
    for row in _objects(path, ("prompt", "canonical_solution")):
        yield from _within(longest, count(row["prompt"]), count(row["canonical_solution"]))


def read_longbench(path: str | Path, count: Count, longest: int | None = None) -> Iterator[Lengths]:
    """LongBench's JSONL: `context` followed by `input`, answered by the first of `answers`.

    Raises:
        ValueError: a malformed line; names file and line.
    """
    for row in _objects(path, ("context", "input", "answers")):
        yield from _within(longest, count(row["context"] + "\n" + row["input"]), count(row["answers"][0]))


def _within(longest: int | None, prompt: int, output: int) -> Iterator[Lengths]:
    if prompt and output and (longest is None or prompt + output <= longest):
        yield Lengths(prompt, output)


def _objects(path: str | Path, fields: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error.msg}") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error.reason} in UTF-8") from None
            for name in fields:
                if not isinstance(row, dict) or not isinstance(row.get(name), str if name != "answers" else list):
                    raise ValueError(f"{path}, line {number}: {name} is missing or of the wrong type")
            if "answers" in fields and not (row["answers"] and isinstance(row["answers"][0], str)):
                raise ValueError(f"{path}, line {number}: answers must begin with a text")
            yield row
