"""The tokenizer of the story model and the text form of its conversations."""

import random

import jinja2
import numpy as np
import pytest

from experiments.story import data
from experiments.story.chat import conversation
from experiments.story.tokenizer import CHAT_TEMPLATE, END, SPECIAL, render, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(data.texts(0, 200), 600)


@pytest.mark.parametrize(
    "text", ["Once upon a time", " two  spaces\n\nand lines\t", "naïve café — 狐狸 🦊", "", "\x00\x7f"]
)
def test_any_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_stories_come_back_unchanged_and_short(tokenizer):
    texts = list(data.texts(1, 40))
    encoded = [tokenizer.encode(text).ids for text in texts]
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in encoded] == texts
    assert sum(map(len, encoded)) < sum(map(len, texts)) / 2


def test_special_tokens_have_the_first_ids_and_are_one_token_each(tokenizer):
    assert [tokenizer.encode(text).ids for text in SPECIAL] == [[0], [1], [2], [3]]
    assert tokenizer.get_vocab_size() == 600


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size = 200 must be at least 260"):
        train_tokenizer(["text"], 200)


def test_the_chat_template_gives_the_text_of_training():
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    for seed in range(50):
        messages = conversation(random.Random(seed))
        assert template.render(messages=messages) == render(messages)
    asked = [{"role": "user", "content": " Hello! "}]
    assert template.render(messages=asked, add_generation_prompt=True) == "<|user|>Hello!<|end|><|assistant|>"


def test_the_tokenizer_folder_loads_again(tokenizer, tmp_path):
    from tokenizers import Tokenizer

    save_tokenizer(tokenizer, tmp_path, 64)
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode("The fox slept.<|end|>").ids == tokenizer.encode("The fox slept.<|end|>").ids


def test_rows_begin_with_a_document_and_hold_whole_ones(tokenizer):
    source, end = data.rows(tokenizer, 0, 500), tokenizer.token_to_id(END)
    chat_starts = {tokenizer.token_to_id(token) for token in SPECIAL[1:]}
    for row in (next(source) for _ in range(50)):
        filled = row[row != data.PADDING]
        assert (row[len(filled) :] == data.PADDING).all()
        assert filled[-1] == end or len(filled) == 500
        first = int(filled[0])
        assert first in chat_starts or tokenizer.decode([first])[0].isupper()


def test_rows_are_well_filled_and_the_same_for_the_same_seed(tokenizer):
    first, again = (next(data.batches(tokenizer, 3, 40, 700)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != data.PADDING).mean() > 0.85
