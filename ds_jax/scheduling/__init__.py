"""Schedulers: each system of the papers is one, by name; a user's own is `my.module:Scheduler`."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, cast

from ds_jax.config import SchedulerConfig
from ds_jax.protocol import Scheduler

if TYPE_CHECKING:
    from ds_jax.latency import Predictor

POLICIES = {
    "chunked": "ds_jax.scheduling.chunked:Chunked",
    "colocated": "ds_jax.scheduling.colocated:Colocated",
    "deflected": "ds_jax.scheduling.deflected:Deflected",
    "disaggregated": "ds_jax.scheduling.disaggregated:Disaggregated",
    "multiplexed": "ds_jax.scheduling.multiplexed:Multiplexed",
}


def create_scheduler(
    policy: str, options: SchedulerConfig | None = None, predictor: Predictor | None = None
) -> Scheduler:
    """The scheduler of this name, or the class at `module:Class`, built with `(options, predictor)`.

    Args:
        predictor: foretells the step times of an instance, for the policies that ask; None: unknown.

    Raises:
        ValueError: no such policy, module or class.
    """
    target = POLICIES.get(policy, policy)
    module, separator, name = target.partition(":")
    if not separator:
        near = difflib.get_close_matches(policy, POLICIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"policy = {policy!r} is neither one of {', '.join(POLICIES)} nor my.module:Scheduler{hint}")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"policy = {policy!r} cannot be imported: {error}") from error
    return cast(Scheduler, made(options or SchedulerConfig(), predictor))
