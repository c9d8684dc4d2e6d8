"""The accuracy launcher on small made-up runs: what it reads, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ds_jax.latency import load
from ds_jax.simulation.public import PUBLIC_DISTSERVE, PUBLIC_VLLM
from experiments.real_runs import read_run, read_runs
from experiments.simulator_accuracy import simulate_run

CHECKOUT = Path(__file__).resolve().parents[1]
DISAGG, COLOCATED = "disagg_p-tp2pp1_d-tp1pp1__n40__rate6", "colocated_tp1pp1__n40__rate2"
HEADER = ["arrival_s", "prompt_tokens", "output_tokens"]


def write(path: Path, rows: list[list[object]], header: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def workload(count: int, rate: float) -> list[list[object]]:
    random = np.random.default_rng(5)
    arrivals = np.cumsum(random.exponential(1 / rate, count))
    prompts, outputs = random.integers(30, 1500, count), random.integers(1, 200, count)
    return [[f"{at:.6f}", int(p), int(o)] for at, p, o in zip(arrivals, prompts, outputs, strict=True)]


def simulated(path: Path) -> tuple[np.ndarray, np.ndarray]:
    real = read_run(path)
    system = PUBLIC_VLLM if real.colocated else PUBLIC_DISTSERVE
    return simulate_run(real, system, load(CHECKOUT / system.profile.format(model="opt_13b")), 5120)


@pytest.mark.parametrize(
    "name",
    [DISAGG, COLOCATED, "disagg_p-tp1pp1_d-tp2pp1__n40__rate3", "disagg_p-tp2pp2_d-tp4pp2__n40__rate9"],
)
def test_what_the_real_system_did_is_never_looked_at(tmp_path, name):
    rows = workload(40, 5.0)
    bare = simulated(write(tmp_path / f"{name}.csv", rows, HEADER))
    told = simulated(write(tmp_path / f"{name}.csv", [[*row, 9.0, 7.0] for row in rows], [*HEADER, "ttft_s", "tpot_s"]))
    assert np.array_equal(bare[0], told[0]) and np.array_equal(bare[1], told[1])
    assert (bare[0] > 0).all() and all((bare[1] > 0) == (np.array([row[2] for row in rows]) > 1))


def test_a_lone_request_takes_what_the_formulas_say(tmp_path):
    first, token = simulated(write(tmp_path / f"{DISAGG}.csv", [[0.5, 1000, 3]], HEADER))
    # tp 2: 14.743 + 0.0685772 x 1000 + 2.44957e-6 x 1000^2 ms, and 5 ms until it is in the queue
    assert first[0] == pytest.approx(0.014743 + 0.0685772 + 0.0024496 + 0.005, abs=1e-5)
    # a pull of 63 pages of 13.1 MB over one link of 300 GB/s and 4 ms; then two steps of 19.93 ms + 0.627 us a token on
    # the GPU, and 3 ms + 0.1 us a token on its host
    pull = 0.004 + 63 * 16 * 819_200 / 300e9
    steps = sum(
        0.0199347 + 6.26936e-7 * context + 3.85e-5 + 0.003 + 1e-7 * context + 1.25e-5 for context in (1001, 1002)
    )
    assert token[0] == pytest.approx((pull + steps) / 2, abs=1e-5)


def test_results_come_in_the_order_of_the_rows(tmp_path):
    rows = workload(40, 5.0)
    in_order = simulated(write(tmp_path / f"{DISAGG}.csv", rows, HEADER))
    backwards = simulated(write(tmp_path / f"{DISAGG}.csv", rows[::-1], HEADER))
    assert np.array_equal(in_order[0], backwards[0][::-1]) and np.array_equal(in_order[1], backwards[1][::-1])


def test_the_launcher_writes_every_run_and_the_errors_of_those_that_are_told(tmp_path):
    runs, rows = tmp_path / "runs", workload(40, 5.0)
    runs.mkdir()
    write(runs / f"{COLOCATED}.csv", rows, HEADER)
    first, token = simulated(write(runs / f"{DISAGG}.csv", rows, HEADER))
    late = first + 1.0  # all of them outside the target
    write(
        runs / f"{DISAGG}.csv",
        [[*row, f"{a:.6f}", f"{b:.6f}"] for row, a, b in zip(rows, late, token, strict=True)],
        [*HEADER, "ttft_s", "tpot_s"],
    )
    flags = [f"--runs={runs}", "--slo_ttft=0.2", "--slo_tpot=0.1", "--requests=20", f"--output_dir={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.simulator_accuracy", *flags], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    attained = 100 * np.mean((first <= 0.2) & (token <= 0.1))
    assert summary["mean_abs_error_points"] == summary["max_abs_error_points"] == pytest.approx(attained)
    by_name = {entry["run"]: entry for entry in summary["runs"]}
    assert "real" not in by_name[COLOCATED] and by_name[DISAGG]["real"]["ttft_p90_s"] == pytest.approx(
        np.percentile(late, 90), abs=1e-5
    )
    for name in (DISAGG, COLOCATED):
        with (tmp_path / f"out/{name}.csv").open() as file:
            assert [record["prompt_tokens"] for record in csv.DictReader(file)] == [str(row[1]) for row in rows]
    assert (tmp_path / "out/accuracy.svg").exists() and (tmp_path / "out/runs.svg").exists()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (["x", 10, 10], "line 3: arrival_s = 'x' must be a number"),
        ([1.0, 0, 10], "line 3: prompt_tokens = 0 must be at least 1"),
        ([1.0, 10, 2.5], "line 3: output_tokens = 2.5 must be a whole number"),
        ([-1.0, 10, 2], "line 3: arrival_s = -1.0 must be at least 0"),
        ([1.0, 10], "line 3: 3 columns are needed"),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(tmp_path, row, told):
    path = write(tmp_path / f"{DISAGG}.csv", [[0.0, 10, 10], row], HEADER)
    with pytest.raises(ValueError, match=f"{DISAGG}.csv, {told}"):
        read_run(path)


def test_names_and_columns_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="run7.csv: the name must be like colocated_tp1pp1__n100__rate1.csv"):
        read_run(write(tmp_path / "run7.csv", [[0, 1, 1]], HEADER))
    with pytest.raises(ValueError, match="line 1: column output_tokens is missing"):
        read_run(write(tmp_path / f"{DISAGG}.csv", [[0, 1]], HEADER[:2]))
    with pytest.raises(FileNotFoundError, match="has no CSV files"):
        read_runs(tmp_path / "empty")


def test_a_request_that_no_instance_can_hold_is_refused_with_the_limit(tmp_path):
    with pytest.raises(ValueError, match="line 2: .* KV of 66199 tokens; the decode instance holds 66144"):
        simulated(write(tmp_path / f"{DISAGG}.csv", [[0, 200, 66_000]], HEADER))
    with pytest.raises(ValueError, match="line 2: prompt_tokens = 9000 must be at most 8192"):
        simulated(write(tmp_path / f"{DISAGG}.csv", [[0, 9000, 2]], HEADER))
    with pytest.raises(ValueError, match="tp = 3 is not in the latency profile|tp,pp = 3,1 has no KV capacity"):
        simulated(write(tmp_path / "colocated_tp3pp1__n1__rate1.csv", [[0, 20, 2]], HEADER))
