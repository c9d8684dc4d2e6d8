"""How many tokens of KV an instance holds, and how few GPUs it can have."""

from __future__ import annotations

import math

from ds_jax.architecture import DTYPE_BYTES, Architecture
from ds_jax.latency.gpus import Gpu

USABLE = 0.925
"""Share of a GPU's memory for weights and KV; the rest is for activations, the runtime and what is lost between blocks.
With it, the capacities of DistServe's table for A100-80G come out within 0.8 % for OPT-13B and OPT-66B, and 3.1 % for
OPT-175B."""


def weight_bytes_per_gpu(arch: Architecture, dtype: str, tp: int, pp: int) -> float:
    """Bytes of weights on each GPU of an instance, layers spread evenly over its stages."""
    return arch.parameters() * DTYPE_BYTES[dtype] / (tp * pp)


def kv_tokens(arch: Architecture, gpu: Gpu, dtype: str, tp: int, pp: int) -> int:
    """Tokens of KV that an instance with this parallelism holds beside its weights; 0 if not even these fit."""
    free = USABLE * gpu.memory_bytes - weight_bytes_per_gpu(arch, dtype, tp, pp)
    per_token = arch.kv_bytes_per_token_per_device(dtype, tp) / pp
    return max(0, math.floor(free / per_token))


def fewest_gpus(arch: Architecture, gpu: Gpu, dtype: str, tokens: int) -> int:
    """GPUs from which on an instance holds the weights and this many tokens, however they are shared."""
    needed = arch.parameters() * DTYPE_BYTES[dtype] + tokens * arch.kv_bytes_per_token(dtype)
    return math.ceil(needed / (USABLE * gpu.memory_bytes))
