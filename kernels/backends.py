"""Choosing between an operation's forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp

Backend = Literal["auto", "xla", "definition"]


def choose(backend: str, forms: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The form that `backend` names; auto takes XLA's.

    Raises:
        ValueError: no such form.
    """
    name = "xla" if backend == "auto" else backend
    if name not in forms:
        raise ValueError(f"backend = {backend!r} must be auto or one of {', '.join(forms)}")
    form = forms[name]
    # Inside loops arrays are indexed with traced values, which numpy's own arrays refuse.
    return lambda *arrays, **options: form(*map(jnp.asarray, arrays), **options)
