"""From the command line to a checked configuration, for every launcher.

    flags.define_config()                # registers --config=FILE.py and one --config.NAME for every knob

    def main(argv: list[str]) -> None:
        config = flags.load_config()     # FILE.py, then the flags over it, then config.check()

    if __name__ == "__main__":
        flags.run(main)                  # a user's mistake ends in one sentence and exit code 2

FILE.py is Python that defines `config = Config(...)`, or a function `get_config()` that returns one. Launchers with a
configuration of their own pass their dataclass: `define_config(SearchConfig)`, `load_config(SearchConfig)`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, overload

from absl import app, flags

from ds_jax.config import Config
from ds_jax.knobs import Knob, check_types, knobs, parse, set_knob, suggestion, words

flags.disclaim_key_flags()  # what is defined here belongs to the launcher that calls, and shows up in its --help

CHECKOUT = Path(__file__).resolve().parent.parent
_OURS = ("ds_jax", "models", "kernels", "experiments", "configs")


def define_config(
    config_class: type = Config,
    flag_name: str = "config",
    default_file: str = "",
    flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
    """Register `--config=FILE.py` and one flag `--config.NAME` for every knob of the dataclass.

    Without a file (and no `default_file`) the defaults of the dataclass hold.
    """
    flags.DEFINE_string(
        flag_name,
        default_file,
        f"Python file that defines `config = {config_class.__name__}(...)`; --{flag_name}.NAME overrides its fields.",
        flag_values=flag_values,
    )
    for knob in knobs(config_class):
        flags.DEFINE_flag(_flag(f"{flag_name}.{knob.name}", knob), flag_values)


@overload
def load_config(*, flag_name: str = ..., flag_values: flags.FlagValues = ...) -> Config: ...
@overload
def load_config[C](config_class: type[C], flag_name: str = ..., flag_values: flags.FlagValues = ...) -> C: ...
def load_config(
    config_class: type[Any] = Config, flag_name: str = "config", flag_values: flags.FlagValues = flags.FLAGS
) -> Any:
    """The configuration that the parsed flags ask for, its types and `check()` passed.

    Raises:
        ValueError: one sentence with the file and line, or the field, that is wrong and what it must be.
        FileNotFoundError: the file of `--config` does not exist.
    """
    name = flag_values[flag_name].value
    config = read_config(name, config_class) if name else config_class()
    for knob in knobs(config_class):
        value = flag_values[f"{flag_name}.{knob.name}"]
        if value.present:
            config = set_knob(config, knob.name, value.value)
    if hasattr(config, "check"):
        config.check()
    return config


def read_config[C](name: str, config_class: type[C]) -> C:
    """Run a configuration file: a path from the working folder, or else from the checkout. Raises as `load_config`."""
    path = next((path for path in (Path(name), CHECKOUT / name) if path.is_file()), None)
    if path is None:
        near = [str(path.relative_to(CHECKOUT)) for path in sorted((CHECKOUT / "configs").glob("*.py"))]
        raise FileNotFoundError(f"configuration file {name} does not exist{suggestion(name, near)}")
    namespace: dict[str, Any] = {"__name__": "ds_jax_config_file", "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), namespace)
        config = namespace["get_config"]() if "get_config" in namespace else namespace.get("config")
    except SyntaxError as error:
        raise ValueError(f"{name}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{name}, line {lines[-1]}" if lines else name
        raise ValueError(f"{where}: {_why(error, config_class)}") from error
    if config is None:
        wanted = config_class.__name__
        raise ValueError(f"{name} defines neither `config = {wanted}(...)` nor `get_config()` that returns a {wanted}")
    try:
        check_types(config, config_class)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return config


def run(main: Callable[[list[str]], object]) -> None:
    """Parse the flags and call `main(argv)`, as `absl.app.run` does.

    A wrong flag, a file that cannot be opened, and a ValueError, OSError or ImportError that our own code raises are a
    user's mistakes: one sentence on stderr and exit code 2. What a library raises is a mistake of ours and keeps its
    stack trace.
    """
    logging.getLogger("jax").setLevel(logging.WARNING)  # it tells of every backend that it does not find
    flags.DEFINE_boolean("traceback", False, "Show where an error comes from, not only its sentence.")

    def parse_flags(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            _refuse(argv, f"unknown flag --{error.flagname}{_nearest_flag(error.flagname)}")
        except flags.Error as error:
            missing = re.findall(r"Flag (--\S+) must have a value other than None", str(error))
            _refuse(argv, f"{' and '.join(missing)} must be given" if missing else str(error))
        except SystemExit:  # --help and its kin: absl exits with 1
            sys.exit(0)
        if rest[1:]:
            _refuse(argv, f"unexpected argument {rest[1]}: every setting is a flag, --NAME=VALUE")
        return rest

    def guarded(argv: list[str]) -> object:
        try:
            return main(argv)
        except (ValueError, OSError, ImportError) as error:
            if flags.FLAGS["traceback"].value or not is_a_users_mistake(error):
                raise
            _refuse(argv, sentence_of(error))
        except KeyboardInterrupt:
            sys.exit(130)

    app.run(guarded, flags_parser=parse_flags)


class _Parser(flags.ArgumentParser[Any]):
    """Reads a knob's value; absl puts `flag --name=value: ` before the sentence of the error."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.syntactic_help = words(kind)

    def parse(self, argument: Any) -> Any:
        return parse(self.kind, argument) if isinstance(argument, str) else argument

    def flag_type(self) -> str:
        return self.syntactic_help


