"""How many devices JAX offers on a machine without an accelerator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

_CONFIG = """
import jax
from ds_jax.config import Config, DecodeConfig, PrefillConfig
from ds_jax.runtime.platform import force_host_devices
config = Config(prefill=PrefillConfig(instances=2, tp=2), decode=DecodeConfig(tp=1))
"""


def _run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _CONFIG + script],
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_as_many_host_devices_are_forced_as_the_configuration_asks_for():
    done = _run("force_host_devices(config); print(jax.device_count())")
    assert done.stdout == "5\n", done.stderr


def test_a_number_that_the_user_set_stays():
    done = _run("force_host_devices(config); print(jax.device_count())", JAX_NUM_CPU_DEVICES="6")
    assert done.stdout == "6\n", done.stderr


def test_asking_too_late_says_what_to_do():
    done = _run("jax.devices()\nforce_host_devices(config)", JAX_NUM_CPU_DEVICES="2")
    assert "asks for 5 devices, but JAX has already started with 2 CPU devices" in done.stderr
