"""Devices for every instance: disjoint meshes, in the order of the configuration's groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ds_jax.architecture import Architecture
from ds_jax.config import Config, GroupConfig
from ds_jax.protocol import Role
from models import sharding


class Site(NamedTuple):
    """Where one instance will live."""

    role: Role
    group: GroupConfig
    mesh: Mesh


def sites(config: Config, arch: Architecture, devices: Sequence[jax.Device]) -> list[Site]:
    """One mesh (stage, tensor) per instance, none sharing a device with another.

    Raises:
        ValueError: the model cannot be cut into tp parts, or there are fewer devices than all instances take.
    """
    groups = config.groups()
    for role, group in groups:
        try:
            arch.check_tp(group.tp)
        except ValueError as error:
            raise ValueError(f"{role}.{error}") from None
    if config.devices() > len(devices):
        parts = ", ".join(f"{role} {group.instances}x{group.tp}" for role, group in groups)
        raise ValueError(f"the configuration asks for {config.devices()} devices ({parts}), {len(devices)} exist")
    left = iter(devices)
    return [
        Site(role, group, sharding.make_mesh([next(left) for _ in range(group.tp)], group.tp))
        for role, group in groups
        for _ in range(group.instances)
    ]
