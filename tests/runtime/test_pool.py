"""How large pools are, how long sequences can be, and what is refused before anything is loaded or compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

import ds_jax.runtime.executor
from ds_jax.architecture import Architecture
from ds_jax.config import CacheConfig, Config, DecodeConfig, MixedConfig, ModelConfig, PrefillConfig
from ds_jax.protocol import Role
from ds_jax.runtime import mesh, pool
from ds_jax.runtime.executor import InProcessExecutor
from ds_jax.runtime.pool import memory_bytes, page_bytes, plan, useful_pages
from ds_jax.runtime.shapes import slot_buckets, token_buckets
from models.transformer import abstract_params
from tests.runtime.harness import write_config

ARCH = Architecture("llama", 61, 32, 2, 4, 2, 8, 48, max_positions=512)


def planned(config: Config, dtype: str = "float32") -> pool.Plan:
    sites = mesh.sites(config, ARCH, jax.devices())
    params = [abstract_params(ARCH, site.group.tp, dtype, site.mesh)[1] for site in sites]
    return plan(config, ARCH, dtype, sites, params)


def config_of(pages: int = 0, size: int = 16, length: int = 0, fraction: float = 0.9, **groups: Any) -> Config:
    groups = {"prefill": PrefillConfig(), "decode": DecodeConfig(), **groups}
    model, cache = ModelConfig(max_model_len=length), CacheConfig(size, pages, fraction)
    return Config(model=model, cache=cache, **groups)


def memory(monkeypatch: pytest.MonkeyPatch, limit_bytes: int) -> None:
    monkeypatch.setattr(pool, "memory_bytes", lambda device, devices, fraction: limit_bytes)


def test_a_pool_is_no_larger_than_can_be_used():
    sizes = planned(config_of()).shapes
    assert [shapes.pages for shapes in sizes] == [
        useful_pages(PrefillConfig(), 512, 16),
        useful_pages(DecodeConfig(), 512, 16),
    ]
    assert sizes[1].pages == (32 + 1) * 512 // 16


def test_a_pool_takes_what_memory_is_left_beside_weights_and_marks(monkeypatch: pytest.MonkeyPatch):
    weights, page = ARCH.parameters() * 4, page_bytes(ARCH, "float32", 1, 16)
    marks = [8 * 61 * rows for rows in (PrefillConfig().max_step_sequences, DecodeConfig().slots)]
    memory(monkeypatch, weights + max(marks) + 100 * page + 17)
    more = [(max(marks) - one + 17) // page for one in marks]
    assert [shapes.pages for shapes in planned(config_of()).shapes] == [100 + one for one in more]


def test_devices_that_share_heads_hold_more_pages():
    assert page_bytes(ARCH, "float32", 1, 16) == 2 * 2 * 2 * 16 * 8 * 4
    assert page_bytes(ARCH, "float32", 2, 16) * 2 == page_bytes(ARCH, "float32", 1, 16)
    assert page_bytes(ARCH, "float32", 4, 16) == page_bytes(ARCH, "float32", 2, 16), "heads are held twice"
    assert page_bytes(ARCH, "bfloat16", 1, 16) * 2 == page_bytes(ARCH, "float32", 1, 16)


def test_the_given_number_of_pages_is_taken_as_it_is():
    assert [shapes.pages for shapes in planned(config_of(pages=4000)).shapes] == [4000, 4000]


@pytest.mark.parametrize(
    "pages, asked, length, reason",
    [(4000, 0, 512, "model"), (20, 0, 320, "pool"), (32, 0, 512, "model"), (20, 320, 320, "model")],
)
def test_sequences_are_as_long_as_model_and_pool_allow(pages: int, asked: int, length: int, reason: str):
    result = planned(config_of(pages=pages, length=asked))
    assert (result.max_model_len, result.limit_reason) == (length, reason)
    assert all(shapes.table_pages == -(-length // 16) for shapes in result.shapes)


@pytest.mark.parametrize(
    "config, message",
    [
        (config_of(length=513), "model.max_model_len = 513 must be at most 512, the positions that the model has"),
        (
            config_of(pages=20, length=400),
            "the prefill pool of 20 pages of 16 tokens holds 320 tokens, fewer than model.max_model_len = 400: "
            "raise cache.num_pages, or lower model.max_model_len",
        ),
        (
            config_of(pages=1),
            "the prefill pool of 1 pages of 16 tokens holds 16 tokens, too few for one prompt token and 16 of "
            "output: raise cache.num_pages",
        ),
        (config_of(fraction=1e-9), "cache.memory_fraction = 1e-09 gives each prefill device 0 MiB, too little"),
        (
            config_of(prefill=PrefillConfig(tp=2), decode=DecodeConfig(instances=2, tp=4)),
            r"asks for 10 devices \(prefill 1x2, decode 2x4\), 8 exist",
        ),
        (config_of(prefill=PrefillConfig(tp=3)), "prefill.tp = 3 does not divide the model's 4 attention heads"),
        (config_of(decode=DecodeConfig(tp=8)), "decode.tp = 8 does not divide the model's 4 attention heads"),
    ],
)
def test_what_cannot_serve_is_refused_in_one_sentence(config: Config, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        planned(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model, groups, message",
    [
        ({"load_format": "safetensors"}, {}, "has no weights"),
        ({}, {"cache": CacheConfig(num_pages=1)}, "too few"),
        ({}, {"decode": DecodeConfig(tp=3)}, "decode.tp = 3"),
        ({}, {"decode": DecodeConfig(instances=9)}, "10 devices"),
    ],
)
def test_an_executor_refuses_before_it_is_built(tmp_path: Path, model: Any, groups: Any, message: str):
    model = ModelConfig(path=write_config(tmp_path), **{"load_format": "dummy", **model})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        InProcessExecutor(Config(model=model, **groups))


def test_a_cpu_gets_its_share_of_the_free_host_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool, "_free_host_bytes", lambda: 1000)
    assert memory_bytes(jax.devices()[0], 5, 0.8) == 1000 * pool.HOST_SHARE * 0.8 / 5


def test_an_accelerators_own_account_counts():
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 1000, "bytes_in_use": 100}

    device: Any = Device()
    assert memory_bytes(device, 5, 0.8) == 700


def test_meshes_are_disjoint_and_in_the_order_of_the_groups():
    config = config_of(
        prefill=PrefillConfig(instances=2, tp=2), decode=DecodeConfig(tp=2), mixed=MixedConfig(instances=1)
    )
    sites = mesh.sites(config, ARCH, jax.devices())
    assert [site.role for site in sites] == [Role.PREFILL, Role.PREFILL, Role.DECODE, Role.MIXED]
    used = [device.id for site in sites for device in site.mesh.devices.flat]
    assert used == sorted(set(used)) and len(used) == 7
    assert sites[0].mesh.shape == {"stage": 1, "tensor": 2}


@pytest.mark.parametrize(
    "group, length, buckets",
    [
        (PrefillConfig(), 4096, (32, 64, 128, 256, 512, 1024, 2048)),
        (PrefillConfig(), 300, (32, 64, 128, 256, 512)),
        (PrefillConfig(max_step_tokens=100), 300, (32, 64, 100)),
        (PrefillConfig(max_step_tokens=20), 300, (20,)),
        (PrefillConfig(token_buckets=(64, 16), max_step_tokens=2048), 300, (16, 64)),
        (PrefillConfig(token_buckets=(16, 64, 256), max_step_tokens=60), 300, (16, 64)),
        (DecodeConfig(), 300, ()),
    ],
)
def test_step_sizes_to_compile(group: Any, length: int, buckets: tuple[int, ...]):
    assert token_buckets(group, length) == buckets


@pytest.mark.parametrize(
    "group, buckets",
    [
        (DecodeConfig(slots=16), (16,)),
        (DecodeConfig(slots=17), (1, 16, 17)),
        (MixedConfig(slots=512), (1, 16, 256, 512)),
        (MixedConfig(slots=8, slot_buckets=(4, 2, 8, 64, 4)), (2, 4, 8)),
        (PrefillConfig(), ()),
    ],
)
def test_batches_to_compile(group: Any, buckets: tuple[int, ...]):
    assert slot_buckets(group) == buckets


def test_the_dtype_is_float32_on_a_cpu_unless_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_config(tmp_path, torch_dtype="bfloat16")
    chosen: list[str] = []

    def stop(config: Config, arch: Architecture, dtype: str, *_: Any) -> None:
        chosen.append(dtype)
        raise ValueError("enough")

    monkeypatch.setattr(ds_jax.runtime.executor, "plan", stop)
    for dtype in ("auto", "bfloat16", "float16"):
        model: Any = ModelConfig(path=path, load_format="dummy", dtype=dtype)
        with pytest.raises(ValueError, match="enough"):
            InProcessExecutor(Config(model=model))
    assert chosen == ["float32", "bfloat16", "float16"]
