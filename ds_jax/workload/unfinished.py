"""Lengths of requests of which some still run: those that have ended are the shorter ones.

A request that runs and has given k tokens so far is known to be longer than k. The Kaplan-Meier estimate (1958) makes
of both kinds the distribution of lengths; each one that runs is then given a length from its part beyond k.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ds_jax.workload.lengths import Lengths
from ds_jax.workload.monitor import Observation


def kaplan_meier(ended: Sequence[int], running: Sequence[int]) -> tuple[list[int], list[float]]:
    """The lengths that there are, and the share of requests that is longer than each.

    Args:
        ended: lengths of requests that have ended.
        running: tokens so far of those that have not.
    """
    values = sorted(set(ended))
    counts = Counter(ended)
    every, still = sorted(ended), sorted(running)
    survival, shares = 1.0, []
    for value in values:
        at_risk = len(every) - bisect_right(every, value - 1) + len(still) - bisect_right(still, value - 1)
        survival *= 1 - counts[value] / at_risk
        shares.append(survival)
    return values, shares


def finished(
    requests: Sequence[Observation], so_far: Callable[[int], int], seed: int = 0
) -> tuple[list[Lengths], float]:
    """Lengths of all these requests, drawn for those that run, and the share of outputs of which nothing is known.

    Args:
        so_far: tokens that a request, by id, has given.

    Returns:
        The lengths; and the share of requests that are longer than all that have ended: 1 if none has.
    """
    ended = [one.output_tokens for one in requests if one.output_tokens is not None]
    running = {one.id: so_far(one.id) for one in requests if one.output_tokens is None}
    values, shares = kaplan_meier(ended, list(running.values()))
    random = np.random.default_rng(seed)
    lengths = []
    for one in requests:
        if one.output_tokens is not None:
            lengths.append(Lengths(one.prompt_tokens, one.output_tokens))
            continue
        first = bisect_right(values, running[one.id])
        beyond = shares[first - 1] if first else 1.0
        level = beyond * random.random()
        index = next((at for at in range(first, len(values)) if shares[at] <= level), None)
        if index is None:
            index = len(values) - 1
        lengths.append(Lengths(one.prompt_tokens, max(values[index] if values else 1, running[one.id], 1)))
    return lengths, shares[-1] if shares else 1.0
