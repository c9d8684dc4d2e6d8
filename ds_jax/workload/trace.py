"""Replay of recorded traffic: CSV and the Mooncake JSONL, read line by line.

A trace can be far longer than memory: readers are streams, and a malformed line is an error that names file and line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ds_jax.workload.lengths import Lengths


class Arrival(NamedTuple):
    """One line of a trace."""

    at_ns: int
    lengths: Lengths


_LATER = "surrogateescape"
"""What is no UTF-8 is no number either, and is told of with its line."""


def read_csv(path: str | Path) -> Iterator[Arrival]:
    """Rows of `arrival_s,prompt_tokens,output_tokens`; other columns are ignored.

    Raises:
        ValueError: (while read) a column is missing, or a malformed row; names file and line.
    """
    with open(path, newline="", encoding="utf-8", errors=_LATER) as file:
        rows = csv.DictReader(file)
        columns = ("arrival_s", "prompt_tokens", "output_tokens")
        if missing := [column for column in columns if column not in (rows.fieldnames or ())]:
            raise ValueError(f"{path}, line 1: column {missing[0]} is missing; a trace needs {', '.join(columns)}")
        yield from _checked(path, ((rows.line_num, row) for row in rows), _csv_row)


def read_mooncake(path: str | Path, spread: bool = True) -> Iterator[Arrival]:
    """Lines of {"timestamp": ms, "input_length": tokens, "output_length": tokens, ...}.

    The published traces have timestamps in ticks of 3 s, about ten requests at each. `spread` lays the requests of
    one tick evenly over the time to the next, in their order, in place of bursts that only the rounding made.

    Raises:
        ValueError: (while read) a malformed line; names file and line.
    """
    with open(path, encoding="utf-8", errors=_LATER) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        arrivals = _checked(path, lines, _mooncake_row)
        yield from _spread(arrivals) if spread else arrivals


def read_trace(path: str | Path) -> Iterator[Arrival]:
    """By the name's ending: .csv, or .jsonl in Mooncake's form.

    Raises:
        ValueError: another ending; (while read) as the readers do.
        FileNotFoundError: no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"trace {path} does not exist")
    readers: dict[str, Callable[[str | Path], Iterator[Arrival]]] = {".csv": read_csv, ".jsonl": read_mooncake}
    if (reader := readers.get(Path(path).suffix)) is None:
        raise ValueError(f"trace {path} must end in one of {', '.join(readers)}")
    return reader(path)


@dataclass(frozen=True)
class Replay:
    """A part of a trace, slowed or sped to a rate; iterating reads the file anew.

    The gaps keep their proportions, so that bursts and lulls stay where they are.
    """

    path: str | Path
    rate: float | None = None
    """Requests/s on average over the part; None: as recorded."""
    count: int | None = None
    """Requests; None: to the end. The trace does not start over: more than it has is an error."""
    skip: int = 0
    """Requests at the start to leave out."""

    def __iter__(self) -> Iterator[Arrival]:
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate = {self.rate} requests/s must be greater than 0")
        count, first_ns, last_ns = 0, 0, 0
        for at_ns, _ in self._part():
            first_ns = at_ns if not count else first_ns
            count, last_ns = count + 1, at_ns
        if not count or count < (self.count or 0):
            raise ValueError(f"{self.path} has {count} requests after the first {self.skip}, {self.count or 1} needed")
        scale = 1.0
        if self.rate is not None and last_ns > first_ns:
            scale = (count - 1) / self.rate / ((last_ns - first_ns) / 1e9)
        for at_ns, lengths in self._part():
            yield Arrival(round((at_ns - first_ns) * scale), lengths)

    def _part(self) -> Iterator[Arrival]:
        return islice(read_trace(self.path), self.skip, None if self.count is None else self.skip + self.count)


def _csv_row(row: dict[str, str]) -> Arrival:
    lengths = Lengths(int(row["prompt_tokens"]), int(row["output_tokens"]))
    return Arrival(round(float(row["arrival_s"]) * 1e9), lengths)


def _mooncake_row(line: str) -> Arrival:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__} in place of an object")
    for name in ("timestamp", "input_length", "output_length"):
        if type(row[name]) not in (int, float):
            raise ValueError(f"{name} = {row[name]!r} must be a number")
    return Arrival(round(row["timestamp"] * 1e6), Lengths(int(row["input_length"]), int(row["output_length"])))


def _checked[Row](
    path: str | Path, rows: Iterator[tuple[int, Row]], read: Callable[[Row], Arrival]
) -> Iterator[Arrival]:
    before_ns = 0
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        try:
            arrival = read(row)
            if min(arrival.lengths) < 1:
                raise ValueError(f"lengths {tuple(arrival.lengths)} must be at least 1")
            if arrival.at_ns < before_ns:
                raise ValueError(f"arrival at {arrival.at_ns / 1e9} s comes before that at {before_ns / 1e9} s")
        except KeyError as error:
            raise ValueError(f"{path}, line {number}: {error.args[0]} is missing") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        before_ns = arrival.at_ns
        yield arrival


def _spread(arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
    """Requests of one timestamp evenly up to the next timestamp; those of the last stay where they are."""
    tick: list[Arrival] = []
    for arrival in arrivals:
        if tick and arrival.at_ns > tick[0].at_ns:
            gap_ns = (arrival.at_ns - tick[0].at_ns) / len(tick)
            yield from (Arrival(round(one.at_ns + index * gap_ns), one.lengths) for index, one in enumerate(tick))
            tick = []
        tick.append(arrival)
    yield from tick
