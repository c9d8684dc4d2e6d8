"""Training makes the loss fall, and what it writes is what the checkpoint reader reads."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds_jax.architecture import Architecture
from experiments.story import data, export
from experiments.story.forward import causal_attention, forward
from experiments.story.tokenizer import train_tokenizer
from models.checkpoint import load_params, open_checkpoint
from models.sharding import make_mesh

pytest.importorskip("optax", reason="training needs the extra `train`")
from experiments.story import training

logits_of = jax.jit(forward, static_argnums=0)

ARCH = Architecture("llama", 300, 32, 2, 4, 2, 8, 80, 128, tie_embeddings=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(data.texts(0, 50), ARCH.vocab_size)


@pytest.fixture(scope="module")
def params():
    return training.initial_params(ARCH, 0)


def test_attention_in_blocks_is_causal_attention():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 50, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    attention = jax.jit(functools.partial(causal_attention, scale=0.3, block=16))
    expected = jax.nn.dot_product_attention(q, k, v, scale=0.3, is_causal=True)
    np.testing.assert_allclose(attention(q, k, v), expected, atol=1e-5)


def test_a_later_token_changes_no_earlier_logits(params):
    tokens = jnp.arange(40).reshape(2, 20)
    logits = logits_of(ARCH, params, tokens)
    changed = logits_of(ARCH, params, tokens.at[:, 12].set(299))
    np.testing.assert_allclose(logits[:, :12], changed[:, :12], atol=1e-5)
    assert not np.allclose(logits[:, 12:], changed[:, 12:], atol=1e-3)


def test_padding_does_not_count_in_the_loss(params):
    loss_of = jax.jit(training.loss_of, static_argnums=0)
    row = jnp.arange(21)[None]
    padded = jnp.concatenate([row, jnp.full((1, 10), data.PADDING)], axis=1)
    np.testing.assert_allclose(loss_of(ARCH, params, row), loss_of(ARCH, params, padded), rtol=1e-5)


def test_a_few_steps_reduce_the_loss(tokenizer):
    params = training.initial_params(ARCH, 1)
    optimizer = training.make_optimizer(1e-2, 30, 5)
    state, step, losses = optimizer.init(params), training.make_step(ARCH, optimizer), []
    for rows in itertools.islice(data.batches(tokenizer, 0, 4, 65), 30):
        params, state, loss = step(params, state, rows)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(ARCH.vocab_size), abs=1.5)
    assert np.mean(losses[-5:]) < losses[0] - 1.5


def test_an_exported_folder_loads_to_the_same_weights_at_any_tp(params, tokenizer, tmp_path):
    export.export(tmp_path, ARCH, params, tokenizer, "float32")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.arch == ARCH and checkpoint.dtype == "float32" and checkpoint.eos_token_ids == (0,)
    assert "chat_template" in json.loads((tmp_path / "tokenizer_config.json").read_text())
    for tp in (1, 2):
        loaded = load_params(checkpoint, make_mesh(jax.devices()[:tp], tp), jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_an_interrupted_run_goes_on_where_it_was(params, tmp_path):
    optimizer = training.make_optimizer(1e-3, 10, 2)
    state = optimizer.init(params)
    export.save_state(tmp_path / "state.npz", 7, [3.0, 2.5], params, state)
    step, losses, (params_again, state_again) = export.load_state(tmp_path / "state.npz", params, state)
    assert step == 7 and losses == [3.0, 2.5]
    jax.tree.map(np.testing.assert_array_equal, (params_again, state_again), (params, state))
    other = training.initial_params(Architecture("llama", 300, 32, 1, 4, 2, 8, 80, 128), 0)
    with pytest.raises(ValueError, match="state of another model"):
        export.load_state(tmp_path / "state.npz", other, state)
