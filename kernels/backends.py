"""Choosing between an operation's forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

Backend = Literal["auto", "xla", "definition"]


def choose(backend: str, forms: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The form that `backend` names; auto takes XLA's.

    Raises:
        ValueError: no such form.
    """
    name = "xla" if backend == "auto" else backend
    if name not in forms:
        raise ValueError(f"backend = {backend!r} must be auto or one of {', '.join(forms)}")
    return forms[name]
