"""Text to token ids and back, and conversations to prompts: whatever a Hugging Face folder says about text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from ds_jax.detokenize import Pieces, TextStream

__all__ = ["DEFAULT_CHAT_TEMPLATE", "TextStream", "Tokenizer"]

DEFAULT_CHAT_TEMPLATE = """\
{% for message in messages %}
{{ message['role'] | capitalize }}: {{ message['content'] | trim }}
{% endfor %}
{% if add_generation_prompt %}
Assistant:
{%- endif %}
"""
"""For checkpoints without a chat template: one line per message, `System: …`, `User: …`, `Assistant: …`.

A model that was not trained on conversations may go on with the user's next line; `stop=["\\nUser:"]` ends it there.
"""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of one checkpoint.

    `settings` is the content of tokenizer_config.json. `add_bos` puts the bos token in front of every text (where
    the tokenizer's own post-processor does not do so). `chat_template` is a jinja2 source, or None for the default.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        *,
        add_bos: bool = False,
        chat_template: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ):
        settings = settings or {}
        self._tokenizer = tokenizer
        tokenizer.no_truncation()  # what a training script left in the file must not cut prompts
        tokenizer.no_padding()
        self._named = {name: _content(settings[name]) for name in _NAMED_TOKENS if settings.get(name) is not None}
        special = [*self._named.values(), *_extra_special_tokens(settings)]
        tokenizer.add_special_tokens([token for token in special if tokenizer.token_to_id(token) is not None])
        bos = tokenizer.token_to_id(self._named.get("bos_token", ""))
        self._bos = bos if add_bos else None
        self._chat_template = chat_template
        eos = tokenizer.token_to_id(self._named.get("eos_token", ""))
        self.eos_token_ids = tuple(dict.fromkeys((*eos_token_ids, *(() if eos is None else (eos,)))))
        """Tokens that end a text: generation_config.json's, then the tokenizer's own."""
        self.pieces = Pieces(tokenizer)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, or vocab.json with merges.txt, and the settings beside it.

        Raises:
            FileNotFoundError: the folder has neither.
            ValueError: a file is not what its name promises.
        """
        folder = Path(path)
        settings = _read_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            try:
                tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises nothing narrower
                raise ValueError(f"{folder / 'tokenizer.json'} cannot be read as a tokenizer: {error}") from error
            add_bos = False  # its post-processor says so if need be
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = _byte_level_bpe(folder, settings)
            add_bos = bool(settings.get("add_bos_token"))
        else:
            raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt")
        eos = _read_json(folder / "generation_config.json").get("eos_token_id")
        return cls(
            tokenizer,
            settings,
            add_bos=add_bos,
            chat_template=_find_chat_template(folder, settings),
            eos_token_ids=[] if eos is None else [eos] if isinstance(eos, int) else eos,
        )

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """A token per byte: text for models of random weights, which have no tokenizer of their own."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bytes_only = tokenizers.Tokenizer(models.BPE({character: id for id, character in enumerate(alphabet)}, []))
        bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bytes_only.decoder = decoders.ByteLevel()
        return cls(bytes_only)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text; the model's vocabulary may be larger."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, with the special tokens that start (or end) a text where the model has such.

        Raises:
            ValueError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode: character {error.start} is U+{ord(text[error.start]):04X}, "
                "half of a surrogate pair"
            ) from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return [self._bos, *ids] if add_special_tokens and self._bos is not None else ids

    def decode(self, token_ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the tokens, standing alone. Bytes that are no UTF-8 show as U+FFFD."""
        return b"".join(self.pieces.of(token_ids, start=True, skip_special=skip_special)).decode("utf-8", "replace")

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text.

        Raises:
            ValueError: the template is wrong or refuses these messages; one sentence.
        """
        try:
            text: str = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._named,
            )
        except Exception as error:  # a template is a program: anything can go wrong in it
            raise ValueError(f"the chat template fails: {error}") from error
        return text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """The conversation as a prompt. A checkpoint's template writes its special tokens itself; the default one
        gets those that any text gets.

        Raises:
            ValueError: as `render_chat` and `encode`.
        """
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=self._chat_template is None)

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(DEFAULT_CHAT_TEMPLATE if self._chat_template is None else self._chat_template)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks what the assistant said, for training: here it is only text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Templates expect plain JSON; jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _byte_level_bpe(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that GPT-2 and OPT ship as vocab.json and merges.txt."""
    try:
        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise ValueError(f"vocab.json and merges.txt in {folder} cannot be read as a tokenizer: {error}") from error
    tokenizer = tokenizers.Tokenizer(bpe)
    prefix = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    added = {int(id): token for id, token in (settings.get("added_tokens_decoder") or {}).items()}
    added |= {
        id: {"content": token} for token, id in _read_json(folder / "added_tokens.json").items() if id not in added
    }
    for token_id, token in sorted(added.items()):
        flags = {name: token[name] for name in ("special", "lstrip", "rstrip", "normalized") if name in token}
        tokenizer.add_tokens([AddedToken(token["content"], **flags)])
        if tokenizer.token_to_id(token["content"]) != token_id:
            raise ValueError(f"{folder}: added token {token['content']!r} cannot get the id {token_id}")
    return tokenizer


def _find_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the (default) template of tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        by_name = {one["name"]: one["template"] for one in template}
        template = by_name.get("default")
    return template


def _extra_special_tokens(settings: Mapping[str, Any]) -> list[str]:
    tokens: list[Any] = list(settings.get("additional_special_tokens") or [])
    extra = settings.get("extra_special_tokens") or []
    tokens += extra.values() if isinstance(extra, Mapping) else extra
    return [_content(token) for token in tokens]


def _content(token: Any) -> str:
    """Special tokens are written as their text, or as an object with it."""
    return token["content"] if isinstance(token, Mapping) else str(token)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object")
    return content
