"""The page of experiments.reproduce: one HTML file, nothing fetched, light and dark, narrow and wide."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --dim: #5f6368; --line: #dadce0; --back: #ffffff; --card: #f6f7f8;
        --accent: #2f5f95; --warn: #b3441e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e7e9; --dim: #a0a4aa; --line: #3a3d42; --back: #16181b; --card: #1f2226; --accent: #8ab8ea;
          --warn: #f0906a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text);
       background: var(--back); }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem; }
a { color: var(--accent); } p, li { max-width: 46rem; } .dim { color: var(--dim); font-size: .9rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem .9rem; font-size: .9rem; }
figure { margin: .8rem 0; padding: .6rem; background: #ffffff; border: 1px solid var(--line); border-radius: 8px;
         overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
@media (max-width: 40rem) { figure img.wide { max-width: none; width: 52rem; } }
pre { overflow-x: auto; background: var(--card); padding: .7rem; border-radius: 8px; font-size: .8rem; }
.failed { color: var(--warn); font-weight: 600; }
.mark { color: var(--warn); font-style: italic; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem; border-bottom: 1px solid var(--line);
         overflow-wrap: anywhere; }
th { position: sticky; top: 0; background: var(--back); }
td:nth-child(1) { width: 24%; } td:nth-child(2) { width: 15%; } td:nth-child(3) { width: 24%; }
@media (max-width: 40rem) {
  thead { display: none; } tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0; }
  td, td:nth-child(n) { display: block; width: auto; border: 0; padding: .1rem 0; }
  td::before { content: attr(data-name) ": "; color: var(--dim); } td:first-child::before { content: ""; }
  td:first-child { font-weight: 600; } }
"""


NOT_RUN = "not run"
"""Error of an outcome that there is none of."""


@dataclass(frozen=True)
class Experiment:
    """One launcher with its flags."""

    name: str
    """Of its folder and its section of the page."""
    module: str
    shows: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    """In place of full sizes."""


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    experiment: Experiment
    seconds: float | None
    """None: it was not run now."""
    error: str = ""
    printed: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    figures: tuple[Path, ...] = ()
    quick: bool = False
    """Made with tiny sizes, now or earlier."""
    cpu_s: float | None = None
    """Processor seconds that it took."""
    arguments: tuple[str, ...] = ()
    """Flags that it was run with."""


def page(outcomes: Sequence[Outcome], compared: Sequence[dict[str, Any]]) -> str:
    """The whole document.

    Args:
        compared: rows of the table, as `gathered.gather` gives them.
    """
    shown = [one for one in outcomes if one.error != NOT_RUN]
    links = " ".join(f'<a href="#{one.experiment.name}">{html.escape(one.experiment.name)}</a>' for one in shown)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>DS-JAX: the papers' evaluation, reproduced</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        "<h1>The papers' evaluation, reproduced</h1>\n"
        "<p>Every figure and number is simulated: the schedulers are those of the engine, step times come from "
        "latency profiles. <em>Public rules</em> are the rules, step times and host work of the published code, and "
        "look at the percentiles of TTFT and of TPOT apart, as it does; <em>joint</em> (our rules) gives all systems "
        "the same step times and asks for both targets together. Each section and row says how many requests a run "
        'has. What is <span class="mark">extrapolated</span> rests on step times that were worked out from data '
        'sheets, never measured; what is <span class="mark">assumed</span> is told from memory, or taken to be so '
        f"because nothing says.</p>\n{_warnings(outcomes)}\n<nav>{links}</nav>\n"
        f'<h2 id="published">Published, ours, and why they differ</h2>\n{_table(compared)}\n'
        f"{''.join(map(_section, shown))}</body>\n</html>\n"
    )


def _warnings(outcomes: Sequence[Outcome]) -> str:
    """What a reader must know before anything else."""
    told = []
    for names, text in (
        ([one.experiment.name for one in outcomes if one.quick], "Made with --quick, the numbers mean nothing"),
        ([one.experiment.name for one in outcomes if one.error == NOT_RUN], "Not run"),
        ([one.experiment.name for one in outcomes if one.error not in ("", NOT_RUN)], "Failed"),
    ):
        if names:
            told.append(f'<p class="failed">{text}: {html.escape(", ".join(names))}.</p>')
    return "\n".join(told)


def _table(compared: Sequence[dict[str, Any]]) -> str:
    names = ("number", "published", "ours", "why they differ")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for one in compared:
        ours = "".join(f' <span class="mark">{mark}</span>' for mark in ("extrapolated", "quick") if one.get(mark))
        assumed = f'<br><span class="mark">assumed:</span> {html.escape(one["assumed"])}' if one["assumed"] else ""
        cells = (
            f'{html.escape(one["what"])}<br><span class="dim">{html.escape(one["source"])}</span>',
            html.escape(one["published"]) + assumed,
            html.escape(one["ours"]) + ours,
            html.escape(one["why"]),
        )
        cells_html = "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in zip(names, cells, strict=True))
        rows.append(f"<tr>{cells_html}</tr>")
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"


def _section(one: Outcome) -> str:
    name = one.experiment.name
    parts = [f'<section id="{name}">\n<h2>{html.escape(one.experiment.shows)}</h2>\n']
    if one.error:
        parts.append(f'<p class="failed">failed: {html.escape(one.error)}</p>\n')
    if one.quick:
        parts.append('<p class="failed">made with --quick: tiny sizes, the numbers mean nothing</p>\n')
    if one.seconds is not None:
        cpu = "" if one.cpu_s is None else f", {one.cpu_s:.0f} of processor time"
        flags = html.escape(" ".join(("", *one.arguments)))
        parts.append(f'<p class="dim">experiments.{one.experiment.module}{flags}: {one.seconds:.0f} s{cpu}</p>\n')
    if requests := one.summary.get("requests"):
        counts = requests.items() if isinstance(requests, dict) else ()
        told = ", ".join(f"{count} by the {rule} rule" for rule, count in counts) or str(requests)
        if "search_requests" in one.summary:
            told += f"; placements were found in runs of {one.summary['search_requests']} at most"
        parts.append(f'<p class="dim">requests a run: {html.escape(told)}</p>\n')
    if marked := one.summary.get("extrapolated"):
        which = f" of {', '.join(marked)}" if isinstance(marked, list) else ""
        parts.append(
            f'<p class="mark">extrapolated: step times{html.escape(which)} are worked out from data sheets</p>\n'
        )
    for mark in ("assumed", "notes"):
        if sentences := one.summary.get(mark):
            items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
            name = "assumed" if mark == "assumed" else "beyond what was measured"
            parts.append(f'<div class="dim"><span class="mark">{name}</span><ul>{items}</ul></div>\n')
    for path in one.figures:
        # An image element keeps the styles and ids of figures apart from each other's.
        svg = base64.b64encode(path.read_bytes()).decode()
        title = html.escape(f"{one.experiment.shows}: {path.stem}")
        parts.append(f'<figure><img class="wide" alt="{title}" src="data:image/svg+xml;base64,{svg}"></figure>\n')
    if one.printed.strip():
        parts.append(f"<details><summary>printed</summary><pre>{html.escape(one.printed.strip())}</pre></details>\n")
    parts.append("</section>\n")
    return "".join(parts)
