"""From token ids to text that is safe to show, as the tokens come.

A token adds the same bytes to a text wherever it stands (the first place apart). So a text grows by looking up bytes,
not by decoding again and again: the work per token does not depend on how much came before it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces:
    """The UTF-8 bytes that each token of a tokenizer adds to a text.

    Byte-level BPE spells bytes with one character each, and sentencepiece vocabularies have tokens <0x00> to <0xFF>;
    such a token can be a part of a character. What any other token adds is found by decoding it behind an anchor.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = [kind for kind in kinds if kind != "Fuse"] == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in kinds
        self.special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._anchor = self._find_anchor()
        self._inner: dict[int, bytes] = {}
        self._first: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of the token behind others; none for an id without a token."""
        piece = self._inner.get(token_id)
        if piece is None:
            piece = self._inner[token_id] = self._piece(token_id, first=False)
        return piece

    def first(self, token_id: int) -> bytes:
        """The bytes of the token at the start of a text, where sentencepiece drops a space."""
        piece = self._first.get(token_id)
        if piece is None:
            piece = self._first[token_id] = self._piece(token_id, first=True)
        return piece

    def of(self, token_ids: Iterable[int], *, start: bool, skip_special: bool) -> Iterator[bytes]:
        """The pieces of a text; `start`: the text begins here."""
        for token_id in token_ids:
            if skip_special and token_id in self.special:
                continue
            if not start:
                yield self[token_id]
            elif self._tokenizer.id_to_token(token_id) is not None:
                yield self.first(token_id)
                start = False

    def _piece(self, token_id: int, first: bool) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            known = all(character in _BYTE_OF for character in token)
            return bytes(_BYTE_OF[character] for character in token) if known else token.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            byte = int(match[1], 16)
            if byte >= 0x80 or not first:
                return bytes([byte])
        if first or self._anchor is None:
            return self._decode([token_id]).encode()
        before = self._decode([self._anchor])
        return self._decode([self._anchor, token_id])[len(before) :].encode()

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _find_anchor(self) -> int | None:
        """A token that shows, and whose text does not change with what comes behind it."""
        if self._byte_level:
            return None
        for token_id in sorted(self._tokenizer.get_vocab(with_added_tokens=False).values()):
            text = self._decode([token_id])
            if text.isalnum() and self._decode([token_id, token_id]).startswith(text):
                return token_id
        return None


class HasPieces(Protocol):
    """What a text stream needs of a tokenizer."""

    @property
    def pieces(self) -> Pieces: ...


class StopStrings:
    """Looks for stop strings character by character; the one that is complete first wins, the longest of them.

    Knuth, Morris and Pratt's automaton for each string, so that no text is looked at twice.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = strings
        self._fallbacks = [_fallbacks(string) for string in strings]
        self._matched = [0] * len(strings)

    @property
    def begun(self) -> int:
        """How many of the last characters may belong to a stop string that is not complete yet."""
        return max(self._matched)

    def feed(self, character: str) -> int:
        """Take one more character in; returns the length of the stop string that it completes, or 0."""
        longest = 0
        for index, string in enumerate(self._strings):
            matched, fallbacks = self._matched[index], self._fallbacks[index]
            while matched and string[matched] != character:
                matched = fallbacks[matched - 1]
            if string[matched] == character:
                matched += 1
            if matched == len(string):
                longest = max(longest, matched)
                matched = fallbacks[matched - 1]
            self._matched[index] = matched
        return longest


class TextStream:
    """Turns the tokens of one output into text, piece by piece.

    What `push` and `finish` return, put together, is the text of all tokens up to the first stop string (the one that
    is complete first), however the tokens are split over the calls. Never half a character, never what may turn out to
    be the beginning of a stop string. Special tokens have no text; bytes that are no UTF-8 show as U+FFFD.

    The text goes on from a prompt, so a leading space belongs to it; with `start` it stands alone, as
    `Tokenizer.decode` sees it. Constant work per character (and stop string) on average.
    """

    def __init__(self, tokenizer: HasPieces, stop: Sequence[str] = (), *, start: bool = False):
        self.stopped = False
        """A stop string has come: the text is over."""
        self._pieces = tokenizer.pieces
        self._start = start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = StopStrings(stop) if stop else None
        self._held = ""

    def push(self, token_ids: Iterable[int]) -> str:
        """Take more tokens in; returns the new text that is safe to show, maybe none."""
        if self.stopped:
            return ""
        pieces = list(self._pieces.of(token_ids, start=self._start, skip_special=True))
        self._start = self._start and not pieces
        return self._release(self._utf8.decode(b"".join(pieces)))

    def finish(self) -> str:
        """No more tokens will come; returns what was held back."""
        if self.stopped:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self._stop is None:
            return text
        for index, character in enumerate(text):
            if length := self._stop.feed(character):
                shown = self._held + text[: index + 1]
                self.stopped, self._held = True, ""
                return shown[:-length]
        text = self._held + text
        safe = len(text) - self._stop.begun
        self._held = text[safe:]
        return text[:safe]


def _fallbacks(string: str) -> list[int]:
    """For every beginning of the string: the length of its longest proper end that is a beginning of it, too."""
    lengths = [0] * len(string)
    matched = 0
    for index in range(1, len(string)):
        while matched and string[matched] != string[index]:
            matched = lengths[matched - 1]
        if string[matched] == string[index]:
            matched += 1
        lengths[index] = matched
    return lengths


def _decoder_kinds(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """The types of the decoders that run one after the other."""
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    return [one["type"] for one in state.get("decoders", [state])]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others are moved up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
