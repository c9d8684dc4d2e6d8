"""The log of all that a scheduler heard and answered: replayed, drawn as a timeline, fed to the simulator.

Off by default and bounded: when full, it lets go of its oldest entries and counts them. A log that has lost its
beginning can still be looked at, and is refused where only a whole one will do.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import os
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ds_jax import protocol
from ds_jax.protocol import Command, Event, Scheduler

FORMAT = 1


class Entry(NamedTuple):
    """One call of `Scheduler.handle`: when, what it heard, what it answered."""

    now_ns: int
    event: Event
    commands: tuple[Command, ...]


@dataclasses.dataclass(frozen=True)
class Log:
    """Entries in order, and how many older ones were dropped before them."""

    entries: tuple[Entry, ...]
    dropped: int = 0

    def whole(self) -> tuple[Entry, ...]:
        """The entries, if the beginning is among them.

        Raises:
            ValueError: entries were dropped.
        """
        if self.dropped:
            raise ValueError(
                f"the log has lost its first {self.dropped} entries and cannot be replayed: "
                f"record with a capacity of at least {self.dropped + len(self.entries)}"
            )
        return self.entries

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON lines: a header, then one line per entry."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT, "dropped": self.dropped}) + "\n")
            for now_ns, event, commands in self.entries:
                row = [now_ns, encode(Event, event), [encode(Command, command) for command in commands]]
                file.write(json.dumps(row, separators=(",", ":")) + "\n")


class Recorder:
    """Keeps the last `capacity` entries; 0 is off."""

    def __init__(self, capacity: int):
        if capacity < 0:
            raise ValueError(f"capacity = {capacity} must be 0 (off) or more")
        self.capacity = capacity
        self.heard = 0
        """Entries ever recorded."""
        self._entries: deque[Entry] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def dropped(self) -> int:
        """Entries lost from the beginning because the recorder was full."""
        return self.heard - len(self._entries)

    def hear(self, event: Event, commands: Iterable[Command], now_ns: int) -> None:
        self.heard += 1
        self._entries.append(Entry(now_ns, event, tuple(commands)))

    def wrap(self, scheduler: Scheduler) -> Scheduler:
        """The scheduler with this recorder around it; the bare scheduler when the recorder is off."""
        return Recorded(scheduler, self) if self.capacity else scheduler

    def log(self) -> Log:
        return Log(tuple(self._entries), self.dropped)


class Recorded:
    """A scheduler all of whose events and commands are recorded."""

    def __init__(self, scheduler: Scheduler, recorder: Recorder):
        self.scheduler = scheduler
        self.recorder = recorder

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        try:
            commands = self.scheduler.handle(event, now_ns)
        except BaseException:
            self.recorder.hear(event, (), now_ns)  # so that a replay fails at the same place
            raise
        self.recorder.hear(event, commands, now_ns)
        return commands


def load(path: str | os.PathLike[str]) -> Log:
    """Read what `Log.save` wrote.

    Raises:
        ValueError: the file is no such log; names the file and the line.
    """
    entries = []
    dropped = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if number == 1:
                    if row["format"] != FORMAT:
                        raise ValueError(f"format = {row['format']!r} must be {FORMAT}")
                    dropped = row["dropped"]
                else:
                    now_ns, event, commands = row
                    entries.append(
                        Entry(now_ns, decode(Event, event), tuple(decode(Command, command) for command in commands))
                    )
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{Path(path)}:{number} is no entry of a recorder log: {error}") from error
    return Log(tuple(entries), dropped)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first entry at which a replay answered otherwise."""

    index: int
    now_ns: int
    event: Event
    recorded: tuple[Command, ...]
    replayed: tuple[Command, ...]

    def __str__(self) -> str:
        at = next(
            (i for i, (a, b) in enumerate(zip(self.recorded, self.replayed, strict=False)) if a != b),
            min(len(self.recorded), len(self.replayed)),
        )
        return (
            f"entry {self.index} at {self.now_ns} ns, {self.event}: command {at} was recorded as "
            f"{_shown(self.recorded, at)}, and replayed as {_shown(self.replayed, at)}"
        )


def _shown(commands: tuple[Command, ...], at: int) -> str:
    return str(commands[at]) if at < len(commands) else "nothing"


