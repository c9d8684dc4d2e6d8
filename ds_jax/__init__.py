"""DS-JAX: serving of large language models with prefill and decoding disaggregated, on JAX.

    from ds_jax import LLM, Config, SamplingParams

    llm = LLM(Config())
    outputs = llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))

Nothing is imported before it is asked for, so planning and simulation (`ds_jax.scheduling`, `ds_jax.simulation`, …)
never import jax.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_jax.async_engine import AsyncEngine as AsyncEngine
    from ds_jax.config import Config as Config
    from ds_jax.llm import LLM as LLM
    from ds_jax.sampling import SamplingParams as SamplingParams

__all__ = ["LLM", "AsyncEngine", "Config", "SamplingParams", "check_siblings"]

_HOME = {"LLM": "llm", "AsyncEngine": "async_engine", "SamplingParams": "sampling", "Config": "config"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ds_jax' has no attribute {name!r}")
    if name in ("LLM", "AsyncEngine"):
        check_siblings()
    return getattr(importlib.import_module(f"ds_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def check_siblings() -> None:
    """Make sure that `models` and `kernels`, import names of their own beside `ds_jax`, are ours.

    Raises:
        ImportError: another package of that name comes first on sys.path, or none is found.
    """
    here = Path(__file__).resolve().parent.parent
    for name in ("models", "kernels"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"package {name!r} is missing: it belongs beside ds_jax, in {here}")
        found = Path(spec.origin or next(iter(spec.submodule_search_locations or ()), "?")).resolve()
        if here / name not in (found, found.parent):
            raise ImportError(
                f"another package {name!r} ({found}) shadows the one of DS-JAX ({here / name}): "
                f"take its folder off sys.path, or start Python in another folder"
            )
