"""Real runs as CSV files: what was asked of a system, and, if it is told, how fast it answered.

The name says the layout: `disagg_p-tp2pp1_d-tp1pp1__n600__rate6.csv` is one prefill and one decode instance with their
parallelism, 600 requests at 6/s in total; `colocated_tp1pp1__n100__rate1.csv` is one instance that does both. A row is
a request: arrival_s, prompt_tokens, output_tokens, and perhaps ttft_s and tpot_s.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_jax.protocol import Role

_NAME = re.compile(
    r"(?:(?P<colocated>colocated)_tp(?P<tp>\d+)pp(?P<pp>\d+)"
    r"|disagg_p-tp(?P<ptp>\d+)pp(?P<ppp>\d+)_d-tp(?P<dtp>\d+)pp(?P<dpp>\d+))"
    r"__n(?P<n>\d+)__rate(?P<rate>\d+(?:\.\d+)?)"
)


@dataclass(frozen=True)
class Row:
    """One request."""

    line: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class RealRun:
    """One file."""

    path: Path
    colocated: bool
    layout: tuple[tuple[Role, int, int], ...]
    """Role, tp and pp of each instance."""
    requests: int
    """As the name says."""
    rate: float
    rows: tuple[Row, ...]
    ttft_s: np.ndarray | None
    """Of each row; None where it was not told."""
    tpot_s: np.ndarray | None

    @property
    def name(self) -> str:
        return self.path.stem


def read_runs(folder: str | Path) -> list[RealRun]:
    """All runs of a folder, by name.

    Raises:
        FileNotFoundError: there is no such folder, or no CSV in it.
        ValueError: a file's name or one of its lines is malformed.
    """
    paths = sorted(Path(folder).glob("*.csv"))
    if not paths:
        raise FileNotFoundError(f"--runs={folder} has no CSV files")
    return [read_run(path) for path in paths]


def read_run(path: Path) -> RealRun:
    """One run.

    Raises:
        ValueError: the name, a column or a row is malformed; names file and line.
    """
    match = _NAME.fullmatch(path.stem)
    if match is None:
        raise ValueError(
            f"{path}: the name must be like colocated_tp1pp1__n100__rate1.csv or "
            "disagg_p-tp2pp1_d-tp1pp1__n600__rate6.csv"
        )
    named = match.groupdict()
    colocated = named["colocated"] is not None
    layout = (
        ((Role.MIXED, int(named["tp"]), int(named["pp"])),)
        if colocated
        else ((Role.PREFILL, int(named["ptp"]), int(named["ppp"])), (Role.DECODE, int(named["dtp"]), int(named["dpp"])))
    )
    if not all(tp and pp for _, tp, pp in layout):
        raise ValueError(f"{path}: tp and pp in the name must be at least 1")
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:  # told of by line, as no number
        reader = csv.DictReader(file)
        for column in ("arrival_s", "prompt_tokens", "output_tokens"):
            if column not in (reader.fieldnames or ()):
                raise ValueError(f"{path}, line 1: column {column} is missing")
        told = all(column in (reader.fieldnames or ()) for column in ("ttft_s", "tpot_s"))
        rows: list[Row] = []
        outcomes: list[tuple[float, float]] = []
        for row, outcome in _rows(path, reader, told):
            rows.append(row)
            if outcome is not None:
                outcomes.append(outcome)
    if not rows:
        raise ValueError(f"{path} has no requests")
    whole = len(outcomes) == len(rows)
    ttft, tpot = np.array(outcomes).T if whole else (None, None)
    return RealRun(path, colocated, layout, int(named["n"]), float(named["rate"]), tuple(rows), ttft, tpot)


def _rows(path: Path, reader: csv.DictReader[str], told: bool) -> Iterator[tuple[Row, tuple[float, float] | None]]:
    for record in reader:
        where = f"{path}, line {reader.line_num}"
        if None in record or None in record.values():
            raise ValueError(f"{where}: {len(reader.fieldnames or ())} columns are needed")
        arrival_s = _number(where, record, "arrival_s", 0)
        prompt, output = (_number(where, record, name, 1) for name in ("prompt_tokens", "output_tokens"))
        for name, value in (("prompt_tokens", prompt), ("output_tokens", output)):
            if value != int(value):
                raise ValueError(f"{where}: {name} = {record[name]} must be a whole number")
        outcome = None
        if told and record["ttft_s"].strip() and record["tpot_s"].strip():
            outcome = _number(where, record, "ttft_s", 0), _number(where, record, "tpot_s", 0)
        yield Row(reader.line_num, arrival_s, int(prompt), int(output)), outcome


def _number(where: str, record: dict[str, str], name: str, low: float) -> float:
    try:
        value = float(record[name])
    except ValueError:
        raise ValueError(f"{where}: {name} = {record[name]!r} must be a number") from None
    if not low <= value < math.inf:
        raise ValueError(f"{where}: {name} = {record[name]} must be at least {low:g}")
    return value
