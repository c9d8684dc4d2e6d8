"""Published numbers beside ours: rows of the table *published / ours / why they differ*."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

DISTSERVE = "DistServe, arXiv 2401.09670"
TROPICAL = "Tropical, arXiv 2606.16264"
DEFLECTION = "Prefill Deflection, arXiv 2607.02043"
PUBLIC_SIMULATOR = "DistServe's public simulator"

FROM_MEMORY = "told from memory of the paper"
"""For `Compared.assumed`: the published side is a statement, not a number that was looked up."""


@dataclass(frozen=True)
class Compared:
    """One published number and ours."""

    what: str
    published: str
    ours: str
    why: str = ""
    """Why they differ: only what was measured here, or follows from the systems' rules."""
    source: str = DISTSERVE
    extrapolated: bool = False
    """Ours rests on step times that were worked out and not measured."""
    assumed: str = ""
    """What of the published side, or of how it came about, is from memory and was not checked against its source."""


def rows(compared: Iterable[Compared]) -> list[dict[str, Any]]:
    """For summary.json, key `compared`; experiments.reproduce gathers them."""
    return [asdict(one) for one in compared]


def ratio(value: float | None) -> str:
    """2.5 -> '2.50x'; nothing -> a dash."""
    return "-" if value is None or value != value else f"{value:.2f}x"