def replay(log: Log, fresh_scheduler: Scheduler) -> Difference | None:
    """Let a fresh scheduler hear the log's events again; None if it answers everything with the same commands.

    Raises:
        ValueError: the log has dropped entries.
    """
    for index, (now_ns, event, recorded) in enumerate(log.whole()):
        replayed = tuple(fresh_scheduler.handle(event, now_ns))
        if replayed != recorded:
            return Difference(index, now_ns, event, recorded, replayed)
    return None


# --- JSON for the protocol's values, by their type hints --------------------------------------------------------------
#
# Frozen dataclass: {field: value}, fields at their default left out. NamedTuple: [value, ...]. Union of classes:
# {"Name": value}. Enum: its value. Mapping: [[key, value], ...]. Tuple: a list.


def encode(hint: Any, value: Any) -> Any:
    """A value of the protocol as JSON data."""
    return _codec(hint)[0](value)


def decode(hint: Any, data: Any) -> Any:
    """The inverse of `encode`.

    Raises:
        ValueError, TypeError, KeyError: the data do not fit the type.
    """
    return _codec(hint)[1](data)


_Codec = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def _same(value: Any) -> Any:
    return value


@functools.cache
def _codec(hint: Any) -> _Codec:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _optional(arguments) if types.NoneType in arguments else _tagged(arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            one, back = _codec(arguments[0])
            return lambda values: [one(value) for value in values], lambda data: tuple(back(value) for value in data)
        return _fixed(tuple, arguments)
    if origin is not None and issubclass(origin, Mapping):
        (key, key_back), (one, back) = _codec(arguments[0]), _codec(arguments[1])
        return (
            lambda values: [[key(name), one(value)] for name, value in values.items()],
            lambda data: {key_back(name): back(value) for name, value in data},
        )
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass(hint)
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        make: Callable[[Iterator[Any]], Any] = hint._make  # type: ignore[attr-defined]
        return _fixed(make, [_hints(hint)[name] for name in hint._fields])
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return lambda value: value.value, hint
    if hint in (bool, int, float, str):
        return _same, _exactly(hint)
    raise TypeError(f"{hint} has no JSON form in a recorder log")


def _hints(hint: type) -> dict[str, Any]:
    return typing.get_type_hints(hint, vars(protocol))


def _exactly(kind: type) -> Callable[[Any], Any]:
    def back(data: Any) -> Any:
        if type(data) is not kind and not (kind is float and type(data) is int):
            raise ValueError(f"{data!r} must be of type {kind.__name__}")
        return data

    return back


def _optional(arguments: tuple[Any, ...]) -> _Codec:
    (inner,) = [argument for argument in arguments if argument is not types.NoneType]
    one, back = _codec(inner)
    return (
        lambda value: None if value is None else one(value),
        lambda data: None if data is None else back(data),
    )


def _tagged(arguments: tuple[Any, ...]) -> _Codec:
    codecs = {argument.__name__: _codec(argument) for argument in arguments}

    def back(data: Any) -> Any:
        ((name, inner),) = data.items()
        if name not in codecs:
            raise ValueError(f"{name!r} must be one of {', '.join(codecs)}")
        return codecs[name][1](inner)

    return lambda value: {type(value).__name__: codecs[type(value).__name__][0](value)}, back


def _fixed(make: Callable[[Iterator[Any]], Any], hints: Iterable[Any]) -> _Codec:
    codecs = [_codec(hint) for hint in hints]

    def back(data: Any) -> Any:
        return make(codec[1](value) for codec, value in zip(codecs, data, strict=True))

    return lambda values: [codec[0](value) for codec, value in zip(codecs, values, strict=True)], back


def _dataclass(hint: type) -> _Codec:
    hints = _hints(hint)
    fields = [(field.name, _default(field), *_codec(hints[field.name])) for field in dataclasses.fields(hint)]
    backs = {name: back for name, _, _, back in fields}

    def forth(value: Any) -> Any:
        items = [(name, default, one, getattr(value, name)) for name, default, one, _ in fields]
        return {name: one(held) for name, default, one, held in items if held != default}

    return forth, lambda data: hint(**{name: backs[name](inner) for name, inner in data.items()})


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default  # MISSING, which equals nothing, where there is none
