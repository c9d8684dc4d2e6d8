"""The model against Hugging Face transformers, on small random checkpoints, with prefill and decode at unlike tp."""

from __future__ import annotations

import functools
from collections.abc import Callable

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
from tests.goldens import CASES, Answer, Golden

PLACEMENTS = ((1, 1), (2, 1), (1, 4), (4, 2))
"""tp of prefill and of decode."""
PAGE = 8
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}
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
        self.copies = self.arch.stored_kv_heads(tp) // self.arch.num_kv_heads

    def program(self, read: Callable[..., jax.Array], integers: int) -> Callable[..., tuple[jax.Array, list]]:
        """(pool, tokens, positions, slots, *integers) -> (logits, pool); `read` is the attention over pages."""
        arch = self.arch

        def local(params, pool, tokens, positions, slots, *rest):
            model, pool = nnx.merge(self.graphdef, params), list(pool)

            def attend(layer, q, k, v):
                pool[layer] = kv_write.write(*pool[layer], k, v, slots)
                options = {"window": arch.kind(layer).window, "soft_cap": arch.attention_soft_cap}
                return read(q, *pool[layer], *rest, scale=arch.attention_scale, **options)

            return model.logits(model(tokens, positions, attend, TENSOR), TENSOR), pool

        pool = [(spec_of(POOL_AXES),) * 2] * arch.num_layers
        in_specs = (self.specs, pool, *(EVERYWHERE,) * (3 + integers))
        mapped = jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=(EVERYWHERE, pool), check_vma=False)
        return functools.partial(jax.jit(mapped, compiler_options=FAST_TO_COMPILE), self.params)

    def pool(self, real: list[tuple[np.ndarray, np.ndarray]]) -> list:
        """The pool on this mesh that has these keys and values [P, K, N, D] of the model's own heads."""
        sharding = sharding_of(POOL_AXES, self.mesh)
        return jax.tree.map(lambda heads: jax.device_put(np.repeat(heads, self.copies, axis=1), sharding), real)

    def real_heads(self, pool: list) -> list[tuple[np.ndarray, np.ndarray]]:
        return jax.tree.map(lambda heads: np.asarray(heads)[:, :: self.copies], pool)


class Batch:
    """The prompts of all answers, packed, and pages for what follows."""

    def __init__(self, answers: list[Answer]):
        self.answers = answers
        self.lengths = np.array([len(answer.prompt) for answer in answers], np.int32)
        self.starts = np.cumsum(self.lengths) - self.lengths
        each = -(-(int(self.lengths.max()) + len(answers[0].tokens)) // PAGE)
        # Pages in a mixed order, and one that nobody owns.
        order = np.random.default_rng(1).permutation(len(answers) * each + 1)[:-1]
        self.table = order.reshape(len(answers), each).astype(np.int32)

    def empty_pool(self, arch: Architecture) -> list[tuple[np.ndarray, np.ndarray]]:
        layer = np.full((self.table.size + 1, arch.num_kv_heads, PAGE, arch.head_dim), np.nan, np.float32)
        return [(layer, layer)] * arch.num_layers

    def slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return (self.table[rows, positions // PAGE] * PAGE + positions % PAGE).astype(np.int32)

    def prefill(self, loaded: Loaded) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Logits after each token of the prompts, and the pool's real heads."""
        rows = np.repeat(np.arange(len(self.answers)), self.lengths)
        positions = np.concatenate([np.arange(length) for length in self.lengths]).astype(np.int32)
        padding = -len(positions) % 16 or 16
        tokens = np.concatenate([answer.prompt for answer in self.answers]).astype(np.int32)
        logits, pool = loaded.program(paged_prefill_attention.attend, 4)(
            loaded.pool(self.empty_pool(loaded.arch)),
            np.pad(tokens, (0, padding), constant_values=-7),
            np.pad(positions, (0, padding)),
            np.pad(self.slots(rows, positions), (0, padding), constant_values=-1),
            *(self.table, self.starts, self.lengths, np.zeros_like(self.lengths)),
        )
        return np.asarray(logits[: len(positions)]), loaded.real_heads(pool)

    def decode(self, loaded: Loaded, step: Callable, first: np.ndarray, pool: list) -> list[list[int]]:
        """Greedy tokens of each answer, `first` among them."""
        pool, produced = loaded.pool(pool), [first]
        rows = np.arange(len(self.answers))
        for length in range(1, len(self.answers[0].tokens)):
            positions = self.lengths + length - 1
            slots = self.slots(rows, positions)
            logits, pool = step(pool, produced[-1], positions, slots, self.table, positions + 1)
            produced.append(np.asarray(logits).argmax(-1).astype(np.int32))
        return np.stack(produced, 1).tolist()


@pytest.mark.parametrize("golden", CASES, ids=lambda golden: golden.name)
def test_packed_prefill_and_batched_decode_at_unlike_tp_give_what_transformers_gives(golden: Golden):
    answers = golden.answers()
    batch = Batch(answers)
    loaded = {tp: Loaded(golden, tp) for tp in {tp for placement in PLACEMENTS for tp in placement}}
    filled = {tp: batch.prefill(loaded[tp]) for tp in {prefill for prefill, _ in PLACEMENTS}}
    for logits, _ in filled.values():
        expected = np.concatenate([answer.prefill_logits for answer in answers])
        np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=0)
    steps = {tp: loaded[tp].program(paged_decode_attention.attend, 2) for tp in {decode for _, decode in PLACEMENTS}}
    for prefill, decode in PLACEMENTS:
        logits, pool = filled[prefill]
        first = np.argmax(logits[batch.starts + batch.lengths - 1], -1).astype(np.int32)
        produced = batch.decode(loaded[decode], steps[decode], first, pool)
        for answer, tokens in zip(answers, produced, strict=True):
            assert answer.agrees(tokens), f"prefill tp {prefill}, decode tp {decode}"
