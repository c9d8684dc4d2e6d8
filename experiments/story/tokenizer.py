"""The byte-level BPE tokenizer of the story model, and the text form of its conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.story.chat import Message

END = "<|end|>"
"""Ends a story and a turn of a conversation: the model's only end token."""
SPECIAL = (END, "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, got ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def end_id(tokenizer: Tokenizer) -> int:
    """The id of the end token.

    Raises:
        ValueError: the tokenizer has none.
    """
    end = tokenizer.token_to_id(END)
    if end is None:
        raise ValueError(f"the tokenizer has no token {END}")
    return end


def render(messages: Sequence[Message]) -> str:
    """A conversation as the model sees it: what CHAT_TEMPLATE gives, without the generation prompt."""
    return "".join(f"<|{message['role']}|>{message['content'].strip()}{END}" for message in messages)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn byte-pair merges from `texts`; the special tokens take the first ids, every byte has a token.

    Raises:
        ValueError: vocab_size does not even hold the bytes and the special tokens.
    """
    least = 256 + len(SPECIAL)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size = {vocab_size} must be at least {least}: 256 bytes and {len(SPECIAL)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) as Hugging Face reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
