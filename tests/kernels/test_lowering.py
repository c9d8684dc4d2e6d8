"""Without a GPU: every kernel is lowered for Hopper, over all that it says it can do."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from kernels import kv_write, paged_decode_attention, paged_prefill_attention
from kernels.mosaic import HEAD_DIMS, PAGE_SIZES, off_gpu

GROUPS = itertools.cycle([1, 4, 8, 16, 7, 64])
"""Query heads that share a KV head: each shape takes the next."""
GRID = [
    (head_dim, size, dtype, group)
    for (head_dim, size, dtype), group in zip(
        itertools.product(HEAD_DIMS, PAGE_SIZES, ("bfloat16", "float16")), GROUPS, strict=False
    )
]


def lowered(function, *shapes) -> str:
    """The program for CUDA."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    with off_gpu():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def options(head_dim: int, size: int) -> dict:
    """Window and cap on half of the grid."""
    return {"scale": head_dim**-0.5} | ({"window": 100, "soft_cap": 30.0} if size in (32, 64) else {})


@pytest.mark.parametrize(("head_dim", "size", "dtype", "group"), GRID)
def test_decode_attention_is_lowered_for_hopper(head_dim: int, size: int, dtype: str, group: int):
    pool = (50, 2, size, head_dim), dtype
    form = functools.partial(paged_decode_attention.attend, backend="mosaic", **options(head_dim, size))
    text = lowered(form, ((4, 2 * group, head_dim), dtype), pool, pool, ((4, 9), jnp.int32), ((4,), jnp.int32))
    assert text.count("mosaic_gpu") >= 2  # attention and combine


@pytest.mark.parametrize(("head_dim", "size", "dtype", "group"), GRID)
def test_prefill_attention_is_lowered_for_hopper(head_dim: int, size: int, dtype: str, group: int):
    pool, row = ((50, 2, size, head_dim), dtype), ((3,), jnp.int32)
    form = functools.partial(paged_prefill_attention.attend, backend="mosaic", **options(head_dim, size))
    text = lowered(form, ((300, 2 * group, head_dim), dtype), pool, pool, ((3, 9), jnp.int32), row, row, row)
    assert "mosaic_gpu" in text


def test_what_a_backend_cannot_do_falls_to_xla_with_one_warning_that_names_the_reason(caplog):
    pool = (50, 2, 24, 64), "bfloat16"
    arguments = ((4, 4, 64), "bfloat16"), pool, pool, ((4, 9), jnp.int32), ((4,), jnp.int32)
    for scale in (0.1, 0.2):
        text = lowered(functools.partial(paged_decode_attention.attend, scale=scale), *arguments)
        assert "mosaic_gpu" not in text
    (record,) = caplog.records
    operation, reason = record.getMessage().split(": ")
    assert operation == "paged decode attention runs as plain XLA, not as the mosaic kernel"
    assert reason == "the page size 24 is none of 16, 32, 64, 128"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "reason"),
    [
        ("float32", 64, 4, "queries are float32 and pages float32, but both must be bfloat16 or both float16"),
        ("bfloat16", 72, 4, "the head size 72 is none of 64, 80, 96, 128, 256"),
        ("bfloat16", 64, 130, "65 query heads share a KV head, more than 64"),
    ],
)
def test_the_reason_is_the_shape_or_type_that_does_not_fit(dtype, head_dim, heads, reason, caplog):
    pool = (50, 2, 16, head_dim), dtype
    arguments = ((4, heads, head_dim), dtype), pool, pool, ((4, 9), jnp.int32), ((4,), jnp.int32)
    assert "mosaic_gpu" not in lowered(functools.partial(paged_decode_attention.attend, scale=0.3), *arguments)
    assert reason in caplog.records[-1].getMessage()


def test_a_kernel_for_another_platform_is_not_taken_here_even_if_asked_for(caplog):
    q, pool = jnp.ones((1, 2, 64), jnp.bfloat16), jnp.ones((2, 1, 16, 64), jnp.bfloat16)
    table, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    out = paged_decode_attention.attend(q, pool, pool, table, lengths, scale=0.7, backend="mosaic")
    assert out.shape == q.shape
    assert "it is for NVIDIA Hopper, and this is cpu" in caplog.records[-1].getMessage()


def test_a_backend_can_be_forced():
    pool = (50, 2, 16, 64), "bfloat16"
    arguments = ((4, 4, 64), "bfloat16"), pool, pool, ((4, 9), jnp.int32), ((4,), jnp.int32)
    auto = lowered(functools.partial(paged_decode_attention.attend, scale=0.1), *arguments)
    assert "mosaic_gpu" in auto
    for backend in ("xla", "definition"):
        form = functools.partial(paged_decode_attention.attend, scale=0.1, backend=backend)
        assert "mosaic_gpu" not in lowered(form, *arguments)
    assert kv_write.FORMS.keys() == {"xla", "definition"}
