"""What was found to be fastest on a device: one small file per kind of device under kernels/tuned/.

    {"device": "NVIDIA H200", "date": "…", "decode": {"128/64": {"stages": 3, "workers_per_core": 2}}, "prefill": {…}}

The key is head size / page size. What has no entry takes the kernels' own defaults.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "tuned"


def file_of(device_kind: str) -> Path:
    """Where the choices for a device lie: "NVIDIA H200" -> nvidia_h200.json."""
    return FOLDER / f"{'_'.join(device_kind.lower().split())}.json"


def chosen(operation: str, device_kind: str, head_dim: int, page_size: int) -> dict[str, Any]:
    """Fields of the kernel's Tuning that were found best for these sizes on this device; empty: nothing was found."""
    return dict(_table(device_kind).get(operation, {}).get(f"{head_dim}/{page_size}", {}))


@functools.cache
def _table(device_kind: str) -> dict[str, Any]:
    path = file_of(device_kind)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        log.warning("%s is not used: %s", path, error)
        return {}
