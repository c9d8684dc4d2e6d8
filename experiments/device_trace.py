"""What a device does between and inside steps, read from a trace of JAX's profiler.

A trace holds, for every stream of the device, when each kernel began and how long it took. The union of those times is
when the device was busy; what is left of the time of n steps is idle, and the n - 1 longest gaps in it are at least as
long as the gaps between the steps.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

KERNELS = 25
"""Names told of: those that take longest."""


class Span(NamedTuple):
    """One kernel or copy on the device."""

    begin_ns: float
    end_ns: float
    name: str


@contextmanager
def tracing(folder: Path) -> Iterator[None]:
    """Trace the devices, not Python, into `folder`."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow down the threads that feed the device
    options.host_tracer_level = 0
    jax.profiler.start_trace(str(folder), profiler_options=options)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def read(folder: Path) -> list[Span]:
    """All kernels and copies of the first GPU in the newest trace of a folder; empty: there is no GPU in it."""
    import jax

    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    data: Any = jax.profiler.ProfileData.from_file(str(files[-1]))
    planes = {plane.name: plane for plane in data.planes}
    device = next((planes[name] for name in sorted(planes) if name.startswith("/device:GPU")), None)
    # Other lines repeat the kernels by program, source and so on.
    lines = [] if device is None else [line for line in device.lines if "stream" in line.name.lower()]
    return [
        Span(event.start_ns, event.start_ns + event.duration_ns, event.name) for line in lines for event in line.events
    ]


def busy(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """The union of the spans, as disjoint stretches in order."""
    found: list[tuple[float, float]] = []
    for begin, end, _ in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def gaps(spans: Sequence[Span], steps: int, step_s: float) -> dict[str, Any] | None:
    """How idle the device was during the last `steps` steps of a trace.

    Args:
        spans: of the whole trace.
        steps: how many to look at; the trace ends with the last of them.
        step_s: how long one takes, measured without a trace.

    Returns:
        idle_share: of the time, within and between steps; between_steps_share: at most so much lies between steps;
        kernels: the seconds of each name in one step. None: nothing was traced.
    """
    if not spans or steps < 2:
        return None
    end = max(span.end_ns for span in spans)
    begin = end - steps * step_s * 1e9
    inside = [span for span in spans if span.begin_ns >= begin]
    stretches = busy(inside)
    window = stretches[-1][1] - stretches[0][0]
    pauses = sorted((b[0] - a[1] for a, b in zip(stretches, stretches[1:], strict=False)), reverse=True)
    names: defaultdict[str, float] = defaultdict(float)
    for span in inside:
        names[span.name] += span.end_ns - span.begin_ns
    longest = sorted(names.items(), key=lambda item: -item[1])[:KERNELS]
    return {
        "steps": steps,
        "window_s": window / 1e9,
        "idle_share": sum(pauses) / window,
        "between_steps_share": sum(pauses[: steps - 1]) / window,
        "longest_gaps_us": [pause / 1e3 for pause in pauses[:8]],
        "kernels_per_step": len(inside) / steps,
        "kernels": {name[:160]: took / 1e9 / steps for name, took in longest},
    }


def warm_up(folder: Path) -> None:
    """The first trace of a process loads the tracer, which takes seconds."""
    with tracing(folder / "warm_up"):
        time.sleep(0.01)
