"""Which devices JAX will offer, settled before it starts a backend."""

from __future__ import annotations

import os
from typing import Literal

import jax

from ds_jax import check_siblings
from ds_jax.config import Config

_COUNT_FLAG = "xla_force_host_platform_device_count"
_ONEDNN: dict[str, bool | str] = {
    "xla_cpu_experimental_onednn_custom_call": True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",  # All others it would take first.
}


def waits_at_branches(device: jax.Device) -> bool:
    """Whether the host decides the branches of a program that runs on this device.

    XLA:GPU copies a conditional's predicate to the host and waits for it, so that the next step is not queued behind
    this one, and neither conditionals nor loops enter a CUDA graph. Others branch where they compute.
    """
    return device.platform in ("gpu", "cuda", "rocm")


def compiler_options(device: jax.Device, dtype: str, cpu_matmul: Literal["ynnpack", "onednn"]) -> dict[str, bool | str]:
    """XLA's options for programs of a model of this type on this device.

    oneDNN is left out of short types: where the processor has no instructions for them, it takes its reference
    implementation, hundreds of times as long.
    """
    wanted = device.platform == "cpu" and dtype == "float32" and cpu_matmul == "onednn"
    return dict(_ONEDNN) if wanted else {}


def force_host_devices(config: Config) -> None:
    """Let the CPU backend offer as many devices as the configuration asks for.

    Call it before anything touches a device. Harmless where an accelerator serves: only the CPU backend reads the
    number. A number in XLA_FLAGS is the user's own, and stays.

    Raises:
        ImportError: another package `models` or `kernels` shadows ours.
        ValueError: JAX has already started with fewer CPU devices.
    """
    check_siblings()
    wanted = max(config.devices(), 1)
    if _COUNT_FLAG in os.environ.get("XLA_FLAGS", "") or jax.config.jax_num_cpu_devices >= wanted:
        return
    try:
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:
        present = len(jax.devices("cpu"))
        if jax.default_backend() == "cpu" and present < wanted:
            raise ValueError(
                f"the configuration asks for {wanted} devices, but JAX has already started with {present} CPU devices: "
                f"set jax_num_cpu_devices = {wanted} before the first use of JAX"
            ) from None
