"""What every test runs under: eight host devices, a compilation cache kept between runs, repeatable examples.

Tests run on the CPU. `pytest -m gpu` asks for the GPU tests, and only then is JAX left to pick the platform.
"""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
from absl import flags

CHECKOUT = Path(__file__).resolve().parent.parent

# XLA:CPU reads this when its backend starts. With fewer threads than forced host devices, programs with collectives on
# disjoint meshes can wait for each other for ever ("rendezvous termination timeout").
os.environ.setdefault("NPROC", "16")

hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("ci")  # --hypothesis-profile=long looks further, at other examples each time


def pytest_addoption(parser: pytest.Parser) -> None:
    """What tests/engine/test_goldens.py can be asked for beside what it does every time."""
    parser.addoption("--every-placement", action="store_true", help="serve every golden at every placement")
    parser.addoption("--goldens", type=Path, help="a folder of others, made by tests/goldens/make_goldens.py")


def _gpu_tests_are_asked_for(config: pytest.Config) -> bool:
    return str(config.getoption("markexpr", "")).strip() == "gpu"


def pytest_configure(config: pytest.Config) -> None:
    """Set JAX up before any test module can start a backend; processes that tests start inherit it."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CHECKOUT / ".cache" / "xla-tests")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    if not _gpu_tests_are_asked_for(config):
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu`, with the reason, where they cannot run."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if not _gpu_tests_are_asked_for(config):
        reason = "runs on a GPU only: pytest -m gpu"
    else:
        import jax

        if jax.default_backend() == "gpu":
            return
        reason = f"needs a GPU, but JAX found only the platform {jax.default_backend()}"
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


_define = flags.FlagValues.__setitem__


def _define_again(values: flags.FlagValues, name: str, flag: flags.Flag) -> None:
    """Launchers define flags of the same names, which is an error in one process; here many are imported into one."""
    flag.allow_override = True
    _define(values, name, flag)


flags.FlagValues.__setitem__ = _define_again  # type: ignore[method-assign]
