"""The module on its own: plain use on one device, half precision, and odd input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ds_jax.architecture import Architecture
from models.checkpoint import load_params, open_checkpoint
from models.sharding import make_mesh
from models.transformer import Transformer, abstract_model, params_of
from tests.goldens import CASES, Golden
from tests.models import plain


def logits_of(model: Transformer, tokens: jax.Array) -> jax.Array:
    attend = functools.partial(plain.attention, model.arch)
    return model.logits(model(tokens, jnp.arange(len(tokens)), attend))


def loaded(golden: Golden, dtype: str) -> Transformer:
    checkpoint = open_checkpoint(golden.folder)
    params = load_params(checkpoint, make_mesh(jax.devices()[:1], 1), dtype)
    return nnx.merge(nnx.graphdef(abstract_model(checkpoint.arch, 1, dtype)), params)


@pytest.mark.parametrize("golden", CASES, ids=lambda golden: golden.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.4), ("float16", 0.06)])
def test_without_a_mesh_the_logits_are_those_of_transformers_as_far_as_the_type_can_tell(
    golden: Golden, dtype: str, tolerance: float
):
    model = loaded(golden, dtype)
    answer = golden.answers()[1]
    logits = jax.jit(logits_of)(model, jnp.array(answer.prompt))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, answer.prefill_logits, atol=tolerance, rtol=0)
    assert np.median(np.abs(logits - answer.prefill_logits)) < tolerance / 4


def test_a_new_model_has_logits_of_about_unit_size_and_a_gradient_for_every_parameter():
    arch = Architecture("llama", 40, 16, 1, 4, 2, 4, 24, 32)
    model = jax.jit(lambda: Transformer(arch, rngs=nnx.Rngs(0)))()
    tokens = jnp.arange(12) * 3
    assert 0.3 < jnp.std(jax.jit(logits_of)(model, tokens)) < 3

    @nnx.jit
    def gradient(model):
        def loss(model):
            return -jax.nn.log_softmax(logits_of(model, tokens))[jnp.arange(11), tokens[1:]].mean()

        return nnx.grad(loss)(model)

    gradients = params_of(gradient(model))
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("golden", CASES, ids=lambda golden: golden.name)
def test_tokens_and_positions_of_padding_may_be_anything(golden: Golden):
    model = loaded(golden, "float32")

    @jax.jit
    def run(model):
        return model(jnp.array([-5, 10**9]), jnp.array([-9, 10**6]), lambda _layer, q, k, v: q)

    assert np.all(np.isfinite(run(model)))
