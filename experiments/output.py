"""What an experiment leaves behind: a folder with summary.json, the resolved configuration, tables and figures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
"""Paul Tol's bright colours: told apart by everybody, also in grey."""


class Output:
    """The folder of one run."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json."""
        self.json("summary.json", values)

    def config(self, config: Any) -> None:
        """Write config.json, the resolved configuration."""
        self.json("config.json", dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config)  # type: ignore[arg-type]

    def json(self, name: str, values: Any) -> None:
        """Write any JSON file; what is not a number becomes null."""
        text = json.dumps(_plain(values), indent=1, ensure_ascii=False)
        (self.folder / name).write_text(text + "\n", encoding="utf-8")

    def text(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def figure(self, name: str, figure: Figure) -> None:
        """Write NAME.svg and close the figure."""
        import matplotlib.pyplot as plt

        figure.savefig(self.folder / f"{name}.svg", bbox_inches="tight")
        plt.close(figure)


def axes(rows: int = 1, columns: int = 1, *, width: float = 4.2, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels, in the style of all our figures; panels row by row.

    Args:
        width, height: of one panel, in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "axes.prop_cycle": plt.cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.25,
        "font.size": 9,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "ds_jax",
    }
    plt.rcParams.update(style)
    figure, panels = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    figure.set_layout_engine("constrained")
    return figure, list(panels.flat)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of text, the first one flush left, numbers to four digits."""
    lines = [list(header), *([_cell(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown = []
    for index, (first, *others) in enumerate(lines):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        shown.append("  ".join(cells).rstrip())
        if index == 0:
            shown.append("  ".join("-" * width for width in widths))
    return "\n".join(shown)


def merged(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Notes of many runs, (where, note), each once and with every place that it is from.

    Two that differ only in the value that was outside a measured range are one: the first stands for all.
    """
    places: dict[str, dict[str, None]] = {}
    sentences: dict[str, str] = {}
    for where, note in notes:
        kind = re.sub(r"\d+ is outside", "is outside", note)
        sentences.setdefault(kind, note)
        places.setdefault(kind, {})[where] = None
    return [f"{sentence} ({', '.join(places[kind])})" for kind, sentence in sentences.items()]


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "item"):  # a NumPy scalar
        return _plain(value.item())
    return value
