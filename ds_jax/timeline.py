"""A recorder log as a picture: a Chrome trace for ui.perfetto.dev, and a summary in figures.

One process per instance with a track per lane (its steps) and a counter of pages held; one for hand-overs, with a
track per pair of instances; one for requests, each with its five stages; counters of the queues; instants for what
ends or comes and goes. Times are microseconds from the first entry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from ds_jax.metrics import DECODE_QUEUEING, PREFILL_QUEUEING, RequestTimes, StageClock
from ds_jax.protocol import (
    STAGES,
    Arrived,
    Command,
    Copy,
    CopyDone,
    Drain,
    Event,
    Instance,
    InstanceLost,
    InstanceUp,
    Medium,
    Reject,
    Run,
    Step,
    StepDone,
    Stopped,
)
from ds_jax.recorder import Log

_REQUESTS, _QUEUES, _COPIES, _INSTANCES = 1, 2, 3, 10  # process ids; instance i is 10 + i


def read(log: Log) -> Timeline:
    """The log as a timeline: `chrome_trace()` and `summary()` are what it is for."""
    timeline = Timeline(log.dropped)
    for now_ns, event, commands in log.entries:
        timeline.hear(event, commands, now_ns)
    return timeline


class PagesHeld:
    """Which sequences hold which pages of each instance, as far as commands tell.

    A log does not say when pages are let go. They are taken to be when the sequence ends, begins anew, or has been
    pulled away, and when a page is given to another sequence (its holders have been preempted).
    """

    def __init__(self) -> None:
        self._holders: defaultdict[int, dict[int, set[int]]] = defaultdict(dict)
        self._tables: defaultdict[int, dict[int, list[int]]] = defaultdict(dict)

    def count(self, instance: int) -> int:
        return len(self._holders[instance])

    def table(self, sequence: int, instance: int) -> list[int]:
        return self._tables[sequence].get(instance, [])

    def give(self, sequence: int, instance: int, pages: Iterable[int]) -> None:
        for page in pages:
            for before in list(self._holders[instance].get(page, ())):
                if before != sequence:
                    self.release(before, instance)
            self._hold(sequence, instance, page)

    def share(self, sequence: int, instance: int, pages: Iterable[int]) -> None:
        for page in pages:
            self._hold(sequence, instance, page)

    def _hold(self, sequence: int, instance: int, page: int) -> None:
        self._holders[instance].setdefault(page, set()).add(sequence)
        self._tables[sequence].setdefault(instance, []).append(page)

    def release(self, sequence: int, instance: int) -> None:
        holders = self._holders[instance]
        for page in self._tables[sequence].pop(instance, ()):
            if page in holders:
                holders[page].discard(sequence)
                if not holders[page]:
                    del holders[page]

    def forget(self, sequence: int) -> None:
        """The sequence has ended, or begins anew."""
        for instance in list(self._tables.get(sequence, ())):
            self.release(sequence, instance)
        self._tables.pop(sequence, None)

    def lose(self, instance: int) -> None:
        for sequence in {one for holders in self._holders[instance].values() for one in holders}:
            self.release(sequence, instance)


class Timeline:
    """Hears a log entry by entry; then `chrome_trace()` and `summary()`."""

    def __init__(self, dropped: int = 0):
        self.dropped = dropped
        self.times: list[RequestTimes] = []
        self._clock = StageClock(self._on_stage, self._on_step)
        self._pages = PagesHeld()
        self._shown_pages: dict[int, int] = {}
        self._instances: dict[int, Instance] = {}
        self._copies: dict[int, tuple[Copy, int]] = {}
        self._events: list[dict[str, Any]] = []
        self._tracks: dict[tuple[int, int], list[int]] = {}
        """For each pair of instances: when each of its tracks is free again."""
        self._queues: list[tuple[int, int, int]] = []
        """(at_ns, stage, +1 or -1)."""
        self._open: dict[int, Arrived] = {}
        self._lanes: defaultdict[tuple[int, int], dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._copied = {"copies": 0, "failed": 0, "pages": 0, "ns": 0}
        self._first_ns: int | None = None
        self._now_ns = 0

    def hear(self, event: Event, commands: Iterable[Command], now_ns: int) -> None:
        if self._first_ns is None:
            self._first_ns = now_ns
        self._now_ns = now_ns
        self._before(event)
        commands = list(commands)
        self._clock.hear(event, commands, now_ns)
        for command in commands:
            if isinstance(command, Run):
                self._give(command.step)
            elif isinstance(command, Copy):
                self._copies[command.id] = (command, now_ns)
                if command.destination.medium is Medium.DEVICE:
                    to = command.destination.instance
                    self._pages.share(command.sequence, to, command.shared)
                    self._pages.give(command.sequence, to, [page for _, page in command.pages])
            elif isinstance(command, Reject):
                self._instant(f"reject {command.sequence}: {command.why}", _REQUESTS)
        over = [command.sequence for command in commands if isinstance(command, Reject)]
        over += list(event.emitted) if isinstance(event, StepDone) else []
        over += [event.sequence] if isinstance(event, Stopped) else []
        for sequence in over:
            if self._clock.ended(sequence):
                self._end(sequence)
        self._count_pages()

    def _before(self, event: Event) -> None:
        match event:
            case Arrived(request):
                for sequence in request.sequences:
                    self._open[sequence] = event
                    prompt = {"prompt_tokens": request.prompt_tokens, "max_tokens": request.max_tokens}
                    self._slice("b", f"request {sequence}", self._now_ns, sequence, prompt)
            case Stopped(sequence, reason):
                self._instant(f"{reason} {sequence}", _REQUESTS)
            case CopyDone(copy, ok) if copy in self._copies:
                self._copy_done(*self._copies.pop(copy), ok)
            case InstanceUp(instance):
                self._instances[instance.id] = instance
                self._instant(f"up, epoch {instance.epoch}", _INSTANCES + instance.id)
            case InstanceLost(instance, epoch):
                self._pages.lose(instance)
                self._instant(f"lost, epoch {epoch}", _INSTANCES + instance)
            case Drain(instance):
                self._instant("drain", _INSTANCES + instance)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _on_stage(self, sequence: int, stage: int, begin_ns: int, end_ns: int) -> None:
        if sequence in self._open:  # else it arrived before the log begins
            self._slice("b", STAGES[stage], begin_ns, sequence)
            self._slice("e", STAGES[stage], end_ns, sequence)
        if stage in (PREFILL_QUEUEING, DECODE_QUEUEING):
            self._queues += [(begin_ns, stage, 1), (end_ns, stage, -1)]

    def _end(self, sequence: int) -> None:
        times = self._clock.pop(sequence)
        self.times.append(times)
        self._pages.forget(sequence)
        if self._open.pop(sequence, None):
            how = {"end": times.end, "output_tokens": times.output_tokens, "replays": times.replays}
            self._slice("e", f"request {sequence}", self._now_ns, sequence, how)

    def _slice(self, phase: str, name: str, at_ns: int, sequence: int, args: dict[str, Any] | None = None) -> None:
        """One end of a slice on the request's own track."""
        more = {"args": args} if args else {}
        self._add(phase, name, at_ns, _REQUESTS, 0, cat="request", id=sequence, **more)

    # --- steps and pages ----------------------------------------------------------------------------------------------

    def _give(self, step: Step) -> None:
        previous = None
        for sequence, start, length, _, pages in step.prefills:
            if length == 0 and previous is not None:
                self._pages.forget(sequence)
                self._pages.share(sequence, step.instance, self._pages.table(previous, step.instance))
            elif start == 0:
                self._pages.forget(sequence)
            self._pages.give(sequence, step.instance, pages)
            previous = sequence
        for sequence, _, pages in step.decodes:
            if pages:
                self._pages.give(sequence, step.instance, pages)

    def _count_pages(self) -> None:
        for instance in self._instances:
            pages = self._pages.count(instance)
            if self._shown_pages.get(instance) != pages:
                self._shown_pages[instance] = pages
                self._add("C", "pages held", self._now_ns, _INSTANCES + instance, 0, args={"pages": pages})

    def _on_step(self, step: Step, begin_ns: int, end_ns: int, done: bool) -> None:
        tokens = sum(prefill.length for prefill in step.prefills)
        name = ", ".join(
            [f"{len(step.prefills)} prefills ({tokens} tokens)"] * bool(step.prefills)
            + [f"{len(step.decodes)} decodes"] * bool(step.decodes)
            + ["lost"] * (not done)
        )
        args: dict[str, Any] = {"step": step.id, "epoch": step.epoch}
        args["sequences"] = [work[0] for work in (*step.prefills, *step.decodes)]
        pid = _INSTANCES + step.instance
        self._add("X", name, begin_ns, pid, step.lane, dur=(end_ns - begin_ns) / 1e3, args=args)
        lane = self._lanes[step.instance, step.lane]
        lane["steps"] += 1
        lane["lost"] += not done
        lane["busy_ns"] += end_ns - begin_ns
        lane["prefill_tokens"] += tokens
        lane["decode_tokens"] += len(step.decodes)

    # --- copies -------------------------------------------------------------------------------------------------------

    def _copy_done(self, copy: Copy, begin_ns: int, ok: bool) -> None:
        source, destination = copy.source.instance, copy.destination.instance
        if not ok:
            self._pages.release(copy.sequence, destination)
        elif copy.last and source != destination:
            self._pages.release(copy.sequence, source)
        tracks = self._tracks.setdefault((source, destination), [])
        track = next((index for index, free_ns in enumerate(tracks) if free_ns <= begin_ns), len(tracks))
        tracks[track : track + 1] = [self._now_ns]
        tid = (source * 1000 + destination) * 100 + track
        name = f"{copy.sequence}: {len(copy.pages)} pages" + ", failed" * (not ok)
        self._add("X", name, begin_ns, _COPIES, tid, dur=(self._now_ns - begin_ns) / 1e3, args={"copy": copy.id})
        self._copied["copies"] += 1
        self._copied["failed"] += not ok
        self._copied["pages"] += len(copy.pages)
        self._copied["ns"] += self._now_ns - begin_ns

    # --- output -------------------------------------------------------------------------------------------------------

    def _add(self, phase: str, name: str, at_ns: int, pid: int, tid: int, **rest: Any) -> None:
        at_us = (at_ns - (self._first_ns or 0)) / 1e3
        self._events.append({"ph": phase, "name": name, "ts": at_us, "pid": pid, "tid": tid, **rest})

    def _instant(self, name: str, pid: int) -> None:
        self._add("i", name, self._now_ns, pid, 0, s="p")

    def _names(self) -> list[dict[str, Any]]:
        processes = {_REQUESTS: "requests", _QUEUES: "queues", _COPIES: "hand-overs"}
        processes |= {_INSTANCES + id: f"{instance.role} {id}" for id, instance in self._instances.items()}
        threads = {(_INSTANCES + instance, lane): f"lane {lane}" for instance, lane in self._lanes}
        for (source, destination), tracks in self._tracks.items():
            for track in range(len(tracks)):
                tid = (source * 1000 + destination) * 100 + track
                threads[_COPIES, tid] = f"{source} to {destination}" + f" ({track + 1})" * bool(track)
        named = [("process_name", pid, 0, name) for pid, name in processes.items()]
        named += [("thread_name", pid, tid, name) for (pid, tid), name in threads.items()]
        return [
            {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}} for what, pid, tid, name in named
        ]

    def _queue_counters(self) -> list[dict[str, Any]]:
        counters: list[dict[str, Any]] = []
        waiting = {PREFILL_QUEUEING: 0, DECODE_QUEUEING: 0}
        for at_ns, stage, change in sorted(self._queues):
            waiting[stage] += change
            at_us = (at_ns - (self._first_ns or 0)) / 1e3
            args = {"sequences": waiting[stage]}
            counter = {"ph": "C", "name": STAGES[stage], "ts": at_us, "pid": _QUEUES, "tid": 0, "args": args}
            counters.append(counter)
        return counters

    def chrome_trace(self) -> dict[str, Any]:
        """JSON object format; events in order of time."""
        for sequence in self._open:
            self._slice("e", f"request {sequence}", self._now_ns, sequence, {"end": "unfinished"})
        self._open.clear()
        events = sorted(self._events + self._queue_counters(), key=lambda event: event["ts"])
        return {"displayTimeUnit": "ms", "traceEvents": self._names() + events}

    def summary(self) -> dict[str, Any]:
        """Requests, latencies, stages, and how busy every lane was; times in seconds."""
        span_s = (self._now_ns - (self._first_ns or 0)) / 1e9
        ends: defaultdict[str, int] = defaultdict(int)
        for one in self.times:
            ends["rejected" if one.rejected else one.end] += 1
        lanes = []
        for (instance, lane), counts in sorted(self._lanes.items()):
            busy_s = counts["busy_ns"] / 1e9
            busy = {"busy_s": busy_s, "busy_share": busy_s / span_s if span_s else 0.0}
            what = {key: counts[key] for key in ("steps", "lost", "prefill_tokens", "decode_tokens")}
            lanes.append({"instance": instance, "lane": lane} | busy | what)
        copies = {key: self._copied[key] for key in ("copies", "failed", "pages")}
        return {
            "span_s": span_s,
            "dropped_entries": self.dropped,
            "requests": {"ended": len(self.times), "unfinished": len(self._open), "ends": dict(ends)},
            "output_tokens": sum(one.output_tokens for one in self.times),
            "replays": sum(one.replays for one in self.times),
            "ttft_s": _percentiles([one.ttft_ns for one in self.times if one.ttft_ns is not None]),
            "tpot_s": _percentiles([one.tpot_ns for one in self.times if one.output_tokens > 1]),
            "mean_stages_s": {
                stage: sum(one.stages_ns[index] for one in self.times) / 1e9 / max(1, len(self.times))
                for index, stage in enumerate(STAGES)
            },
            "lanes": lanes,
            "hand_overs": copies | {"mean_s": self._copied["ns"] / 1e9 / max(1, self._copied["copies"])},
        }


def _percentiles(values_ns: list[Any]) -> dict[str, float]:
    if not values_ns:
        return {}
    shares = (50, 90, 99)
    found = np.percentile(values_ns, shares, method="inverted_cdf")
    return {f"p{share}": float(value) / 1e9 for share, value in zip(shares, found, strict=True)}
