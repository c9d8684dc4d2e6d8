"""Every form of the mixture of experts against its definition, and the definition against a loop in NumPy."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import expert_mlp

TOKENS, EXPERTS, WIDTH, EMBED, PER_TOKEN = 70, 3, 5, 4, 2
FORMS = {
    "definition": functools.partial(expert_mlp.apply, backend="definition"),
    "xla": expert_mlp.apply,
    "ragged": expert_mlp.xla.ragged,  # What the XLA form is elsewhere than on the CPU
}
FORMS = {name: jax.jit(functools.partial(form, activation=jax.nn.silu)) for name, form in FORMS.items()}


def numbers(seed: int, dtype=np.float32) -> list[np.ndarray]:
    """x, up, down and the weights of the experts."""
    random = np.random.default_rng(seed)
    shapes = (TOKENS, EMBED), (EXPERTS, 2, WIDTH, EMBED), (EXPERTS, EMBED, WIDTH)
    weights = random.random((TOKENS, PER_TOKEN), np.float32)
    return [*(random.normal(size=shape).astype(dtype) for shape in shapes), weights]


def test_the_definition_is_the_weighted_sum_of_the_chosen_mlps():
    x, up, down, weights = numbers(0)
    chosen = np.random.default_rng(1).integers(-2, EXPERTS + 2, (TOKENS, PER_TOKEN))
    expected = np.zeros((TOKENS, EMBED))
    for t, j in np.ndindex(TOKENS, PER_TOKEN):
        if 0 <= (expert := chosen[t, j]) < EXPERTS:
            gate, inputs = up[expert] @ x[t]
            expected[t] += weights[t, j] * (down[expert] @ (gate / (1 + np.exp(-gate)) * inputs))
    np.testing.assert_allclose(FORMS["definition"](x, up, down, chosen, weights), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["xla", "ragged"])
@settings(max_examples=15)
@given(seed=st.integers(0, 1000), experts=st.sets(st.integers(-1, EXPERTS), min_size=PER_TOKEN))
def test_every_form_equals_the_definition_whoever_is_chosen(form: str, seed: int, experts: set[int]):
    """Also with all tokens at one expert, more than a block of them, and with experts that live elsewhere."""
    x, up, down, weights = numbers(seed)
    random = np.random.default_rng(seed)
    chosen = np.stack([random.choice(sorted(experts), PER_TOKEN, replace=False) for _ in range(TOKENS)])
    expected = FORMS["definition"](x, up, down, chosen, weights)
    np.testing.assert_allclose(FORMS[form](x, up, down, chosen, weights), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["xla", "ragged"])
def test_half_precision_is_summed_in_float32(form: str):
    x, up, down, weights = numbers(0, jax.numpy.bfloat16)
    chosen = np.random.default_rng(1).integers(0, EXPERTS, (TOKENS, 1)) + np.array([[0, 1]])
    out = FORMS[form](x, up, down, chosen, weights)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, FORMS["definition"](x, up, down, chosen, weights), atol=0.1, rtol=0.02)
