"""Configuration files and flags: what is read, what overrides what, and how a mistake is answered."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from absl import flags

from ds_jax.config import Config, DecodeConfig, PrefillConfig
from ds_jax.flags import define_config, load_config, read_config
from ds_jax.knobs import accepts, knobs, parse, set_knob
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    """Requests in a second,
    on average."""
    names: tuple[str, ...] = ("a",)
    role: Role = Role.MIXED


@dataclass(frozen=True)
class Search:
    """A launcher's own configuration."""

    inner: Inner = field(default_factory=Inner)
    seed: int | None = None
    """None draws one."""
    quick: bool = False
    method: Literal["high", "low"] = "high"


def _load(*arguments: str, config_class: type = Config, **options: str):
    values = flags.FlagValues()
    define_config(config_class, flag_values=values, **options)
    values(["launcher", *arguments])
    return load_config(config_class, flag_values=values)


def _file(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text("from ds_jax.config import *\n" + text)
    return str(folder / "mine.py")


def _launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.serve", *arguments]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_without_a_file_the_defaults_of_the_dataclasses_hold():
    assert _load() == Config()


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path):
    path = _file(tmp_path, "config = Config(decode=DecodeConfig(tp=2, slots=8))")
    config = _load(f"--config={path}", "--config.decode.tp=4", "--config.prefill.token_buckets=64,128")
    assert config == Config(decode=DecodeConfig(tp=4, slots=8), prefill=PrefillConfig(token_buckets=(64, 128)))


def test_a_file_may_define_get_config_instead_of_config(tmp_path):
    assert _load(f"--config={_file(tmp_path, 'def get_config(): return Config(policy="a.b:C")')}").policy == "a.b:C"


def test_a_file_is_found_from_another_folder_by_its_path_in_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _load("--config=configs/story.py").model.served_name == "story"


@pytest.mark.parametrize("path", sorted((CHECKOUT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_every_file_in_configs_is_a_configuration_that_passes_its_check(path):
    read_config(str(path), PlanConfig if path.name.startswith("plan_") else Config).check()


def test_launchers_bring_configurations_of_their_own():
    values = flags.FlagValues()
    define_config(Search, "search", flag_values=values)
    values(["launcher", "--search.inner.rate=3", "--search.seed=7", "--search.quick", "--search.inner.role=decode"])
    config = load_config(Search, "search", flag_values=values)
    assert config == Search(inner=Inner(rate=3.0, role=Role.DECODE), seed=7, quick=True)


def test_the_help_of_a_flag_is_the_string_under_the_field():
    values = flags.FlagValues()
    define_config(Search, flag_values=values)
    assert values["config.inner.rate"].help == "Requests in a second, on average. (default: 1.0)"
    assert values["config.seed"].help == "None draws one. (default: none)"
    assert values["config.method"].parser.syntactic_help == "one of high, low"


def test_every_knob_of_the_engine_has_a_manual_and_a_default_of_its_own_type():
    assert [knob.name for knob in knobs(Config) if not knob.manual] == []
    assert [knob.name for knob in knobs(Config) if not accepts(knob.type, knob.default)] == []


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "-3", -3),
        (float, "2", 2.0),
        (float, "1e-3", 0.001),
        (bool, "True", True),
        (bool, "no", False),
        (str, "a, b", "a, b"),
        (str, "", ""),
        (tuple[int, ...], "64,128", (64, 128)),
        (tuple[int, ...], "(64, 128,)", (64, 128)),
        (tuple[int, ...], "", ()),
        (tuple[str, ...], "a,b", ("a", "b")),
        (int | None, "none", None),
        (int | None, "7", 7),
        (Literal[1, 2], "2", 2),
        (Role, "decode", Role.DECODE),
    ],
)
def test_the_text_of_a_flag_becomes_a_value_of_the_type(kind, text, value):
    assert parse(kind, text) == value
    assert accepts(kind, parse(kind, text))


