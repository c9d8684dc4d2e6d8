from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_jax.text import TextStream, Tokenizer
from tests.text.tokenizers_for_tests import SENTENCES, byte_level, metaspace, sentencepiece

KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}
TOKENIZERS = {name: Tokenizer(build()) for name, build in KINDS.items()}
LIBRARY = {name: build() for name, build in KINDS.items()}
every_kind = pytest.mark.parametrize("kind", list(KINDS))
EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "embedded" / "story"
WITH_BYTES = ("byte_level", "sentencepiece")

texts = st.one_of(st.sampled_from(SENTENCES), st.text(max_size=40), st.text("ab ▁né你🦊\n", max_size=40))
splits = st.lists(st.integers(0, 5), max_size=60)


def tokens_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, a few beyond the tokenizer's vocabulary, and real texts."""
    size = TOKENIZERS[kind].vocab_size
    encoded = texts.map(lambda text: TOKENIZERS[kind].encode(text, add_special_tokens=False))
    return st.one_of(st.lists(st.integers(0, size + 3), max_size=60), encoded)


def pushed(stream: TextStream, token_ids: list[int], sizes: list[int]) -> list[str]:
    """What the stream returns when it gets the tokens in parts of these sizes, then one by one."""
    parts, rest = [], list(token_ids)
    for size in sizes:
        parts.append(stream.push(rest[:size]))
        rest = rest[size:]
    parts += [stream.push([token_id]) for token_id in rest]
    return [*parts, stream.finish()]


def cut(text: str, stop: list[str]) -> str:
    """Plain definition: up to the stop string that is complete first; of those, the longest."""
    for end in range(len(text) + 1):
        complete = [one for one in stop if text[:end].endswith(one)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@every_kind
@given(data=st.data())
def test_pushes_in_any_split_give_the_text_of_all_tokens(kind: str, data: st.DataObject) -> None:
    token_ids, sizes = data.draw(tokens_of(kind)), data.draw(splits)
    tokenizer = TOKENIZERS[kind]
    assert "".join(pushed(TextStream(tokenizer, start=True), token_ids, sizes)) == tokenizer.decode(token_ids)


@every_kind
@given(data=st.data())
def test_text_goes_on_from_the_prompt(kind: str, data: st.DataObject) -> None:
    prompt = TOKENIZERS[kind].encode("Once upon", add_special_tokens=True)
    token_ids, sizes = data.draw(tokens_of(kind)), data.draw(splits)
    both = TOKENIZERS[kind].decode(prompt + token_ids)
    assert "Once upon" + "".join(pushed(TextStream(TOKENIZERS[kind]), token_ids, sizes)) == both


@every_kind
@given(data=st.data())
def test_text_ends_at_the_stop_string_that_is_complete_first(kind: str, data: st.DataObject) -> None:
    token_ids, sizes = data.draw(tokens_of(kind)), data.draw(splits)
    tokenizer = TOKENIZERS[kind]
    text = tokenizer.decode(token_ids)
    ends = st.tuples(st.integers(0, len(text)), st.integers(1, 6)).map(lambda at: text[at[0] : at[0] + at[1]])
    stop = data.draw(st.lists(st.one_of(ends, st.text("ab ▁", max_size=4)).filter(bool), max_size=4))
    stream = TextStream(tokenizer, stop, start=True)
    assert "".join(pushed(stream, token_ids, sizes)) == cut(text, stop)
    assert stream.stopped == any(one in text for one in stop)
    assert stream.push(token_ids) == "" == stream.finish() if stream.stopped else True


@pytest.mark.parametrize("kind", WITH_BYTES)
@given(text=texts)
def test_no_push_ends_inside_a_character(kind: str, text: str) -> None:
    token_ids = TOKENIZERS[kind].encode(text, add_special_tokens=False)
    parts = pushed(TextStream(TOKENIZERS[kind], start=True), token_ids, [])
    assert "".join(parts) == TOKENIZERS[kind].decode(token_ids)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(parts)


@given(text=st.text("ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream, shown = TextStream(tokenizer, stop), ""
    for end in range(1, len(text) + 1):
        shown += stream.push(tokenizer.encode(text[end - 1], add_special_tokens=False))
        if stream.stopped:
            return
        begun = [size for one in stop for size in range(1, len(one)) if text[:end].endswith(one[:size])]
        assert shown == text[: end - max(begun, default=0)]


@given(data=st.data())
def test_byte_level_text_is_what_the_tokenizers_library_decodes(data: st.DataObject) -> None:
    token_ids = data.draw(tokens_of("byte_level"))
    assert TOKENIZERS["byte_level"].decode(token_ids) == LIBRARY["byte_level"].decode(token_ids)
    plain = LIBRARY["byte_level"].decode(token_ids, skip_special_tokens=False)
    assert TOKENIZERS["byte_level"].decode(token_ids, skip_special=False) == plain


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
@given(data=st.data())
def test_sentencepiece_text_is_what_the_tokenizers_library_decodes(kind: str, data: st.DataObject) -> None:
    token_ids = data.draw(tokens_of(kind))
    expected = LIBRARY[kind].decode(token_ids)
    # A run of byte tokens with one wrong byte is wholly lost there; we keep the characters that are whole.
    if "\ufffd" not in expected:
        assert TOKENIZERS[kind].decode(token_ids) == expected


def test_whole_characters_survive_a_half_one_behind_them() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    half = tokenizer.encode("你好", add_special_tokens=False)[:-1]
    assert tokenizer.decode(half) == "你\ufffd"
    assert pushed(TextStream(tokenizer, start=True), half, [])[-1] == "\ufffd"


def test_a_leading_space_is_text_behind_a_prompt_and_none_at_the_start() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    token_ids = tokenizer.encode("the fox", add_special_tokens=False)
    assert "".join(pushed(TextStream(tokenizer), token_ids, [])) == " the fox"
    assert "".join(pushed(TextStream(tokenizer, start=True), token_ids, [])) == "the fox"


@every_kind
def test_work_and_memory_per_token_do_not_grow_with_the_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS[kind]
    every = list(range(tokenizer.vocab_size))
    TextStream(tokenizer).push(every)  # each token has been looked at once
    monkeypatch.setattr(type(tokenizer.pieces), "_piece", None)
    stream = TextStream(tokenizer, ["aaab" * 5])
    for token_id in [*every, *[2] * 1000, *every[-3:] * 300]:  # all tokens, many special ones, halves of characters
        stream.push([token_id])
        assert len(stream._held) < 20 and len(stream._utf8.getstate()[0]) < 4


@pytest.mark.skipif(not EMBEDDED.is_dir(), reason="the embedded model is not there")
def test_the_embedded_tokenizer_gives_texts_back() -> None:
    tokenizer = Tokenizer.from_folder(EMBEDDED)
    for sentence in SENTENCES:
        assert tokenizer.decode(tokenizer.encode(sentence)) == sentence
