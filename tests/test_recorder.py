"""The log of events and commands."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_jax.protocol import Arrived, Command, Event, Reject, Request, StepDone, Stopped
from ds_jax.recorder import Entry, Log, Recorder, decode, encode, load, replay

# `emitted` is any mapping; in a log it is a dict
st.register_type_strategy(StepDone, st.builds(StepDone, emitted=st.dictionaries(st.integers(), st.integers())))
events = st.from_type(Event)
commands = st.from_type(Command).filter(lambda command: "nan" not in repr(command))  # nan is not even itself


@given(events, st.lists(commands, max_size=4))
def test_every_value_of_the_protocol_survives_json(event, answers):
    for hint, value in [(Event, event), *((Command, answer) for answer in answers)]:
        back = decode(hint, json.loads(json.dumps(encode(hint, value))))
        assert back == value and type(back) is type(value)
        assert repr(back) == repr(value), "the same types all the way down"


@given(
    st.lists(st.tuples(st.integers(), events, st.lists(commands, max_size=3).map(tuple)).map(Entry._make), max_size=5)
)
def test_logs_survive_files(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("logs") / "log.jsonl"
    log = Log(tuple(entries), dropped=3)
    log.save(path)
    assert load(path) == log


class Echo:
    """Rejects what arrives; `salt` makes it answer otherwise, `boom` raises."""

    def __init__(self, salt: str = "no"):
        self.salt = salt

    def handle(self, event, now_ns):
        if isinstance(event, Stopped) and event.reason == "boom":
            raise KeyError("boom")
        return [Reject(event.request.id, f"{self.salt} at {now_ns}")] if isinstance(event, Arrived) else []


def recorded(count: int, capacity: int = 100) -> Recorder:
    recorder = Recorder(capacity)
    scheduler = recorder.wrap(Echo())
    for index in range(count):
        assert scheduler.handle(Arrived(Request(index, 1, 1)), index) == [Reject(index, f"no at {index}")]
    return recorder


def test_a_recorder_that_is_off_is_not_there():
    scheduler = Echo()
    assert Recorder(0).wrap(scheduler) is scheduler


def test_a_full_recorder_forgets_its_oldest_entries_and_cannot_be_replayed():
    recorder = recorded(5, capacity=3)
    assert (len(recorder), recorder.dropped) == (3, 2)
    assert [entry.now_ns for entry in recorder.log().entries] == [2, 3, 4]
    with pytest.raises(ValueError, match=r"lost its first 2 entries and cannot be replayed: .* at least 5"):
        replay(recorder.log(), Echo())


def test_a_replay_with_the_same_answers_finds_nothing():
    assert replay(recorded(5).log(), Echo()) is None


def test_the_first_difference_is_told_in_words():
    difference = replay(recorded(5).log(), Echo(salt="never"))
    assert difference is not None and difference.index == 0
    assert str(difference).endswith(
        "command 0 was recorded as Reject(sequence=0, why='no at 0', retry_after_s=None), "
        "and replayed as Reject(sequence=0, why='never at 0', retry_after_s=None)"
    )


def test_a_missing_command_is_a_difference():
    class Silent(Echo):
        def handle(self, event, now_ns):
            return [] if now_ns == 3 else super().handle(event, now_ns)

    difference = replay(recorded(5).log(), Silent())
    assert difference is not None and difference.index == 3
    assert str(difference).endswith("and replayed as nothing")


def test_an_event_that_broke_the_scheduler_is_in_the_log():
    recorder = Recorder(10)
    scheduler = recorder.wrap(Echo())
    with pytest.raises(KeyError):
        scheduler.handle(Stopped(0, "boom"), 5)
    assert recorder.log().entries == (Entry(5, Stopped(0, "boom"), ()),)
    with pytest.raises(KeyError):
        replay(recorder.log(), Echo())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("not json", "Expecting value"),
        ('[0,{"Arived":{}},[]]', "'Arived' must be one of Arrived"),
        ('[0,{"StepDone":{"step":"1"}},[]]', "'1' must be of type int"),
        ("[0]", "not enough values"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, why):
    path = tmp_path / "log.jsonl"
    Log((Entry(0, StepDone(1), ()),)).save(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"log.jsonl:3 is no entry of a recorder log: .*{why}"):
        load(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"hello": 1}\n')
    with pytest.raises(ValueError, match="other.jsonl:1 is no entry of a recorder log"):
        load(path)
