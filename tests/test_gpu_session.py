"""The session on a GPU, as far as it can be tried without one: its plan, its notes, what it does when parts fail."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest

from ds_jax.latency import LatencyProfile, StepFit
from ds_jax.protocol import Instance, Role
from experiments.engine_cases import read_cases
from experiments.engine_prediction import checked
from experiments.gpu_session import OUT_OF_TIME, PARTS, Part, Session, execute, flags_of, outcomes_of, parts

LOG = """collecting ... collected 4 items / 46 deselected / 4 selected

tests/kernels/test_every_backend.py::test_smoke_of_decode[bfloat16-128-64] PASSED [ 25%]
tests/kernels/test_every_backend.py::test_smoke_of_decode[float16-64-16] FAILED [ 50%]
tests/kernels/test_every_backend.py::test_smoke_of_decode[bfloat16-80-16] \
"""


@pytest.fixture
def session(tmp_path: Path) -> Session:
    (tmp_path / "work").mkdir()
    return Session(tmp_path / "out", tmp_path / "work")


def test_the_parts_take_at_most_eight_minutes_and_their_cases_can_be_read(tmp_path: Path):
    for quick in (False, True):
        assert [part.name for part in parts(tmp_path, quick)] == list(PARTS)
        assert all(read_cases(tmp_path / f"{name}_cases.json") for name in ("llama", "opt"))
    assert sum(PARTS.values()) <= 480


def test_a_log_that_ends_in_a_test_tells_that_it_is_unfinished():
    assert list(outcomes_of(LOG).values()) == ["PASSED", "FAILED", "unfinished"]


def test_a_kernel_that_hangs_or_is_wrong_is_replaced_in_what_serves_and_measures():
    serves, kernel = Part("llama_3_8b", (), 5, serves=True), Part("kernels_decode", (), 5, "decode")
    good = {"outcome": "done", "tests": {"test[bfloat16-128-64]": "PASSED"}}
    hung = {"outcome": OUT_OF_TIME, "tests": {"test[bfloat16-128-64]": "unfinished"}}
    assert flags_of(serves, 65.0, {}) == ["--time_limit_s=60"]
    assert flags_of(serves, 65.0, {"tests_decode": good, "tests_prefill": good}) == ["--time_limit_s=60"]
    assert "--config.kernels.backend=xla" in flags_of(serves, 65.0, {"tests_decode": good, "tests_prefill": hung})
    assert "--backends=xla" in flags_of(kernel, 65.0, {"tests_decode": hung})
    # A test may fail by a rounding; the benchmark's own comparison then decides.
    failed = {"outcome": "failed (1)", "tests": {"test[bfloat16-128-64]": "FAILED"}}
    rows = {"files": {"summary.json": {"cases": [{"form": "mosaic", "error": 0.003}]}}}
    assert flags_of(serves, 65.0, {"tests_decode": failed, "kernels_decode": rows}) == ["--time_limit_s=60"]
    assert flags_of(kernel, 65.0, {"tests_decode": failed}) == ["--time_limit_s=60"]


def test_what_a_part_wrote_before_its_time_was_over_is_kept(session: Session):
    program = f"""if True:
        import pathlib, time
        folder = pathlib.Path({str(session.work / "slow")!r})
        (folder / "summary.json").write_text('{{"cases": [1]}}')
        (folder / "half.json").write_text("[")
        print("begun", flush=True)
        time.sleep(60)
    """
    assert execute(Part("slow", (sys.executable, "-c", program)), session, 3.0) == OUT_OF_TIME
    assert execute(Part("wrong", (sys.executable, "-c", "raise SystemExit(3)")), session, 9.0) == "failed (3)"
    told = json.loads((session.output / "session.json").read_text())["parts"]
    assert told["slow"]["files"] == {"summary.json": {"cases": [1]}}
    assert told["slow"]["log"] == ["begun"]
    assert told["slow"]["seconds"] < 6
    assert sorted(path.name for path in session.output.iterdir()) == ["details.tar.gz", "session.json"]
    with tarfile.open(session.output / "details.tar.gz") as archive:
        assert {"slow.log", "slow/summary.json", "slow/half.json", "wrong.log"} <= set(archive.getnames())


@pytest.mark.filterwarnings("ignore:latency profile")
def test_the_prediction_of_steps_that_take_as_long_as_the_profile_says_has_no_error():
    profile = LatencyProfile(
        device="any",
        model="any",
        dtype="float32",
        fits={1: StepFit(1, (0.1, 0.0, 0.0), (0.01, 0.0, 0.0))},
        kv_bytes_per_token=1,
        copy_bytes_per_s=1e9,
    )
    instance = Instance(0, Role.MIXED, 0, 64, 16, slots=4, max_step_tokens=64, max_step_sequences=4)
    case = {"name": "a", "batch": 1, "prompt_tokens": 8, "output_tokens": 11}
    measured = {"prefill_seconds": 0.1, "total_seconds": 0.2}
    rows = checked(case | measured, [instance], {"policy": "colocated", "scheduler": {}}, profile, 1)
    assert [row["what"] for row in rows] == ["prefill", "all", "decode"]
    assert all(abs(row["error"]) < 0.01 for row in rows)
