"""Small tokenizers of the kinds that checkpoints come with."""

from __future__ import annotations

from functools import cache

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "Once upon a time there was a small fox who lived in a wood.",
    "The fox said: where is the river? It's over there, said the owl.",
    "naïve café, größer, 你好世界 你好, привет мир, שלום, 🦊🦉 and 👩‍👩‍👧.",
    "one  two   three\n\n\tfour\n",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


@cache
def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, OPT, Llama 3 and Qwen: every byte has a character; <s> starts a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(["two words", "日本"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2: spaces are written ▁, one is put in front, bytes <0x00> to <0xFF> spell rare characters."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    common = [sentence for sentence in SENTENCES if sentence.isascii()]
    trained.train_from_iterator(
        common, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    )
    vocabulary = trained.get_vocab()
    merges = [
        (left, right)
        for left in vocabulary
        for right in vocabulary
        if left not in SPECIAL and right not in SPECIAL and left + right in vocabulary
    ]
    merges.sort(key=lambda pair: vocabulary[pair[0] + pair[1]])
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def metaspace() -> tokenizers.Tokenizer:
    """Spaces are written ▁, without bytes: characters that were never seen are lost."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer
