"""Published figures of GPUs: what a step time is worked out from where nothing was measured."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU as its data sheet has it."""

    name: str
    memory_bytes: float
    flops: float
    """Dense 16-bit matrix products per second, in floating-point operations."""
    bytes_per_s: float
    """Bandwidth of its memory."""
    link_bytes_per_s: float
    """Bandwidth to the other GPUs of its node, both directions together (NVLink; PCIe where there is none)."""
    pcie_bytes_per_s: float
    """Bandwidth to host memory, one direction."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 40 * 2**30, 312e12, 1.555e12, 600e9, 32e9),
        Gpu("a100-80g", 80 * 2**30, 312e12, 2.039e12, 600e9, 32e9),
        Gpu("h100-80g", 80 * 2**30, 989e12, 3.35e12, 900e9, 64e9),
        Gpu("h200-141g", 141e9, 989e12, 4.8e12, 900e9, 64e9),
        Gpu("h20-96g", 96e9, 148e12, 4.0e12, 900e9, 64e9),
        Gpu("l40s-48g", 48e9, 362e12, 0.864e12, 64e9, 32e9),
    )
}


def gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        ValueError: no such name.
    """
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"gpu = {name!r} must be one of {', '.join(GPUS)}{hint}")
    return GPUS[name]
