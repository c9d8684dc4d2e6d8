"""Choosing between an operation's forms, by platform, type and shape."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

log = logging.getLogger(__name__)

Backend = Literal["auto", "mosaic", "xla", "definition"]
Form = Callable[..., Any]

PREFERRED: Mapping[str, tuple[str, ...]] = {"gpu": ("mosaic", "xla")}
"""What auto tries on each platform, in this order; on all others it takes XLA's form."""


def platform() -> tuple[str, str]:
    """The platform that programs are made for at this moment, and the kind of its devices.

    Where an abstract device is set (`kernels.mosaic.off_gpu`) it is that device's, else the default backend's.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return {"cuda": "gpu"}.get(device.platform, device.platform), device.device_kind


def choose(
    operation: str,
    backend: str,
    forms: Mapping[str, Form],
    refusals: Mapping[str, Callable[..., str | None]] | None = None,
) -> Form:
    """The form that `backend` names; auto takes the first that the platform prefers.

    Args:
        operation: its name, for messages.
        backend: auto, or a key of `forms`.
        forms: what there is.
        refusals: for forms that cannot do everything: (arguments of the call) -> why not, or None. A form that cannot
            do what it is called for, asked for or not, is replaced by XLA's with one warning.

    Raises:
        ValueError: no such form.
    """
    if backend != "auto" and backend not in forms:
        raise ValueError(f"backend = {backend!r} must be auto or one of {', '.join(forms)}")

    def call(*arrays: Any, **options: Any) -> Any:
        # Inside loops arrays are indexed with traced values, which numpy's own arrays refuse.
        arrays = tuple(None if array is None else jnp.asarray(array) for array in arrays)
        wanted = [backend] if backend != "auto" else [n for n in PREFERRED.get(platform()[0], ()) if n in forms]
        name = wanted[0] if wanted else "xla"
        refuses = (refusals or {}).get(name)
        if refuses is not None and (reason := refuses(*arrays, **options)):
            warn_once(operation, name, reason)
            name = "xla"
        return forms[name](*arrays, **options)

    return call


@functools.cache
def warn_once(operation: str, name: str, reason: str) -> None:
    """Say why a form is not taken, the first time that this is the reason."""
    log.warning("%s runs as plain XLA, not as the %s kernel: %s", operation, name, reason)
