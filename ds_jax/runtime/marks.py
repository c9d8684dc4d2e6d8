"""What biases and penalties look at: two dense rows over the vocabulary for every slot of a batch.

    marks [2, B, V] int32:  marks[0] how often each token is in the output, and flags;  marks[1] its bias, by its bits

Only sequences that ask for a bias or a penalty have their rows written: when they join a batch, from what the host
knows (so that a replay begins with the right counts), and with every token that the programs choose for them. What
lies in the rows of the others is stale and never read.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ds_jax.runtime.sequence import Sequence
from ds_jax.runtime.shapes import bucket_for, powers
from ds_jax.sampling import SamplingParams

ENDS, IN_PROMPT = 1 << 30, 1 << 29
"""Flags: the token ends a text; it is in the prompt."""
COUNT = IN_PROMPT - 1
"""Bits that count the token in the output."""
SMALLEST_ROW = 256
"""Entries of the smallest program that writes a row."""


Marks = Array | tuple[Array, ...]
"""Of the rows of a batch, [2, B, V], or of several parts of a batch, which are put together only if a row asks."""


class Penalties(NamedTuple):
    """What B rows ask for."""

    asked: Array
    """[B] bool: for any bias or penalty at all."""
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    repetition: Float[Array, " B"]
    earliest_end: Int[Array, " B"]
    """Position before which no end token may come."""


def asked_by(params: SamplingParams) -> bool:
    """Whether a sequence needs its marks."""
    return bool(params.logit_bias or params.min_tokens) or amounts(params) != (0, 0, 1)


def amounts(params: SamplingParams) -> tuple[float, float, float]:
    """Presence, frequency and repetition penalty."""
    return params.presence_penalty, params.frequency_penalty, params.repetition_penalty


def buckets(vocab: int) -> tuple[int, ...]:
    """Entries of the programs that write a row. No more tokens can be marked than there are."""
    return powers(SMALLEST_ROW, vocab, 16)


def pack(sequence: Sequence, row: int, vocab: int) -> tuple[int, np.ndarray]:
    """The bucket and the array for the program that writes the sequence's marks into a row: the row, then tokens,
    marks and biases."""
    words: dict[int, int] = {}
    for token in sequence.output:
        words[token] = words.get(token, 0) + 1
    for flag, tokens in ((IN_PROMPT, sequence.prompt), (ENDS, sequence.end_ids)):
        for token in tokens:
            words[token] = words.get(token, 0) | flag
    biases = dict(sequence.sampling.logit_bias)
    marked = [*(words | biases)]
    bucket = bucket_for(len(marked), buckets(vocab), "marked tokens")
    packed = np.full(1 + 3 * bucket, vocab, np.int32)  # an entry beyond the vocabulary is dropped
    packed[0] = row
    entries = packed[1:].reshape(3, bucket)[:, : len(marked)]
    entries[0] = marked
    entries[1] = [words.get(token, 0) for token in marked]
    entries[2] = np.asarray([biases.get(token, 0) for token in marked], np.float32).view(np.int32)
    return bucket, packed


def write(marks: Int[Array, "2 B V"], packed: Int[Array, " n"]) -> Int[Array, "2 B V"]:
    """The device's side of `pack`: the row is made anew."""
    row, (tokens, *entries) = packed[0], packed[1:].reshape(3, -1)
    fresh = jnp.zeros((2, marks.shape[2]), jnp.int32).at[:, tokens].set(jnp.stack(entries), mode="drop")
    return lax.dynamic_update_slice(marks, fresh[:, None], (0, row, 0))


def count(
    marks: Int[Array, "2 B V"], tokens: Int[Array, " B"], penalties: Penalties, active: Array
) -> Int[Array, "2 B V"]:
    """The marks after one more token of each row that asks. B elements are touched, whoever asks."""
    rows = jnp.arange(len(tokens))
    return marks.at[0, rows, jnp.where(penalties.asked & active, tokens, marks.shape[2])].add(1, mode="drop")


def apply(
    logits: Float[Array, "B V"],
    penalties: Penalties,
    positions: Int[Array, " B"],
    marks: Marks,
    wanted: Array | None = None,
) -> Float[Array, "B V"]:
    """Logits with bias and penalties, in the rows that ask; no work if none does.

    Bias is added and end tokens that come too early are forbidden; what the prompt or the output has is divided by
    the repetition penalty if positive, multiplied if negative (Keskar et al., CTRL, 2019, section 4.1, as in Hugging
    Face's transformers); then the presence penalty is taken once, and the frequency penalty for every occurrence in
    the output, as in the OpenAI API.
    """
    rows = penalties.asked if wanted is None else penalties.asked & wanted
    return lax.cond(jnp.any(rows), _apply, lambda logits, *_: logits, logits, penalties, positions, marks, rows)


def _apply(logits: Array, penalties: Penalties, positions: Array, marks: Marks, rows: Array) -> Array:
    if isinstance(marks, tuple):
        marks = jnp.concatenate(marks, axis=1)
    marks = marks[:, : len(logits)]  # a small batch looks at the first slots
    seen, bias = marks[0], lax.bitcast_convert_type(marks[1], jnp.float32)
    early = (positions < penalties.earliest_end)[:, None]
    adjusted = jnp.where(early & (seen & ENDS != 0), -jnp.inf, logits + bias)
    repetition = penalties.repetition[:, None]
    repeated = jnp.where(adjusted > 0, adjusted / repetition, adjusted * repetition)
    adjusted = jnp.where(seen & (COUNT | IN_PROMPT) != 0, repeated, adjusted)
    times = (seen & COUNT).astype(jnp.float32)
    adjusted = adjusted - penalties.frequency[:, None] * times
    adjusted = adjusted - penalties.presence[:, None] * (times > 0)
    return jnp.where(rows[:, None], adjusted, logits)
