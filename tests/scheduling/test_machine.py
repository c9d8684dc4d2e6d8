"""Every scheduler goes through the conformance machine."""

from ds_jax.scheduling.disaggregated import Disaggregated
from tests.scheduling.machine import conformance

TestDisaggregated = conformance(Disaggregated)