def _flag(name: str, knob: Knob) -> flags.Flag[Any]:
    shown = repr(knob.default) if isinstance(knob.default, str | tuple) else str(knob.default).lower()
    shown = "none" if knob.default is dataclasses.MISSING else shown
    manual = f"{knob.manual} (default: {shown})"
    if knob.type is not bool:
        return flags.Flag(_Parser(knob.type), None, name, None, manual)
    flag = flags.BooleanFlag(name, None, manual)
    flag.parser = _Parser(bool)
    return flag


def _nearest_flag(name: str) -> str:
    """The nearest flag, also for a path given without its beginning: `--tp` or `--decode.tp`."""
    names = list(flags.FLAGS)
    ends = [full for full in names if full.endswith(f".{name}")]
    if ends:
        return "; did you mean " + " or ".join(f"--{full}" for full in sorted(ends)[:3]) + "?"
    return suggestion(name, names).replace("did you mean ", "did you mean --")


def _why(error: Exception, config_class: type) -> str:
    """What went wrong while a configuration file ran."""
    unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unknown:
        classes = {part.__name__: part for part in _dataclasses_in(config_class)}
        owner, field = unknown.groups()
        known = [field.name for field in dataclasses.fields(classes[owner])] if owner in classes else []
        return f"{owner} has no field {field}{suggestion(field, known)}"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _dataclasses_in(config_class: type) -> list[Any]:
    nested = [type(value) for value in vars(config_class()).values() if dataclasses.is_dataclass(value)]
    return [config_class, *(inner for part in nested for inner in _dataclasses_in(part))]


def is_a_users_mistake(error: BaseException) -> bool:
    """Whether our own code raised it, or a file cannot be opened; in a process of a pool, ask there."""
    if isinstance(error, OSError) and error.filename:
        return True  # a file that does not exist, or may not be read
    frames = traceback.extract_tb(error.__traceback__)
    path = Path(frames[-1].filename).resolve()
    return path.is_relative_to(CHECKOUT) and path.relative_to(CHECKOUT).parts[0] in _OURS


def sentence_of(error: BaseException) -> str:
    """What a user is told of a mistake."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _refuse(argv: list[str], sentence: str) -> NoReturn:
    print(f"{Path(argv[0]).stem}: {sentence}", file=sys.stderr)
    sys.exit(2)
