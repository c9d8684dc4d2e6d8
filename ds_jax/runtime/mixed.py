"""Steps that run prompt chunks and decode at once: one pass through the layers over all of their tokens.

Every matmul takes the tokens of the chunks and those of the slots together, which is what makes a chunk beside a batch
of decodes cheap (Sarathi-Serve, OSDI'24, section 4.2: decodes ride along with the prefill that loads the weights). Only
attention tells them apart.

    tokens   [ chunk 0 | chunk 1 | padding | slot 0 | slot 1 | … ]     T + B
    logits   [ last of chunk 0 | last of chunk 1 | … | slot 0 | … ]    R + B
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ds_jax.runtime import logprobs, marks, sampling
from ds_jax.runtime.pool import Pool
from ds_jax.runtime.programs import DecodeState, Model, Prefill, Program, compile_step
from ds_jax.runtime.shapes import Shapes
from models.transformer import Params


def mixed(model: Model, shapes: Shapes, bucket: int, plain: bool = False) -> Program:
    """(params, pool, packed, marks of R rows, state [B, C], marks of B slots) -> (pool, state, marks of the slots,
    tokens [R + B], log-probabilities of them [R + B, W] and of the prompts [T, W]); pool, state and marks of the slots
    are donated. On plain programs see `programs.prefill`."""

    def step(
        params: Params, pool: Pool, packed: Array, marked: Array, rows: Array, slot_marks: Array
    ) -> tuple[Pool, Array, Array, Array, Any, Any]:
        chunks, state = Prefill.of(packed, shapes, bucket), DecodeState.of(rows)
        active, slots = state.writing(shapes)
        attention = _attention(bucket, chunks.attention(), state.attention(active))
        tokens, positions = _joined(chunks.tokens, state.token), _joined(chunks.positions, state.position)
        module, hidden, pool = model.run(params, pool, tokens, positions, _joined(chunks.slots, slots), attention)

        logits = module.logits(_joined(hidden[chunks.last()], hidden[bucket:]), model.axis)
        chosen_by = sampling.unpack(_joined(chunks.sampling, state.sampling))
        wanted = _joined(chunks.samples > 0, active)
        before = _joined(chunks.contexts + chunks.lengths, state.position + 1)
        if plain:
            sampled = sampling.sample_plainly(logits, chosen_by, before)
            return pool, state.stepped(rows, sampled[shapes.rows :], active), slot_marks, sampled, None, None
        sampled = sampling.sample(logits, chosen_by, before, wanted, (marked, slot_marks))
        of_tokens = logprobs.of_tokens(logits, sampled, chosen_by.logprobs & wanted)
        of_prompts = logprobs.of_prompt(
            partial(module.logits, axis=model.axis), model.arch.vocab_size, hidden[:bucket], chunks.following
        )
        of_slots = sampled[shapes.rows :]
        penalties = jax.tree.map(lambda of_all: of_all[shapes.rows :], chosen_by.penalties)
        slot_marks = marks.count(slot_marks, of_slots, penalties, active)
        return pool, state.stepped(rows, of_slots, active), slot_marks, sampled, of_tokens, of_prompts

    arguments = (
        model.host_array(Prefill.words(shapes, bucket)),
        model.marks(shapes.rows),
        model.host_array(shapes.slots, DecodeState.columns(shapes)),
        model.marks(shapes.slots),
    )
    return compile_step(model, shapes, step, arguments, results=5, donate=(1, 4, 5))


def _attention(bucket: int, of_chunks: Program, of_slots: Program) -> Program:
    """The first `bucket` tokens are chunks, the others one token of each slot."""

    def attend(q: Array, k_pages: Array, v_pages: Array, **options: Any) -> Array:
        return _joined(
            of_chunks(q[:bucket], k_pages, v_pages, **options), of_slots(q[bucket:], k_pages, v_pages, **options)
        )

    return attend


def _joined(of_chunks: Array, of_slots: Array) -> Array:
    return jnp.concatenate([of_chunks, of_slots])
