"""What is asked of a serving system: when requests arrive, how long they are, and what they expect."""

from ds_jax.workload.arrivals import at_times, evenly, gamma, poisson
from ds_jax.workload.datasets import read_humaneval, read_longbench, read_sharegpt
from ds_jax.workload.lengths import (
    HUMANEVAL,
    LONGBENCH,
    MOONCAKE,
    PUBLISHED,
    SHAREGPT,
    Distribution,
    Empirical,
    Lengths,
    Means,
    QuantileTable,
    fixed,
    uniform,
)
from ds_jax.workload.registry import TraceWorkload, mix, workload
from ds_jax.workload.requests import Phase, RequestClass, SloOf, Submission, Workload, submission, submissions
from ds_jax.workload.trace import Arrival, Replay, read_csv, read_mooncake, read_trace

__all__ = [
    "HUMANEVAL",
    "LONGBENCH",
    "MOONCAKE",
    "PUBLISHED",
    "SHAREGPT",
    "Arrival",
    "Distribution",
    "Empirical",
    "Lengths",
    "Means",
    "Phase",
    "QuantileTable",
    "Replay",
    "RequestClass",
    "SloOf",
    "Submission",
    "TraceWorkload",
    "Workload",
    "at_times",
    "evenly",
    "fixed",
    "gamma",
    "mix",
    "poisson",
    "read_csv",
    "read_humaneval",
    "read_longbench",
    "read_mooncake",
    "read_sharegpt",
    "read_trace",
    "submission",
    "submissions",
    "uniform",
    "workload",
]
