"""Which mesh axis each logical axis of a parameter lies on: the one table, and what follows from it.

A mesh has the axes ("stage", "tensor"). Tensor parallelism cuts attention by heads and the MLP by its width
(Megatron-LM, section 3), experts by their number, and the vocabulary of embedding and output weights; all else is on
every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STAGE, TENSOR = "stage", "tensor"

MESH_AXIS: dict[str, str | None] = {
    "vocab": TENSOR,
    "kv_heads": TENSOR,
    "heads": TENSOR,
    "mlp": TENSOR,
    "experts": TENSOR,
    "expert_mlp": None,
    "router": None,
    "embed": None,
    "token_width": None,
    "position": None,
    "head_dim": None,
    "qkv": None,
    "inputs": None,
    "pages": None,
    "slots": None,
}
"""Logical axis -> mesh axis. "qkv" counts a KV head's queries, key and value; "inputs" the MLP's gate and up."""

POOL_AXES = ("pages", "kv_heads", "slots", "head_dim")
"""Logical axes of one layer's keys or values in the KV pool."""


def make_mesh(devices: Sequence[jax.Device], tp: int) -> Mesh:
    """The mesh of one instance: 1 stage by `tp` devices.

    Raises:
        ValueError: the number of devices is not tp.
    """
    if len(devices) != tp:
        raise ValueError(f"an instance with tp = {tp} needs {tp} devices, got {len(devices)}")
    return Mesh(np.asarray(devices).reshape(1, tp), (STAGE, TENSOR))


def spec_of(axes: Sequence[str]) -> PartitionSpec:
    """The partition of an array with these logical axes."""
    return PartitionSpec(*(MESH_AXIS[axis] for axis in axes))


def sharding_of(axes: Sequence[str], mesh: Mesh) -> NamedSharding:
    """The sharding on `mesh` of an array with these logical axes."""
    return NamedSharding(mesh, spec_of(axes))