def test_setting_one_knob_leaves_the_others_and_the_original_alone():
    config = Config()
    changed = set_knob(config, "cache.page_size", 4)
    assert (changed.cache.page_size, config.cache.page_size) == (4, 16)
    assert set_knob(changed, "cache.page_size", 16) == config


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("config = Config(decode=DecodeConfig(tpp=2))", "line 2: DecodeConfig has no field tpp; did you mean tp?"),
        ("config = Config(model=ModelConfig(dtype='float23'))", "config.model.dtype = 'float23' must be one of auto,"),
        ("config = Config(decode=DecodeConfig(tp='2'))", "config.decode.tp = '2' must be a whole number"),
        ("config = Config(decode=DecodeConfig(tp=True))", "config.decode.tp = True must be a whole number"),
        ("config = Config(decode=2)", "config.decode = 2 must be a DecodeConfig(...)"),
        ("config = Config(prefill=PrefillConfig(token_buckets=[64]))", "= [64] must be a tuple of whole numbers"),
        ("config = 3", "config = 3 must be a Config(...)"),
        ("configuration = Config()", "defines neither `config = Config(...)` nor `get_config()`"),
        ("config = Config(", "line 2: '(' was never closed"),
        ("\nconfig = Confg()", "line 3: NameError: name 'Confg' is not defined"),
        ("def get_config():\n    return 1 // 0", "line 3: ZeroDivisionError"),
        ("get_config = 3", "TypeError: 'int' object is not callable"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(tmp_path, text, sentence):
    path = _file(tmp_path, text)
    with pytest.raises(ValueError) as error:
        read_config(path, Config)
    assert str(error.value).startswith(path) and sentence in str(error.value)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config.inner.rate=fast", "must be a number"),
        ("--config.seed=1.5", "must be a whole number or none"),
        ("--config.quick=perhaps", "must be true or false"),
        ("--config.method=hgh", "must be one of high, low; did you mean high?"),
        ("--config.inner.role=decod", "must be one of prefill, decode, mixed; did you mean decode?"),
    ],
)
def test_a_flag_of_the_wrong_type_is_refused_with_what_it_must_be(argument, sentence):
    with pytest.raises(flags.IllegalFlagValueError) as error:
        _load(argument, config_class=Search)
    assert str(error.value) == f"flag {argument}: {sentence}"


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config.decode.pp=0", "decode.pp = 0 must be at least 1"),
        ("--config.decode.instances=0", "policy = disaggregated needs decode.instances >= 1, got 0"),
        ("--config.mixed.instances=1", "policy = disaggregated needs mixed.instances = 0, got 1"),
    ],
)
def test_what_the_configuration_itself_refuses_is_refused(argument, sentence):
    with pytest.raises(ValueError, match=sentence):
        _load(argument)


def test_a_missing_file_is_answered_with_the_nearest_name():
    with pytest.raises(FileNotFoundError, match=r"configs/stroy.py does not exist; did you mean configs/story.py\?"):
        _load("--config=configs/stroy.py")


def test_a_field_of_a_type_that_no_flag_can_hold_is_refused_when_the_flags_are_defined():
    @dataclass(frozen=True)
    class Odd:
        callback: object = None

    with pytest.raises(TypeError, match="a configuration field cannot have the type"):
        knobs(Odd)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config.decode.tpp=2", "serve: unknown flag --config.decode.tpp; did you mean --config.decode.tp?"),
        ("--decode.tp=2", "serve: unknown flag --decode.tp; did you mean --config.decode.tp?"),
        ("--config.decode.tp=two", "serve: flag --config.decode.tp=two: must be a whole number"),
        ("--config=nowhere.py", "serve: configuration file nowhere.py does not exist"),
        ("--config.cache.page_size=0", "serve: cache.page_size = 0 must be at least 1"),
        ("story.py", "serve: unexpected argument story.py: every setting is a flag, --NAME=VALUE"),
    ],
)
def test_a_launcher_ends_in_one_sentence_and_exit_code_2(argument, sentence):
    done = _launch(argument)
    assert (done.returncode, done.stderr.strip(), done.stdout) == (2, sentence, "")


def test_the_traceback_is_there_for_those_who_ask():
    done = _launch("--config.cache.page_size=0", "--traceback")
    assert "Traceback" in done.stderr and done.stderr.strip().endswith("cache.page_size = 0 must be at least 1")


def test_help_lists_every_knob_and_needs_no_jax():
    script = (
        "import sys, runpy; sys.modules['jax'] = None; sys.argv[1:] = ['--help']\n"
        "runpy.run_module('experiments.serve', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [knob.name for knob in knobs(Config) if f"config.{knob.name}:" not in done.stdout] == []
