"""One suite that every backend of paged attention runs, held against the definition in float32."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import paged_decode_attention, paged_prefill_attention, platforms
from kernels.mosaic import off_gpu
from kernels.paged_decode_attention import mosaic as decode_mosaic
from kernels.paged_prefill_attention import mosaic as prefill_mosaic
from tests.kernels.paged_cases import DECODE, PREFILL, TOLERANCE, Case

SIDE_BY_SIDE = {"over": platforms.side_by_side}
"""What XLA's forms do elsewhere than on the CPU."""


def interpreted(attend: Any, *arguments: jax.Array, **options: Any) -> jax.Array:
    """A kernel for Hopper in the interpreter: copies, barriers and products are carried out on the host."""
    with off_gpu():
        return attend(*arguments, interpret=plgpu.InterpretGPUParams(), **options)


# Few workers, so that one goes over the border between sequences, and one sequence over the border between workers.
FEW_WORKERS = decode_mosaic.Tuning(cores=3, workers_per_core=1, stages=2)
DECODE_FORMS = {
    "xla": paged_decode_attention.xla.attend,
    "xla side by side": functools.partial(paged_decode_attention.xla.over_sequences, **SIDE_BY_SIDE),
    "mosaic, interpreted": functools.partial(interpreted, decode_mosaic.attend, tuning=FEW_WORKERS),
}
PREFILL_FORMS = {
    "xla": paged_prefill_attention.xla.attend,
    "xla side by side": functools.partial(paged_prefill_attention.xla.over_heads, **SIDE_BY_SIDE),
    "mosaic, interpreted": functools.partial(interpreted, prefill_mosaic.attend),
}


def check(form: Any, definition: Any, case: Case, arguments: list[jax.Array]) -> None:
    wide = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arguments]
    expected = jax.jit(functools.partial(definition, **case.options))(*wide)
    out = form(*arguments, **case.options)
    assert out.dtype == case.dtype
    np.testing.assert_allclose(np.float32(out), expected, atol=TOLERANCE[case.dtype], rtol=0)


@pytest.mark.parametrize("case", DECODE, ids=str)
@pytest.mark.parametrize("form", DECODE_FORMS)
def test_decode_attention_equals_its_definition(form: str, case: Case):
    check(DECODE_FORMS[form], paged_decode_attention.definition.attend, case, case.arguments(decode=True))


@pytest.mark.parametrize("case", PREFILL, ids=str)
@pytest.mark.parametrize("form", PREFILL_FORMS)
def test_prefill_attention_equals_its_definition(form: str, case: Case):
    check(PREFILL_FORMS[form], paged_prefill_attention.definition.attend, case, case.arguments(decode=False))


def check_on_a_gpu(package: Any, case: Case, decode: bool) -> None:
    form = jax.jit(functools.partial(package.attend, backend="mosaic", **case.options))
    check(lambda *x, **_: form(*x), package.definition.attend, case, case.arguments(decode))


UNEVEN = (1023, 0, 5, 8191, 64, 300)
"""Tokens of six sequences that decode."""
CHUNKS = (0, 1000, 0, 17), (700, 129, 3, 1)
SMOKE = [("bfloat16", 128, 64), ("float16", 64, 16), ("bfloat16", 80, 16), ("bfloat16", 256, 128), ("bfloat16", 96, 32)]
"""Types, head and page sizes that stand for all: each takes another path. The first are those that models need most."""


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "head_dim", "page_size"), SMOKE)
def test_smoke_of_decode_attention_on_a_gpu(dtype: str, head_dim: int, page_size: int):
    window, cap = (None, None) if page_size != 16 else (100, 30.0)
    lengths = tuple(int(x > 0) for x in UNEVEN)
    case = Case("uneven lengths", UNEVEN, lengths, 32, 8, head_dim, page_size, dtype, window, cap)
    check_on_a_gpu(paged_decode_attention, case, decode=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "head_dim", "page_size"), SMOKE)
def test_smoke_of_prefill_attention_on_a_gpu(dtype: str, head_dim: int, page_size: int):
    window, cap = (None, None) if page_size != 16 else (100, 30.0)
    case = Case("mixed chunks", *CHUNKS, 8, 2, head_dim, page_size, dtype, window, cap, padding=100)
    check_on_a_gpu(paged_prefill_attention, case, decode=False)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decode_attention_on_a_gpu_equals_its_definition(dtype: str, head_dim: int, page_size: int):
    shape = (32, 8, head_dim, page_size, dtype)
    for case in (
        Case("many lengths", UNEVEN, tuple(int(x > 0) for x in UNEVEN), *shape),
        Case("window and cap", UNEVEN, (1,) * len(UNEVEN), *shape, 100, 30.0),
        Case("one head each", (2000, 3), (1, 1), 8, 8, *shape[2:]),
    ):
        check_on_a_gpu(paged_decode_attention, case, decode=True)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_prefill_attention_on_a_gpu_equals_its_definition(dtype: str, head_dim: int, page_size: int):
    shape = (8, 2, head_dim, page_size, dtype)
    for case in (
        Case("mixed chunks", *CHUNKS, *shape, padding=100),
        Case("window and cap", *CHUNKS, *shape, 100, 30.0),
    ):
        check_on_a_gpu(paged_prefill_attention, case, decode=False)
