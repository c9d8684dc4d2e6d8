"""The knobs of a configuration: every leaf field of nested frozen dataclasses, with its type, default and manual.

A knob's name is its path (`decode.tp`), its manual the string under the field in the source. Types that a knob can
have: int, float, str, bool, an enum, Literal, tuple[X, ...] of those, X | None, and tuple[D, ...] of a dataclass D of
such fields, which a flag gives as `a=1,b.c=2;a=3`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false each"),
}
_TRUE, _FALSE = ("true", "t", "1", "yes"), ("false", "f", "0", "no")


class Knob(NamedTuple):
    """One leaf field of a configuration."""

    name: str
    type: Any
    default: Any
    manual: str


def knobs(config_class: Any) -> tuple[Knob, ...]:
    """All leaf fields of a dataclass and of the dataclasses in it, in the order of the source.

    Raises:
        TypeError: a field has a type that neither a flag nor the check of a file could handle.
    """
    found: list[Knob] = []
    manuals = _manuals(config_class)
    for field in dataclasses.fields(config_class):
        kind = _types(config_class)[field.name]
        if dataclasses.is_dataclass(kind):
            found += [knob._replace(name=f"{field.name}.{knob.name}") for knob in knobs(kind)]
        else:
            _words(kind)  # a TypeError here names a type that we do not know
            found.append(Knob(field.name, kind, _default(field), manuals.get(field.name, "")))
    return tuple(found)


def set_knob(config: Any, name: str, value: Any) -> Any:
    """A copy of `config` in which the knob of this name has another value."""
    head, _, rest = name.partition(".")
    return dataclasses.replace(config, **{head: set_knob(getattr(config, head), rest, value) if rest else value})


def check_types(config: Any, config_class: Any, name: str = "config") -> None:
    """Hold every value in `config` against the type of its field, to any depth.

    Raises:
        ValueError: one sentence with the field's full name, its value and what it must be.
    """
    if not isinstance(config, config_class):
        raise ValueError(f"{name} = {config!r} must be a {config_class.__name__}(...)")
    for field in dataclasses.fields(config_class):
        kind, value, path = _types(config_class)[field.name], getattr(config, field.name), f"{name}.{field.name}"
        if dataclasses.is_dataclass(kind):
            check_types(value, kind, path)
        elif dataclasses.is_dataclass(_tuple_item(kind)) and isinstance(value, tuple):
            for index, part in enumerate(value):
                check_types(part, _tuple_item(kind), f"{path}[{index}]")
        elif not accepts(kind, value):
            raise ValueError(f"{path} = {value!r} must be {words(kind)}{_suggestion_among_choices(kind, value)}")


def accepts(kind: Any, value: Any) -> bool:
    """Whether a value has the type: ints pass as float, bools pass as nothing but bool."""
    choices, item, optional = _choices(kind), _tuple_item(kind), _optional(kind)
    if optional is not None:
        return value is None or accepts(optional, value)
    if choices is not None:
        return any(value == choice and type(value) is type(choice) for choice in choices)
    if item is not None:
        return isinstance(value, tuple) and all(accepts(item, part) for part in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def parse(kind: Any, text: str) -> Any:
    """Read a value of this type from a flag: `2`, `0.5`, `true`, `bfloat16`, `128,512`, `none`, `a=1,b.c=2;a=3`.

    Raises:
        ValueError: what the text must be.
    """
    choices, item, optional = _choices(kind), _tuple_item(kind), _optional(kind)
    if dataclasses.is_dataclass(item):
        return tuple(_record(item, part) for part in text.split(";") if part.strip())
    try:
        if optional is not None:
            return None if text.strip().lower() == "none" else parse(optional, text)
        if choices is not None:
            return {str(choice): choice for choice in choices}[text]
        if item is not None:
            parts = [part.strip() for part in text.strip().strip("()[]").split(",")]
            return tuple(parse(item, part) for part in parts if part)
        if kind is bool:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"must be {words(kind)}{_suggestion_among_choices(kind, text)}") from None


def _record(config_class: Any, text: str) -> Any:
    """A dataclass from `name=chat,slo.ttft_s=0.25`: its defaults, with these fields set."""
    kinds = {knob.name: knob.type for knob in knobs(config_class)}
    record = config_class()
    for setting in text.split(","):
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or name not in kinds:
            raise ValueError(
                f"{setting.strip()!r} must be NAME=VALUE with a field of {config_class.__name__}, one of "
                f"{', '.join(kinds)}{suggestion(name, kinds)}"
            )
        try:
            record = set_knob(record, name, parse(kinds[name], value))
        except ValueError as error:
            raise ValueError(f"{name} = {value} {error}") from None
    return record


def words(kind: Any) -> str:
    """What a value of this type is, in words: "a whole number", "one of auto, float32"."""
    return _words(kind)[0]


def suggestion(name: str, names: Iterable[str]) -> str:
    """The words `; did you mean NAME?` for the nearest of the names, or nothing if none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _suggestion_among_choices(kind: Any, value: Any) -> str:
    return suggestion(str(value), map(str, _choices(_optional(kind) or kind) or ()))


def _words(kind: Any) -> tuple[str, str]:
    choices, item, optional = _choices(kind), _tuple_item(kind), _optional(kind)
    if optional is not None:
        return f"{words(optional)} or none", f"{_words(optional)[1]} or none"
    if choices is not None:
        text = f"one of {', '.join(map(str, choices))}"
        return text, f"each {text}"
    if item is not None:
        return f"a tuple of {_words(item)[1]}", f"tuples of {_words(item)[1]}"
    if dataclasses.is_dataclass(kind):
        knobs(kind)  # a TypeError here names a type that we do not know
        return f"{kind.__name__}(...)", f"{kind.__name__}(...), in a flag as NAME=VALUE,NAME=VALUE;NAME=VALUE"  # type: ignore[union-attr]
    if kind not in _WORDS:
        raise TypeError(f"a configuration field cannot have the type {kind}: use one that ds_jax/knobs.py names")
    return _WORDS[kind]


def _choices(kind: Any) -> tuple[Any, ...] | None:
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    return tuple(kind) if isinstance(kind, type) and issubclass(kind, enum.Enum) else None


def _tuple_item(kind: Any) -> Any:
    arguments = typing.get_args(kind)
    return arguments[0] if typing.get_origin(kind) is tuple and arguments[1:] == (...,) else None


def _optional(kind: Any) -> Any:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) not in (typing.Union, types.UnionType) or len(arguments) != 2:
        return None
    return next((part for part in arguments if part is not type(None)), None) if type(None) in arguments else None


@functools.cache
def _types(config_class: Any) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def _manuals(config_class: Any) -> dict[str, str]:
    """The string literal under each field, base classes first so that a subclass may say it anew."""
    manuals: dict[str, str] = {}
    for owner in reversed(config_class.__mro__[:-1]):
        try:
            source = inspect.getsource(owner)
        except (OSError, TypeError):  # defined in a configuration file or at a prompt: no source to read
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(source)).body[0]).body
        for field, below in zip(body, body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                manuals[field.target.id] = " ".join(below.value.value.split())
    return manuals
