"""What is asked of a serving system: when requests arrive, and how long they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ds_jax.protocol import Request, Slo
from ds_jax.workload.arrivals import evenly, poisson
from ds_jax.workload.lengths import Lengths, fixed, uniform

__all__ = ["Lengths", "Submission", "evenly", "fixed", "poisson", "submissions", "uniform"]


class Submission(NamedTuple):
    """One request to come. `output_tokens` is where its stop token will be: known to the world, not to a scheduler."""

    arrival_ns: int
    request: Request
    output_tokens: int | tuple[int, ...]
    """The same for all of its n sequences, or one for each."""


def submissions(
    arrivals_ns: Iterable[int], lengths: Iterable[Lengths], *, max_tokens: int | None = None, slo: Slo | None = None
) -> list[Submission]:
    """Join arrival times and lengths, ids counted from 0; `max_tokens` is the output length itself unless given."""
    return [
        Submission(at_ns, Request(id, prompt, max_tokens or output, seed=id, slo=slo), output)
        for id, (at_ns, (prompt, output)) in enumerate(zip(arrivals_ns, lengths, strict=True))
    ]
