"""Products with weights, in each of their forms on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.projection import MOST_ROWS_RIGHT, project

OUT = 512


def operands(rows: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(rows)
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in ((rows, 256), (OUT, 256)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, MOST_ROWS_RIGHT, MOST_ROWS_RIGHT + 1])
def test_it_is_the_product_with_the_weight_transposed(rows, dtype):
    x, weight = operands(rows, dtype)
    found = jax.jit(project)(x, weight)
    assert found.dtype == x.dtype
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, rtol=2**-7 if dtype == "bfloat16" else 1e-5, atol=1e-3
    )
    assert jax.jit(lambda x, weight: project(x, weight, jnp.float32))(x, weight).dtype == jnp.float32


def test_few_rows_are_the_right_side_of_the_compiled_product():
    """XLA would turn the product round again, and pack the weight at every call."""
    for rows, first in ((MOST_ROWS_RIGHT, OUT), (MOST_ROWS_RIGHT + 1, MOST_ROWS_RIGHT + 1)):
        text = jax.jit(project).lower(*operands(rows, "float32")).compile().as_text()
        (product,) = [line for line in text.splitlines() if " dot(" in line]
        assert f"f32[{first}," in product.split(" dot(")[0]


def test_one_row_takes_a_weight_of_more_axes_as_it_is():
    """XLA would turn all of it to float32 before it takes its rows together."""
    x, weight = operands(1, "bfloat16")
    stored = weight.reshape(2, OUT // 2, 256)
    compiled = jax.jit(lambda x, stored: project(x, stored.reshape(OUT, 256))).lower(x, stored).compile()
    assert f"f32[2,{OUT // 2},256]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < weight.size


@pytest.mark.parametrize("rows", [1, 2, MOST_ROWS_RIGHT])
def test_a_weight_of_a_short_type_is_not_copied(rows):
    x, weight = operands(rows, "bfloat16")
    compiled = jax.jit(project).lower(x, weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weight.size
