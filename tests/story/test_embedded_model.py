"""The committed checkpoint: small enough, a valid folder, and it tells stories."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer

from experiments.story import grammar
from experiments.story.forward import continue_greedily
from models.checkpoint import load_params, open_checkpoint
from models.sharding import make_mesh

FOLDER = Path(__file__).resolve().parents[2] / "models" / "embedded" / "story"


@pytest.fixture(scope="module")
def tell():
    """Continue several texts greedily, each up to its end token."""
    checkpoint = open_checkpoint(FOLDER)
    params = load_params(checkpoint, make_mesh(jax.devices()[:1], 1), jnp.float32)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    (end,) = checkpoint.eos_token_ids

    def tell(texts, new_tokens):
        prompts = [tokenizer.encode(text).ids for text in texts]
        answers = continue_greedily(checkpoint.arch, params, prompts, new_tokens, end)
        return [tokenizer.decode(ids) for ids in answers]

    return tell


def test_the_folder_holds_at_most_8_mib():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8 * 2**20


def test_the_model_can_be_shared_by_4_devices_and_ends_with_the_tokenizers_end_token():
    checkpoint = open_checkpoint(FOLDER)
    for tp in (1, 2, 4):
        checkpoint.arch.check_tp(tp)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert checkpoint.eos_token_ids == (tokenizer.token_to_id("<|end|>"),)
    assert tokenizer.get_vocab_size() == checkpoint.arch.vocab_size


def test_once_upon_a_time_goes_on_in_sentences_of_the_stories_words(tell):
    (text,) = tell(["Once upon a time"], 100)
    said = [word.lower() for word in grammar.WORD.findall(text)]
    known = grammar.vocabulary(1000)
    assert len(said) > 40
    assert sum(word in known for word in said) / len(said) > 0.95, text
    assert len(set(said)) > 25, text
    assert len(re.findall(r"[.!?]", text)) >= 4, text


def test_a_chat_is_answered_with_a_story(tell):
    asked = ["Tell me a short story about a fox.", "Tell me a short story about a rabbit named Toby."]
    known = grammar.vocabulary(1000)
    for text in tell([f"<|user|>{text}<|end|><|assistant|>" for text in asked], 60):
        said = [word.lower() for word in grammar.WORD.findall(text)]
        assert sum(word in known for word in said) / len(said) > 0.95, text
        assert len(re.findall(r"[.!?]", text)) >= 3, text
