"""Training rows: stories and conversations, tokenised and packed, drawn afresh from a seed for as long as one asks."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from experiments.story.chat import conversation
from experiments.story.grammar import document
from experiments.story.tokenizer import END, render

PADDING = -1
"""Stands where no token is: never a target."""
LOOK_AHEAD = 64
"""Documents to choose from when a row is filled."""


def text(rng: random.Random) -> str:
    """One document with its end token: a story, or, every other time, a conversation."""
    return document(rng) + END if rng.random() < 0.5 else render(conversation(rng))


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
            at = next((i for i, ids in enumerate(waiting) if len(ids) <= room or not row), None)
            if at is None:
                break
            row += waiting.pop(at)[:room]
        yield np.array(row + [PADDING] * (length - len(row)), np.int32)


def batches(tokenizer: Tokenizer, seed: int, batch: int, length: int) -> Iterator[np.ndarray]:
    """[batch, length] int32, without end."""
    source = rows(tokenizer, seed, length)
    while True:
        yield np.stack([next(source) for _ in range(batch)])
