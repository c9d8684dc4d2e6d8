"""How long steps and copies take, and how much KV fits: no device is asked, figures are.

A scheduler that foretells gets a `Predictor`; the simulator runs on a truth of its own, so that the two can differ.
"""

from ds_jax.latency.capacity import fewest_gpus, kv_tokens
from ds_jax.latency.fitted import FittedStepTime, StepFit
from ds_jax.latency.gpus import GPUS, Gpu, gpu
from ds_jax.latency.paper import PaperForm, paper_form
from ds_jax.latency.profile import LatencyProfile, load
from ds_jax.latency.roofline import roofline
from ds_jax.latency.step_time import Chunk, Predictor, StepTime
from ds_jax.latency.wrong import Scaled, wrong_by

__all__ = [
    "GPUS",
    "Chunk",
    "FittedStepTime",
    "Gpu",
    "LatencyProfile",
    "PaperForm",
    "Predictor",
    "Scaled",
    "StepFit",
    "StepTime",
    "fewest_gpus",
    "gpu",
    "kv_tokens",
    "load",
    "paper_form",
    "roofline",
    "wrong_by",
]
