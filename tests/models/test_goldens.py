"""The model against Hugging Face transformers, on small random checkpoints, at several tp."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from ds_jax.architecture import Architecture
from kernels import kv_write, paged_decode_attention, paged_prefill_attention
from models.checkpoint import load_params, open_checkpoint
from models.sharding import POOL_AXES, TENSOR, make_mesh, sharding_of, spec_of
from models.transformer import abstract_params, partition_specs
from tests.goldens import CASES, Golden

TPS = (1, 2, 4)
PAGE = 8
EVERYWHERE = PartitionSpec()


class Loaded:
    """One golden on a mesh, and programs made of its model's parts."""

    def __init__(self, golden: Golden, tp: int):
        checkpoint = open_checkpoint(golden.folder)
        self.arch: Architecture = checkpoint.arch
        self.mesh = make_mesh(jax.devices()[:tp], tp)
        self.graphdef, abstract = abstract_params(self.arch, tp, jnp.float32, self.mesh)
        self.specs = partition_specs(abstract)
        self.params = load_params(checkpoint, self.mesh, jnp.float32)
        self.kv_heads = self.arch.stored_kv_heads(tp)

    def program(self, function, in_specs, out_specs):
        """function(model, *arrays) on the mesh; the parameters are put in front."""

        def local(params, *arrays):
            return function(nnx.merge(self.graphdef, params), *arrays)

        mapped = jax.shard_map(
            local, mesh=self.mesh, in_specs=(self.specs, *in_specs), out_specs=out_specs, check_vma=False
        )
        return functools.partial(jax.jit(mapped), self.params)

    def empty_pool(self, pages: int):
        shape = (pages, self.kv_heads, PAGE, self.arch.head_dim)
        layer = jax.device_put(np.full(shape, np.nan, np.float32), sharding_of(POOL_AXES, self.mesh))
        return [(layer, layer)] * self.arch.num_layers


def causal(scale, _layer, q, k, v):
    """Plain attention of one whole sequence."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("thd,shd->hts", q, k) * scale
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -jnp.inf)
    return jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v)


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("golden", CASES, ids=lambda golden: golden.name)
def test_logits_after_every_prompt_token_are_those_of_transformers(golden: Golden, tp: int):
    loaded = Loaded(golden, tp)
    attend = functools.partial(causal, loaded.arch.attention_scale)

    def whole(model, tokens):
        return model.logits(model(tokens, jnp.arange(tokens.shape[0]), attend, TENSOR), TENSOR)

    run = loaded.program(whole, (EVERYWHERE,), EVERYWHERE)
    for answer in golden.answers():
        padded = np.zeros(40, np.int32)
        padded[: len(answer.prompt)] = answer.prompt
        logits = run(padded)[: len(answer.prompt)]
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, answer.prefill_logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("tp", (1, 4))
@pytest.mark.parametrize("golden", CASES, ids=lambda golden: golden.name)
def test_packed_prefill_and_batched_decode_over_pages_give_the_tokens_of_transformers(golden: Golden, tp: int):
    loaded, answers = Loaded(golden, tp), golden.answers()
    scale = loaded.arch.attention_scale
    pool_specs = [(spec_of(POOL_AXES),) * 2] * loaded.arch.num_layers
    lengths = np.array([len(answer.prompt) for answer in answers], np.int32)
    starts = np.cumsum(lengths) - lengths
    pages_each = -(-(int(lengths.max()) + len(answers[0].tokens)) // PAGE)
    # Pages in a mixed order, and one that nobody owns.
    table = np.random.default_rng(1).permutation(len(answers) * pages_each + 1)[:-1].reshape(len(answers), -1)
    table = table.astype(np.int32)

    def through_pages(model, pool, tokens, positions, slots, read):
        pool = list(pool)

        def attend(layer, q, k, v):
            pool[layer] = kv_write.write(*pool[layer], k, v, slots)
            return read(q, *pool[layer])

        return model.logits(model(tokens, positions, attend, TENSOR), TENSOR), pool

    def prefill(model, pool, tokens, positions, slots):
        def read(q, k, v):
            zeros = np.zeros_like(lengths)
            return paged_prefill_attention.attend(q, k, v, table, starts, lengths, zeros, scale=scale)

        return through_pages(model, pool, tokens, positions, slots, read)

    def decode(model, pool, tokens, positions, slots):
        def read(q, k, v):
            return paged_decode_attention.attend(q, k, v, table, positions + 1, scale=scale)

        return through_pages(model, pool, tokens, positions, slots, read)

    def slots_of(rows, positions):
        return (table[rows, positions // PAGE] * PAGE + positions % PAGE).astype(np.int32)

    specs = ((pool_specs, EVERYWHERE, EVERYWHERE, EVERYWHERE), (EVERYWHERE, pool_specs))
    rows = np.repeat(np.arange(len(answers)), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    padding = 64 - len(positions)
    prompts = np.concatenate([answer.prompt for answer in answers]).astype(np.int32)
    logits, pool = loaded.program(prefill, *specs)(
        loaded.empty_pool(table.size + 1),
        np.pad(prompts, (0, padding), constant_values=-7),
        np.pad(positions, (0, padding)),
        np.pad(slots_of(rows, positions), (0, padding), constant_values=-1),
    )
    expected = np.concatenate([answer.prefill_logits for answer in answers])
    np.testing.assert_allclose(logits[: len(positions)], expected, atol=2e-4, rtol=0)

    step = loaded.program(decode, *specs)
    tokens = np.argmax(logits[starts + lengths - 1], -1).astype(np.int32)
    produced = [tokens]
    for length in range(1, len(answers[0].tokens)):
        positions = lengths + length - 1
        logits, pool = step(pool, tokens, positions, slots_of(np.arange(len(answers)), positions))
        tokens = np.argmax(logits, -1).astype(np.int32)
        produced.append(tokens)
    for row, answer in enumerate(answers):
        assert answer.agrees([int(tokens[row]) for tokens in produced])
