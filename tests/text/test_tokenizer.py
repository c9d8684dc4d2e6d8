from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from ds_jax.text import Tokenizer
from tests.text.tokenizers_for_tests import SENTENCES, byte_level

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Hi! "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who are you?"},
]


def folder_with(path: Path, settings: dict[str, Any] | None = None, **files: str) -> Path:
    """A checkpoint folder with the byte-level tokenizer; `files` are further files, dots written as two underscores."""
    byte_level().save(str(path / "tokenizer.json"))
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def as_opt(path: Path, settings: dict[str, Any]) -> Path:
    """The same vocabulary as vocab.json and merges.txt."""
    model = json.loads(byte_level().to_str())["model"]
    (path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) for merge in model["merges"]]
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_tokenizer_json_says_what_starts_a_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, {"bos_token": "<s>", "add_bos_token": True}))
    for sentence in SENTENCES:
        token_ids = tokenizer.encode(sentence)
        assert token_ids == [1, *tokenizer.encode(sentence, add_special_tokens=False)]
        assert tokenizer.decode(token_ids) == sentence
        assert tokenizer.decode(token_ids, skip_special=False) == "<s>" + sentence


def test_vocabulary_and_merges_give_the_same_tokens(tmp_path: Path) -> None:
    settings = {"bos_token": {"content": "</s>"}, "eos_token": "</s>", "add_bos_token": True}
    tokenizer = Tokenizer.from_folder(as_opt(tmp_path, settings))
    for sentence in SENTENCES:
        expected = byte_level().encode(sentence, add_special_tokens=False).ids
        assert tokenizer.encode(sentence) == [2, *expected]
        assert tokenizer.decode([2, *expected, 2]) == sentence
    assert tokenizer.eos_token_ids == (2,)


def test_added_tokens_beside_vocabulary_and_merges_keep_their_ids(tmp_path: Path) -> None:
    size = byte_level().get_vocab_size(with_added_tokens=False)
    added = {str(size): {"content": "<|turn|>", "special": True}}
    tokenizer = Tokenizer.from_folder(as_opt(tmp_path, {"added_tokens_decoder": added}))
    assert tokenizer.encode("a<|turn|>")[-1] == size
    assert tokenizer.decode(tokenizer.encode("a<|turn|>b")) == "ab"

    added = {str(size + 7): {"content": "<|far|>"}}
    with pytest.raises(ValueError, match=f"'<|far|>' cannot get the id {size + 7}"):
        Tokenizer.from_folder(as_opt(tmp_path, {"added_tokens_decoder": added}))


def test_tokens_that_the_settings_name_are_special(tmp_path: Path) -> None:
    plain = json.loads(byte_level().to_str())
    plain["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    settings = {"eos_token": "</s>", "extra_special_tokens": ["<s>"], "pad_token": "<not in the vocabulary>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a</s>")[-1] == 2
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.vocab_size == byte_level().get_vocab_size(with_added_tokens=False)


def test_end_tokens_come_from_generation_config_and_settings(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"eos_token": "</s>"}, generation_config__json='{"eos_token_id": [7, 2]}')
    assert Tokenizer.from_folder(folder).eos_token_ids == (7, 2)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_folder(folder).eos_token_ids == (7, 2)


def test_truncation_left_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    trained = tokenizers.Tokenizer.from_str(byte_level().to_str())
    trained.enable_truncation(4)
    trained.enable_padding(length=8)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode(SENTENCES[0])) == SENTENCES[0]
    assert len(tokenizer.encode("a")) == 2


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor vocab.json with merges.txt"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path)
    (folder / name).write_text('{"model": ')
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_folder(folder)


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"character 2 is U\+D83E, half of a surrogate pair"):
        Tokenizer(byte_level()).encode("ab\ud83e")


# --- conversations ----------------------------------------------------------------------------------------------------


def test_without_a_template_each_message_is_a_line(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path))
    lines = "System: Be kind.\nUser: Hi!\nAssistant: Hello.\nUser: Who are you?\n"
    assert tokenizer.render_chat(TALK) == lines + "Assistant:"
    assert tokenizer.render_chat(TALK, add_generation_prompt=False) == lines
    assert tokenizer.apply_chat_template(TALK) == tokenizer.encode(lines + "Assistant:")


def test_the_template_of_the_settings_writes_its_special_tokens_itself(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}\n  {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, settings))
    assert tokenizer.render_chat(TALK[:2]) == "<s>  Be kind.</s>\n  Hi!</s>\n"
    assert tokenizer.apply_chat_template(TALK[:2]).count(1) == 1


def test_a_template_file_goes_before_the_settings(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "settings"}]
    folder = folder_with(tmp_path, {"chat_template": named})
    assert Tokenizer.from_folder(folder).render_chat(TALK) == "settings"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(folder).render_chat(TALK) == "file"


def test_templates_have_what_checkpoints_use_in_them() -> None:
    template = (
        "{% for m in messages %}{% if loop.index0 == 0 %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    tokenizer = Tokenizer(byte_level(), chat_template=template)
    assert tokenizer.render_chat(TALK) == '{"role": "user", "content": " Hi! "}4True'


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ 'a' + messages[0] }}", "can only concatenate"),
    ],
)
def test_a_template_that_fails_says_why(template: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^the chat template fails: .*{why}"):
        Tokenizer(byte_level(), chat_template=template).render_chat(TALK)
