"""Workloads by name, in one line: `workload("sharegpt", rate=4.0, cv=4.0, count=10_000, seed=1)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_jax.protocol import Slo
from ds_jax.workload.arrivals import evenly, gamma, poisson
from ds_jax.workload.lengths import PUBLISHED, Distribution, Means
from ds_jax.workload.requests import Phase, RequestClass, SloOf, Submission, Workload, submission
from ds_jax.workload.trace import Replay


@dataclass(frozen=True)
class TraceWorkload:
    """A recorded trace as a workload: times, lengths and their order are the trace's own."""

    replay: Replay
    slo: Slo | SloOf | None = None
    max_tokens: int | None = None
    label: str = ""
    assumed: str = ""

    @property
    def name(self) -> str:
        return Path(self.replay.path).stem

    def __iter__(self) -> Iterator[Submission]:
        for id, (at_ns, lengths) in enumerate(self.replay):
            yield submission(id, at_ns, lengths, slo=self.slo, max_tokens=self.max_tokens, label=self.label)


def arrivals(rate: float, cv: float, count: int | None, seed: int) -> Callable[[], Iterable[int]]:
    """A maker of arrival streams: cv 1 is Poisson, 0 evenly, anything else Gamma.

    Raises:
        ValueError: rate or cv is out of range.
    """
    if cv == 0:
        evenly(rate)
        return lambda: evenly(rate, count)
    if cv == 1:
        poisson(rate)
        return lambda: poisson(rate, count, seed)
    gamma(rate, cv)
    return lambda: gamma(rate, cv, count, seed)


def workload(
    name: str,
    *,
    rate: float | None = None,
    cv: float = 1.0,
    count: int | None = None,
    seed: int = 0,
    slo: Slo | SloOf | None = None,
    max_tokens: int | None = None,
    skip: int = 0,
) -> Workload | TraceWorkload:
    """A workload by name.

    Args:
        name: `sharegpt`, `humaneval`, `longbench`, `mooncake` (a stand-in from its means); `PROMPT/OUTPUT`, two means
            such as `512/64`; or the path of a trace (.csv, or .jsonl in Mooncake's form).
        rate: requests/s; needed for all but a trace, which then runs as recorded.
        cv: coefficient of variation of the gaps: 1 Poisson, 0 evenly, above 1 bursty. A trace has its own.
        count: requests; None: without end, or to the end of the trace.
        skip: requests at the start of a trace to leave out.

    Raises:
        ValueError: no such name, or a value out of range.
    """
    if name.endswith((".csv", ".jsonl")):
        return TraceWorkload(Replay(name, rate, count, skip), slo, max_tokens)
    if rate is None:
        raise ValueError(f"workload {name!r} needs a rate in requests/s")
    classes = (RequestClass(name, _lengths(name), slo),)
    return Workload(name, arrivals(rate, cv, count, seed), classes, seed=seed, max_tokens=max_tokens)


def mix(
    classes: Iterable[RequestClass],
    *,
    rate: float,
    cv: float = 1.0,
    count: int | None = None,
    seed: int = 0,
    phases: Iterable[Phase] = (),
    max_tokens: int | None = None,
) -> Workload:
    """Classes of requests together; with phases their shares shift over time.

    Raises:
        ValueError: a share, duration, rate or cv out of range.
    """
    every = tuple(classes)
    name = "+".join(one.label for one in every)
    return Workload(name, arrivals(rate, cv, count, seed), every, tuple(phases), seed, max_tokens)


def _lengths(name: str) -> Distribution:
    if name in PUBLISHED:
        return PUBLISHED[name]
    prompt, slash, output = name.partition("/")
    try:
        if slash:
            return Means(float(prompt), float(output))
    except ValueError as error:
        raise ValueError(f"workload {name!r}: {error}") from None
    known = ", ".join(PUBLISHED)
    raise ValueError(f"workload {name!r} is none of {known}, no PROMPT/OUTPUT means, and no .csv or .jsonl trace")
