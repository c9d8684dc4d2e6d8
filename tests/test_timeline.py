"""A log as a picture: what the trace says is what happened."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from ds_jax.protocol import Drain, Instance, InstanceLost, InstanceUp, Request, Role, Stopped
from ds_jax.recorder import Log
from ds_jax.scheduling.disaggregated import Disaggregated
from ds_jax.simulation import LinearLatency, simulate
from ds_jax.timeline import PagesHeld, read
from ds_jax.workload import Submission, poisson, submissions, uniform

MS = 1_000_000
INSTANCES = [
    Instance(0, Role.PREFILL, 0, 100, 4, max_step_tokens=64, max_step_sequences=4, saturation_tokens=32),
    Instance(1, Role.DECODE, 0, 30, 4, slots=4),
    Instance(2, Role.DECODE, 0, 30, 4, slots=4),
]


@pytest.fixture(scope="module")
def run():
    work = submissions(poisson(60.0, 50), uniform((1, 60), (1, 20), 50), max_tokens=20)
    work += [Submission(100 * MS, Request(1000, 5000, 20), 1), Submission(100 * MS, Request(1001, 9, 9, n=3), 9)]
    events = [
        (200 * MS, InstanceLost(2, 0)),
        (300 * MS, InstanceUp(Instance(2, Role.DECODE, 1, 30, 4, slots=4))),
        (400 * MS, Drain(1)),
        (401 * MS, Stopped(14, "abort")),
    ]
    return simulate(Disaggregated(), INSTANCES, work, LinearLatency(), events=events, steps=True, log=True)


@pytest.fixture(scope="module")
def events(run):
    return json.loads(json.dumps(read(run.log).chrome_trace()))["traceEvents"]


def test_every_track_is_named(events):
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"requests", "queues", "hand-overs", "prefill 0", "decode 1", "decode 2"} == set(processes.values())
    threads = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"} == threads


def test_slices_of_a_track_do_not_overlap(events):
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(tracks) >= 5
    for slices in tracks.values():
        for (_, end), (begin, _) in zip(sorted(slices), sorted(slices)[1:], strict=False):
            assert begin >= end - 1e-6


def test_steps_say_what_is_in_them(run, events):
    slices = {event["args"]["step"]: event for event in events if event["ph"] == "X" and "step" in event["args"]}
    steps = {step.id: step for steps in run.steps.values() for step in steps}
    for id, event in slices.items():
        step = steps[id]
        assert len(event["args"]["sequences"]) == len(step.prefills) + len(step.decodes)
        if step.prefills:
            tokens = sum(prefill.length for prefill in step.prefills)
            assert event["name"].startswith(f"{len(step.prefills)} prefills ({tokens} tokens)")
        else:
            assert event["name"].removesuffix(", lost") == f"{len(step.decodes)} decodes"
    assert sum(event["name"].endswith("lost") for event in slices.values()) <= 1


def test_stages_of_a_request_fill_its_slice(run, events):
    stretches = defaultdict(lambda: defaultdict(float))
    for event in events:
        if event.get("cat") == "request":
            sign = {"b": -1, "e": 1}[event["ph"]]
            stretches[event["id"]][event["name"]] += sign * event["ts"]
    assert set(stretches) == set(run.times)
    for id, named in stretches.items():
        times = run.times[id]
        assert named.pop(f"request {id}") == pytest.approx((times.end_ns - times.arrived_ns) / 1e3)
        assert sum(named.values()) == pytest.approx((times.end_ns - times.arrived_ns) / 1e3)
        for stage, seconds in times.stages_s().items():
            assert named.get(stage, 0.0) == pytest.approx(seconds * 1e6, abs=1e-3)


def test_begins_and_ends_of_a_request_nest(events):
    open_slices = defaultdict(list)
    for event in events:
        if event["ph"] == "b":
            open_slices[event["id"]].append(event["name"])
        elif event["ph"] == "e":
            assert open_slices[event["id"]].pop() == event["name"]
    assert not any(open_slices.values())


def test_queues_and_pools_are_empty_in_the_end_and_never_below(events):
    last = {}
    for event in events:
        if event["ph"] == "C":
            (value,) = event["args"].values()
            assert value >= 0
            last[event["pid"], event["name"]] = value
    assert len(last) == 5 and set(last.values()) == {0}


def test_instants_for_what_comes_and_goes(events):
    instants = [event["name"] for event in events if event["ph"] == "i"]
    for name in ("up, epoch 1", "lost, epoch 0", "drain", "abort 14"):
        assert instants.count(name) == 1
    assert any(name.startswith("reject 1000: prompt and max_tokens ask for") for name in instants)


def test_the_summary_adds_up(run):
    summary = read(run.log).summary()
    times = list(run.times.values())
    assert summary["requests"]["ended"] == len(times) and summary["requests"]["unfinished"] == 0
    assert summary["requests"]["ends"]["rejected"] == 1 and summary["requests"]["ends"]["abort"] == 1
    assert summary["output_tokens"] == sum(one.output_tokens for one in times)
    assert summary["span_s"] == pytest.approx(run.end_ns / 1e9)
    mean_s = sum((one.end_ns - one.arrived_ns) / 1e9 for one in times) / len(times)
    assert sum(summary["mean_stages_s"].values()) == pytest.approx(mean_s)
    begun = sum(len(steps) for steps in run.steps.values())
    assert begun - 1 <= sum(lane["steps"] for lane in summary["lanes"]) <= begun, "a lost queued step never ran"
    assert all(0 < lane["busy_share"] <= 1 for lane in summary["lanes"])


def test_a_log_that_lost_its_beginning_and_its_end_is_drawn_as_far_as_it_goes(run):
    cut = Log(run.log.entries[60:-60], dropped=60)
    timeline = read(cut)
    assert timeline.chrome_trace()["traceEvents"]
    assert timeline.summary()["dropped_entries"] == 60


def test_a_page_given_away_takes_the_rest_of_its_holder_with_it():
    held = PagesHeld()
    held.give(0, 7, [1, 2, 3])
    held.give(1, 7, [3, 4])
    assert held.count(7) == 2, "sequence 0 was preempted"
    held.share(2, 7, [3])
    held.forget(1)
    assert held.count(7) == 1
    held.release(2, 7)
    assert held.count(7) == 0


def test_the_launcher_writes_trace_and_summary(run, tmp_path):
    import subprocess
    import sys

    run.log.save(tmp_path / "log.jsonl")
    command = [
        sys.executable,
        "-m",
        "experiments.timeline",
        f"--log={tmp_path}/log.jsonl",
        f"--output_dir={tmp_path}/out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "hand_overs" in done.stdout
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["requests"]["ended"] == len(run.times)
    assert json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    (tmp_path / "log.jsonl").write_text("nonsense\n")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2 and "log.jsonl:1 is no entry of a recorder log" in failed.stderr
