"""Imports only go down, planning needs no jax, and the package is lazy."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ds_jax

CHECKOUT = Path(__file__).resolve().parent.parent

_SCHEMA = {"ds_jax.config", "ds_jax.protocol", "ds_jax.sampling", "ds_jax.architecture", "ds_jax.errors", "ds_jax.plan"}
_PLANNING = _SCHEMA | {f"ds_jax.{name}" for name in (
    "attainment", "latency", "metrics", "recorder", "scheduling", "workload")}  # fmt: skip
_ENGINE = _PLANNING | {"ds_jax.runtime", "ds_jax.text", "ds_jax.detokenize", "models", "kernels"}

# What each place may import of ours beside itself, from the top down. A name stands for a module and all below it,
# except "ds_jax", which is the lazy package alone.
ARROWS: dict[str, set[str]] = {
    "experiments": _ENGINE | {"ds_jax"} | {f"ds_jax.{name}" for name in (
        "async_engine", "engine", "flags", "knobs", "llm", "placement", "server", "simulation", "timeline")},
    "configs": _SCHEMA,
    "ds_jax.server": _SCHEMA | {f"ds_jax.{name}" for name in (
        "async_engine", "engine", "metrics", "text", "detokenize")},
    "ds_jax": {"ds_jax.llm", "ds_jax.async_engine", "ds_jax.config", "ds_jax.sampling"},
    "ds_jax.llm": _ENGINE | {"ds_jax.engine"},
    "ds_jax.async_engine": _ENGINE | {"ds_jax.engine"},
    "ds_jax.engine": _ENGINE,
    "ds_jax.text": {"ds_jax.protocol", "ds_jax.detokenize"},
    "ds_jax.detokenize": set(),
    "ds_jax.runtime": _SCHEMA | {"ds_jax", "models", "kernels"},
    "models": {"kernels", "ds_jax.config", "ds_jax.architecture"},
    "kernels": set(),
    # no jax below this line
    "ds_jax.flags": {"ds_jax.config", "ds_jax.knobs"},
    "ds_jax.knobs": set(),
    "ds_jax.placement": _PLANNING | {"ds_jax.simulation"},
    "ds_jax.simulation": _PLANNING,
    "ds_jax.scheduling": {"ds_jax.protocol", "ds_jax.config", "ds_jax.latency"},
    "ds_jax.timeline": {"ds_jax.protocol", "ds_jax.recorder", "ds_jax.metrics"},
    "ds_jax.recorder": {"ds_jax.protocol"},
    "ds_jax.attainment": {"ds_jax.protocol", "ds_jax.metrics"},
    "ds_jax.workload": {"ds_jax.protocol", "ds_jax.metrics"},
    "ds_jax.metrics": {"ds_jax.protocol"},
    "ds_jax.latency": {"ds_jax.config", "ds_jax.architecture", "ds_jax.protocol"},
    "ds_jax.architecture": set(),
    "ds_jax.errors": set(),
    "ds_jax.sampling": set(),
    "ds_jax.config": {"ds_jax.protocol"},
    "ds_jax.plan": {"ds_jax.config"},
    "ds_jax.protocol": set(),
}  # fmt: skip
_NO_JAX = ["ds_jax", *list(ARROWS)[list(ARROWS).index("ds_jax.flags") :]]
_JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}


@functools.cache
def _modules() -> dict[str, Path]:
    """Every module of ours by its name."""
    named = {}
    for root in ("ds_jax", "models", "kernels", "experiments", "configs"):
        for path in sorted((CHECKOUT / root).rglob("*.py")):
            parts = path.relative_to(CHECKOUT).with_suffix("").parts
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def _within(module: str, place: str) -> bool:
    return module == place or (place != "ds_jax" and module.startswith(f"{place}."))


def _place_of(module: str) -> str | None:
    """The row of the table that a module belongs to."""
    return max((place for place in ARROWS if _within(module, place)), key=len, default=None)


def _imports_of(module: str) -> Iterator[str]:
    """All that a module imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(_modules()[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import: name modules in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if _place_of(whole) not in (None, _place_of(node.module or "")) else str(node.module)


def test_every_module_has_its_row_in_the_table_of_arrows():
    assert [module for module in _modules() if _place_of(module) is None] == []


def test_imports_only_go_down():
    upwards = [
        f"{module} imports {imported}"
        for module in _modules()
        for imported in _imports_of(module)
        if imported.split(".")[0] in {"ds_jax", "models", "kernels", "experiments", "configs"}
        and _place_of(imported) != _place_of(module)
        and not any(_within(imported, allowed) for allowed in ARROWS.get(_place_of(module) or "", ()))
    ]
    assert upwards == []


def test_kernels_import_only_jax_and_numpy():
    known = {"kernels", "jax", "jaxlib", "numpy", "jaxtyping"} | sys.stdlib_module_names
    foreign = [
        f"{module} imports {imported}"
        for module in _modules()
        if _place_of(module) == "kernels"
        for imported in _imports_of(module)
        if imported.split(".")[0] not in known
    ]
    assert foreign == []


def test_the_half_that_plans_imports_with_jax_blocked():
    planning = [module for module in _modules() if _place_of(module) in _NO_JAX]
    assert {"ds_jax", "ds_jax.config", "ds_jax.protocol", "ds_jax.flags"} <= set(planning)
    script = f"import sys; sys.modules.update(dict.fromkeys({sorted(_JAX)}))\n" + "\n".join(
        f"import {module}" for module in planning
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_is_lazy():
    script = (
        "import sys, ds_jax\n"
        "before = {name for name in sys.modules if name.startswith('ds_jax.')}\n"
        "assert not before, before\n"
        "ds_jax.Config, ds_jax.SamplingParams\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_offers_its_four_names_and_no_others():
    from ds_jax.async_engine import AsyncEngine
    from ds_jax.config import Config
    from ds_jax.llm import LLM
    from ds_jax.sampling import SamplingParams

    assert (ds_jax.LLM, ds_jax.AsyncEngine, ds_jax.SamplingParams, ds_jax.Config) == (
        LLM,
        AsyncEngine,
        SamplingParams,
        Config,
    )
    with pytest.raises(AttributeError, match="Engine2"):
        ds_jax.Engine2  # noqa: B018


def test_another_package_named_models_is_named_in_the_error(tmp_path):
    foreign = tmp_path / "models"
    foreign.mkdir()
    (foreign / "__init__.py").touch()
    script = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(CHECKOUT)!r}]; import ds_jax; ds_jax.LLM"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert "ImportError" in done.stderr and f"{foreign}/__init__.py) shadows the one of DS-JAX" in done.stderr
