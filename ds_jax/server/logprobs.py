"""Log-probabilities in the shapes of the OpenAI API (and vLLM's, of a prompt's)."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from ds_jax.sampling import TokenLogprobs
from ds_jax.text import Tokenizer


class CompletionLogprobs:
    """The `logprobs` of one choice of a completion, piece by piece: offsets go on from piece to piece."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def push(self, token_ids: Sequence[int], found: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Of further tokens. `text_offset` says where in the text each begins; one that ends a character which
        another began is where the character is."""
        names = [token_text(self._tokenizer, token) for token in token_ids]
        return {
            "text_offset": [self._advance(token) for token in token_ids],
            "token_logprobs": [one.logprob for one in found],
            "tokens": names,
            "top_logprobs": [
                _by_text(self._tokenizer, token, one) for token, one in zip(token_ids, found, strict=True)
            ],
        }

    def _advance(self, token: int) -> int:
        here, pieces = self._offset, self._tokenizer.pieces
        if token not in pieces.special:
            self._offset += len(self._utf8.decode(pieces[token]))
        return here


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], found: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a chat's choice, or of a piece of it."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token),
            "logprob": logprob,
            "bytes": list(tokenizer.pieces[token]),
        }

    content = [
        {**entry(token, one.logprob), "top_logprobs": [entry(*likely) for likely in one.top]}
        for token, one in zip(token_ids, found, strict=True)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], found: Sequence[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt id -> log-probability and text, of the likeliest tokens
    and its own; nothing for the first."""
    places: list[dict[str, Any] | None] = [None]
    for token, one in zip(prompt[1:], found, strict=True):
        values = dict(one.top) | {token: one.logprob}
        places.append(
            {
                str(id): {"logprob": logprob, "decoded_token": token_text(tokenizer, id)}
                for id, logprob in values.items()
            }
        )
    return places


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token; a part of a character is written as OpenAI writes it: bytes:\\xf0\\x9f."""
    piece = tokenizer.pieces[token]
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _by_text(tokenizer: Tokenizer, token: int, found: TokenLogprobs) -> dict[str, float]:
    """The likeliest tokens and the one chosen. Of tokens with the same text the likeliest counts."""
    values: dict[str, float] = {}
    for id, logprob in (*found.top, (token, found.logprob)):
        values.setdefault(token_text(tokenizer, id), logprob)
    return values
