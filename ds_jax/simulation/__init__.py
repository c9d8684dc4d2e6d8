"""The virtual-time executor: the same schedulers, on a latency model instead of devices."""

from ds_jax.simulation.contract import Contract
from ds_jax.simulation.executor import Simulation, VirtualTime, simulate
from ds_jax.simulation.latency import LatencyModel, LinearLatency, Links, PlacedLatency
from ds_jax.simulation.ownership import Violation
from ds_jax.simulation.recorded import RecordedDurations, recorded_workload, steps_of

__all__ = [
    "Contract",
    "LatencyModel",
    "LinearLatency",
    "Links",
    "PlacedLatency",
    "RecordedDurations",
    "Simulation",
    "Violation",
    "VirtualTime",
    "recorded_workload",
    "simulate",
    "steps_of",
]
