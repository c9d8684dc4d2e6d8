"""Step times from the figures of a GPU and of a model, for what was never measured: marked *extrapolated*.

Every step reads the weights once and pays an overhead per layer; on top of that come the matrix products of its tokens,
the exchange of activations between the GPUs of a layer, and attention, which multiplies for prompts and reads KV for
decodes. Each is a published figure times an efficiency. The efficiencies are one set for all models: with them, the
steps of OPT-13B and OPT-66B that DistServe fitted on A100-80G (tp 1 to 8, prompts of 1 to 1,500 tokens, batches of 1 to
64) come out within 15 % up to tp 4, and 8 to 22 % too fast at tp 8.
"""

from __future__ import annotations

from collections.abc import Iterable

from ds_jax.architecture import DTYPE_BYTES, Architecture
from ds_jax.latency.capacity import kv_tokens
from ds_jax.latency.fitted import StepFit
from ds_jax.latency.gpus import Gpu
from ds_jax.latency.profile import LatencyProfile

LAYER_OVERHEAD_S = 170e-6
WEIGHT_READ = 0.9
"""Of the memory bandwidth, when weights are read."""
KV_READ = 0.62
"""Of the memory bandwidth, when KV is read page by page."""
PREFILL_MATMUL = 0.8
"""Of the matrix rate, in prompts."""
PREFILL_ATTENTION = 0.15
DECODE_MATMUL = 0.55
"""Share of a decode's matrix products that is seen beside the reading of weights, in batches up to LARGE_BATCH."""
LARGE_MATMUL = 0.6
"""Of the matrix rate, in larger batches."""
LARGE_BATCH = 95
EXCHANGE = 0.6
"""Of one direction of the links, when the GPUs of a layer add up their results."""


def step_fit(arch: Architecture, gpu: Gpu, dtype: str, tp: int) -> StepFit:
    """Coefficients of the three-coefficient form for one tensor parallelism. All stages together, as in `StepFit`."""
    width = DTYPE_BYTES[dtype]
    rate = gpu.flops * (2 / width if width > 2 else 1) * tp
    bandwidth = gpu.bytes_per_s * tp
    layers, hidden = arch.num_layers, arch.hidden_size
    active = _active_parameters(arch)
    base = layers * LAYER_OVERHEAD_S + arch.parameters() * width / (WEIGHT_READ * bandwidth)
    per_token = 2 * active / rate
    exchanged = 2 * layers * hidden * width * 2 * (tp - 1) / tp  # two sums per layer; bytes of a token in a ring
    exchange = exchanged / (EXCHANGE * gpu.link_bytes_per_s / 2)
    # Scores and weighted sums take 4 H D operations for each pair of tokens, half of which the causal mask leaves out.
    per_square = 2 * layers * arch.num_heads * arch.head_dim / (PREFILL_ATTENTION * rate)
    per_context = arch.kv_bytes_per_token_per_device(dtype, tp) / (KV_READ * gpu.bytes_per_s)
    small, large = DECODE_MATMUL * per_token + exchange, per_token / LARGE_MATMUL + exchange
    return StepFit(
        tp,
        prefill=(base, per_token / PREFILL_MATMUL + exchange, per_square),
        decode=(base, per_context, small),
        decode_large=(base - LARGE_BATCH * (large - small), per_context, large),
        large_batch=LARGE_BATCH,
    )


def roofline(
    arch: Architecture, gpu: Gpu, dtype: str, *, model: str = "", tps: Iterable[int] | None = None
) -> LatencyProfile:
    """A latency profile for every tensor parallelism up to 16 that fits the model."""
    possible = [tp for tp in (tps or range(1, 17)) if _splits(arch, tp)]
    capacities = {
        f"{tp},{pp}": kv_tokens(arch, gpu, dtype, tp, pp)
        for tp in possible
        for pp in range(1, arch.num_layers + 1)
        if arch.num_layers % pp == 0
    }
    return LatencyProfile(
        device=gpu.name,
        model=model or arch.family,
        dtype=dtype,
        fits={tp: step_fit(arch, gpu, dtype, tp) for tp in possible},
        source="roofline of published figures",
        kv_tokens=capacities,
        kv_bytes_per_token=arch.kv_bytes_per_token(dtype),
        copy_bytes_per_s=gpu.link_bytes_per_s / 2,
        host_bytes_per_s=gpu.pcie_bytes_per_s,
        extrapolated=True,
    )


def _active_parameters(arch: Architecture) -> int:
    """Parameters that take part in the products of one token: no embedding table, of the experts only those chosen."""
    tables = arch.vocab_size * arch.token_width * (0 if arch.tie_embeddings else 1)
    total = arch.parameters() - tables
    if arch.experts is not None:
        idle = arch.experts.count - arch.experts.per_token
        total -= arch.num_layers * idle * 3 * arch.hidden_size * arch.intermediate_size
    return total


def _splits(arch: Architecture, tp: int) -> bool:
    try:
        arch.check_tp(tp)
    except ValueError:
        return False
    return True
