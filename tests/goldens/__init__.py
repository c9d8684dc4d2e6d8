"""Small random checkpoints, and what Hugging Face transformers computes with them (see make_goldens.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TIE = 1e-4
"""Where the best two logits lie this close, either token is right, and what follows may differ."""


@dataclass(frozen=True)
class Answer:
    """What the oracle says to one prompt of P tokens."""

    prompt: list[int]
    tokens: list[int]
    """N greedy tokens, going on past the end token."""
    margins: np.ndarray
    """[N]: best minus second best logit where each token was chosen."""
    prefill_logits: np.ndarray
    """[P, V] float32: next-token logits after each token of the prompt."""

    def agrees(self, tokens: list[int]) -> bool:
        """Whether `tokens` are the oracle's, up to its first tie."""
        ties = np.flatnonzero(self.margins < TIE)
        decided = int(ties[0]) if len(ties) else len(self.tokens)
        return tokens[:decided] == self.tokens[: min(decided, len(tokens))]


@dataclass(frozen=True)
class Golden:
    """One checkpoint folder with the oracle's answers."""

    name: str
    beside: Path = HERE
    """The folder in which it lies."""

    @property
    def folder(self) -> Path:
        return self.beside / self.name

    @property
    def npz(self) -> Path:
        return self.beside / f"{self.name}.npz"

    def answers(self) -> list[Answer]:
        with np.load(self.npz) as arrays:
            return [
                Answer(
                    arrays[f"prompt_{i}"].tolist(),
                    arrays[f"tokens_{i}"].tolist(),
                    arrays[f"top2_margin_{i}"],
                    arrays[f"prefill_logits_{i}"],
                )
                for i in range(sum(name.startswith("prompt_") for name in arrays.files))
            ]


def goldens_in(folder: Path) -> tuple[Golden, ...]:
    """What make_goldens.py has written there."""
    return tuple(Golden(file.stem, folder) for file in sorted(folder.glob("*.npz")))


CASES = goldens_in(HERE)
