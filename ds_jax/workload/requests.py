"""Workloads: arrivals joined with classes of requests, each class with its lengths, its label and its targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ds_jax.protocol import Request, Slo
from ds_jax.workload.lengths import Distribution, Lengths, stream

SloOf = Callable[[Lengths], Slo | None]
"""Targets that depend on the lengths, such as five times the unloaded prefill."""


class Submission(NamedTuple):
    """One request to come. `output_tokens` is where its stop token will be: known to the world, not to a scheduler."""

    arrival_ns: int
    request: Request
    output_tokens: int | tuple[int, ...]
    """The same for all of its n sequences, or one for each."""
    label: str = ""
    """Its class, under which results are told apart."""


@dataclass(frozen=True)
class RequestClass:
    """Requests of one kind, such as chat or summarisation."""

    label: str
    lengths: Distribution
    slo: Slo | SloOf | None = None
    share: float = 1.0
    """Of all requests, relative to the other classes' shares."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a mix that shifts."""

    duration_s: float
    shares: tuple[float, ...]
    """Of each class, in their order."""


@dataclass(frozen=True)
class Workload:
    """Requests without end but that of their arrivals: every iteration begins anew and gives the same."""

    name: str
    arrivals: Callable[[], Iterable[int]]
    """Makes the stream of arrival times in ns."""
    classes: tuple[RequestClass, ...]
    phases: tuple[Phase, ...] = ()
    """The shares of the classes over time, over and over; empty: the classes' own."""
    seed: int = 0
    max_tokens: int | None = None
    """What requests ask for at most; None: exactly their output, so that a scheduler knows it."""

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError(f"workload {self.name} has no class of requests")
        rows = [tuple(one.share for one in self.classes), *(phase.shares for phase in self.phases)]
        for shares in rows:
            if len(shares) != len(self.classes) or min(shares) < 0 or not sum(shares) > 0:
                raise ValueError(f"workload {self.name}: shares {shares} must be {len(self.classes)} numbers >= 0")
        for phase in self.phases:
            if not phase.duration_s > 0:
                raise ValueError(f"workload {self.name}: duration_s = {phase.duration_s} must be greater than 0")

    @property
    def assumed(self) -> str:
        """What of it nobody has measured; empty if all is known."""
        return "; ".join(dict.fromkeys(one.lengths.assumed for one in self.classes if one.lengths.assumed))

    def __iter__(self) -> Iterator[Submission]:
        choice, *randoms = (np.random.default_rng(one) for one in np.random.SeedSequence(self.seed).spawn(1 + self._n))
        lengths = [iter(stream(one.lengths, random)) for one, random in zip(self.classes, randoms, strict=True)]
        for id, at_ns in enumerate(self.arrivals()):
            index = self._class_at(at_ns, choice.random()) if self._n > 1 else 0
            one = self.classes[index]
            yield submission(id, at_ns, next(lengths[index]), slo=one.slo, max_tokens=self.max_tokens, label=one.label)

    @property
    def _n(self) -> int:
        return len(self.classes)

    def _class_at(self, at_ns: int, level: float) -> int:
        shares = self._shares_at(at_ns / 1e9)
        level *= sum(shares)
        for index, share in enumerate(shares):
            level -= share
            if level < 0:
                return index
        return max(index for index, share in enumerate(shares) if share)

    def _shares_at(self, at_s: float) -> tuple[float, ...]:
        if not self.phases:
            return tuple(one.share for one in self.classes)
        at_s %= sum(phase.duration_s for phase in self.phases)
        for phase in self.phases:
            at_s -= phase.duration_s
            if at_s < 0:
                break
        return phase.shares


def submission(
    id: int,
    at_ns: int,
    lengths: Lengths,
    *,
    slo: Slo | SloOf | None = None,
    max_tokens: int | None = None,
    label: str = "",
) -> Submission:
    """One request, which asks for its own output length unless `max_tokens` is given (and is never cut by it)."""
    prompt, output = lengths
    targets = slo(Lengths(prompt, output)) if callable(slo) else slo
    most = output if max_tokens is None else max(max_tokens, output)
    return Submission(at_ns, Request(id, prompt, most, seed=id, slo=targets), output, label)


def submissions(
    arrivals_ns: Iterable[int], lengths: Iterable[Lengths], *, max_tokens: int | None = None, slo: Slo | None = None
) -> list[Submission]:
    """Join arrival times and lengths, ids counted from 0; `max_tokens` is the output length itself unless given."""
    joined = zip(arrivals_ns, lengths, strict=True)
    return [
        submission(id, at_ns, Lengths(*one), slo=slo, max_tokens=max_tokens) for id, (at_ns, one) in enumerate(joined)
    ]
