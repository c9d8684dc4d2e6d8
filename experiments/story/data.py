"""Training rows: stories and conversations, tokenised and packed, drawn afresh from a seed for as long as one asks."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from experiments.story.chat import conversation, recital
from experiments.story.grammar import document
from experiments.story.tokenizer import END, render

PADDING = -1
"""Stands where no token is: never a target."""
LOOK_AHEAD = 64
"""Documents to choose from when a row is filled."""


def text(rng: random.Random) -> str:
    """One document with its end token: a story, a conversation, or words to say again."""
    kind = rng.random()
    if kind < 0.42:
        return document(rng) + END
    return render(conversation(rng) if kind < 0.84 else recital(rng))


def texts(seed: int, count: int) -> Iterator[str]:
    """`count` documents, the same for the same seed."""
    rng = random.Random(seed)
    return (text(rng) for _ in range(count))


def rows(tokenizer: Tokenizer, seed: int, length: int) -> Iterator[np.ndarray]:
    """Rows of `length` token ids, without end.

    A row holds whole documents back to back and begins with one, as a request does. Only a document that is longer
    than a row is cut. What remains at a row's end is PADDING.
    """
    rng = random.Random(seed)
    waiting: list[list[int]] = []
    while True:
        row: list[int] = []
        while True:
            if len(waiting) < LOOK_AHEAD // 2:
                fresh = tokenizer.encode_batch([text(rng) for _ in range(LOOK_AHEAD)])
                waiting += [encoding.ids for encoding in fresh]
            room = length - len(row)
            # The longest-waiting document begins a row; the longest that fits goes on, so that little room is lost.
            fitting = [at for at, ids in enumerate(waiting) if len(ids) <= room]
            if row and not fitting:
                break
            row += waiting.pop(max(fitting, key=lambda at: len(waiting[at])) if row else 0)[:room]
        yield np.array(row + [PADDING] * (length - len(row)), np.int32)


def batches(tokenizer: Tokenizer, seed: int, batch: int, length: int) -> Iterator[np.ndarray]:
    """[batch, length] int32, without end."""
    source = rows(tokenizer, seed, length)
    while True:
        yield np.stack([next(source) for _ in range(batch)])
