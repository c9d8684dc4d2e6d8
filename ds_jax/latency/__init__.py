"""How long steps and copies take, and how much KV fits: no device is asked, figures are.

A scheduler that foretells gets a `Predictor`; the simulator runs on a truth of its own, so that the two can differ.
"""

from ds_jax.latency.fitted import FittedStepTime, StepFit
from ds_jax.latency.profile import LatencyProfile, load
from ds_jax.latency.step_time import Chunk, Predictor, StepTime

__all__ = ["Chunk", "FittedStepTime", "LatencyProfile", "Predictor", "StepFit", "StepTime", "load"]
