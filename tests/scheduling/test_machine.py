"""Every scheduler goes through the conformance machine."""

from typing import Any

from ds_jax.config import SchedulerConfig
from ds_jax.protocol import Role
from ds_jax.scheduling.chunked import Chunked
from ds_jax.scheduling.colocated import Colocated
from ds_jax.scheduling.disaggregated import Disaggregated
from tests.scheduling.machine import conformance


def _chunked(order: Any, budget: int = 8) -> Any:
    return lambda: Chunked(SchedulerConfig(chunk_order=order, token_budget=budget))


TestDisaggregated = conformance(Disaggregated)
TestColocated = conformance(Colocated, roles=(Role.MIXED,))
TestSarathi = conformance(_chunked("sarathi"), roles=(Role.MIXED,), max_examples=60)
TestSplitFuse = conformance(_chunked("splitfuse"), roles=(Role.MIXED,), max_examples=60)
TestVllmV1 = conformance(_chunked("vllm_v1"), roles=(Role.MIXED,), max_examples=60)
TestSwap = conformance(lambda: Disaggregated(SchedulerConfig(preemption="swap")), max_examples=60)
TestColocatedSwap = conformance(
    lambda: Colocated(SchedulerConfig(preemption="swap")), roles=(Role.MIXED,), max_examples=60
)
