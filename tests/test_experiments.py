"""The experiments at tiny sizes, against oracles where there are any."""

from __future__ import annotations

import html.parser
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from absl import flags

from ds_jax.config import SloConfig
from ds_jax.flags import define_config
from ds_jax.placement.layouts import Shape
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role
from experiments import table_2
from experiments.curves import study, tighten
from experiments.gathered import gather
from experiments.goodput_report import at_table_3, compare
from experiments.goodput_runs import AT_TABLE_3
from experiments.md1 import Server, crossing
from experiments.output import merged
from experiments.page import NOT_RUN, Experiment, Outcome, page
from experiments.published import Compared, rows
from experiments.reproduce import attempt, experiments, left
from experiments.simulator_accuracy import compare_runs
from experiments.systems import (
    EVALUATIONS,
    MII,
    Served,
    System,
    chosen_cases,
    mixed,
    multiplexing,
    pair,
    parallel,
    rate_at,
    refuse,
    serve,
)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """The cheap experiments by experiments.reproduce, and what it printed."""
    folder = tmp_path_factory.mktemp("reproduce")
    command = [sys.executable, "-m", "experiments.reproduce", "--quick", f"--output_dir={folder}",
               "--only=queueing,phase_tradeoffs", "--limit_s=200"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def small(index: int, requests: int = 40, rule: str = "joint"):
    plan = EVALUATIONS[index].plan()
    return replace(plan, search=replace(plan.search, requests=requests, rule=rule))


def test_the_formulas_of_queues_hold_at_their_ends_and_cross_where_they_are_equal():
    pipeline, tensor = Server("pipeline", 2, 0.1), Server("tensor", 1, 0.1 / 1.6)
    assert pipeline.formula_s(0.0) == 0.1 and tensor.formula_s(0.0) == 0.1 / 1.6
    d, k, r = 0.1, 1.6, 7.0
    assert pipeline.formula_s(r) == pytest.approx(d + r * d**2 / (4 * (2 - r * d)))
    assert tensor.formula_s(r) == pytest.approx(d / k + r * d**2 / (2 * k * (k - r * d)))
    rate = crossing(pipeline, tensor)
    assert rate is not None and pipeline.formula_s(rate) == pytest.approx(tensor.formula_s(rate))
    assert crossing(pipeline, Server("twice as fast", 1, 0.05)) is None


def test_queueing_differs_from_lindleys_recursion_by_nothing(reproduced):
    folder, _ = reproduced
    summary = json.loads((folder / "queueing" / "summary.json").read_text())
    assert summary["worst_error_to_recursion"] < 1e-6
    assert len(summary["points"]) == 21


def test_phase_tradeoffs_agree_with_the_profile(reproduced):
    from ds_jax.latency import load

    folder, _ = reproduced
    summary = json.loads((folder / "phase_tradeoffs" / "summary.json").read_text())
    step = load("configs/latency/a100_80g_opt_13b.json").step_time(1)
    assert summary["batching"]["prefill_tokens_per_s"]["512"][0] == pytest.approx(512 / step.step_s([(0, 512)], 0, 0))
    assert summary["batching"]["decode_tokens_per_s"]["256"][0] == pytest.approx(1 / step.step_s((), 1, 256))
    assert summary["prefill"]["speed_up"] > 1


def test_the_page_is_whole_and_fetches_nothing(reproduced):
    folder, printed = reproduced
    text = (folder / "index.html").read_text()
    assert "queueing" in printed and "failed" not in printed
    assert text.count("data:image/svg+xml;base64,") == 5
    assert "http:" not in text and "https:" not in text and "<script" not in text
    Balanced().check(text)
    summary = json.loads((folder / "summary.json").read_text())
    assert {"queueing", "phase_tradeoffs", "goodput"} <= set(summary["experiments"])
    for one in summary["compared"]:
        assert one["what"] and one["published"] and one["ours"] and one["why"]


def test_a_failed_experiment_is_shown_as_failed_and_markup_is_escaped(tmp_path):
    outcomes = [
        Outcome(Experiment("one", "one", "The first <b>"), 1.0, "one: it is <broken>"),
        Outcome(
            Experiment("two", "two", "The second"),
            2.0,
            "",
            "printed & done",
            {"extrapolated": ["a", "b"], "requests": {"joint": 1000}},
        ),  # fmt: skip
        Outcome(Experiment("four", "four", "The fourth"), 2.0, "", "done", {"requests": 14195}),
        Outcome(Experiment("three", "three", "The third"), None, NOT_RUN),
    ]
    compared = [{**row, "quick": False} for row in rows([Compared("a < b", "1", "2", "why", extrapolated=True)])]
    text = page(outcomes, compared)
    assert "failed: one: it is &lt;broken&gt;" in text and "a &lt; b" in text and "printed &amp; done" in text
    assert "step times of a, b are worked out" in text and "Failed: one." in text and "Not run: three." in text
    assert "requests a run: 1000 by the joint rule<" in text and "requests a run: 14195<" in text
    assert "--quick" not in text
    Balanced().check(text)


def test_what_was_made_with_tiny_sizes_says_so_when_the_page_is_made_again(reproduced):
    folder, _ = reproduced
    every = {one.name: one for one in experiments(None, None)}
    again = [left(every["queueing"], folder), left(every["goodput"], folder)]
    assert again[0].quick and again[0].arguments == ("--requests=20",) and again[1].error == NOT_RUN
    text = page(again, gather(again))
    assert "Made with --quick, the numbers mean nothing: queueing." in text and 'class="mark">quick<' in text


def test_what_fails_leaves_nothing_of_an_earlier_run(tmp_path):
    broken = Experiment("broken", "no_such_launcher", "A launcher that is lost")
    (tmp_path / "broken").mkdir()
    for name, text in (("summary.json", "{}"), ("reproduced.json", "{}"), ("old.svg", "<svg/>")):
        (tmp_path / "broken" / name).write_text(text)
    assert "no_such_launcher" in attempt(broken, tmp_path, quick=False, limit_s=100).error
    assert left(broken, tmp_path).error == NOT_RUN


def test_rows_are_made_of_summaries_and_what_was_not_run_says_so():
    search = {"goodput_per_gpu": 1.5, "configurations": 15, "simulated": 12, "search_s": 3.0, "cached": 2,
              "placements": {"disaggregated": {"unit": "two", "goodput_per_gpu": 1.5}}}  # fmt: skip
    draws = {"draws": [{"rule": "published", "goodput_per_gpu": rate} for rate in (1.41, 2.34, 1.9)]}
    outcomes = [
        Outcome(Experiment("public_search_13b_200", "placement_search", ""), 1.0, summary=search, quick=True),
        Outcome(Experiment("public_search_13b_250", "placement_search", ""), 1.0, summary=search),
        Outcome(Experiment("draws", "draws", ""), 1.0, summary=draws),
    ]
    told = {(one["what"], one["published"]): one for one in gather(outcomes)}
    row = told["OPT-13B, ShareGPT, 0.25/0.1 s: requests/s per GPU", "2.11"]
    assert row["ours"] == "1.50, two" and not row["quick"] and "3 draws come to 1.41 to 2.34" in row["why"]
    assert told["OPT-13B, ShareGPT, 0.25/0.1 s: requests/s per GPU, best vLLM", "1.41"]["ours"] == "none"
    (search_row,) = (one for (what, _), one in told.items() if what.startswith("search of 9"))
    assert search_row["ours"] == "answered from a cache" and search_row["quick"]


def test_errors_against_real_runs_are_counted_by_layout():
    real = {"attainment": 0.9, "tpot_p90_s": 0.5}
    run = {"run": "disagg_d-tp1pp1", "requests": 300, "rate": 6.0, "error_points": -2.0, "real": real,
           "simulated": {"attainment": 0.88, "tpot_p90_s": 0.4}}  # fmt: skip
    told = {(one.what, one.published): one.ours for one in compare_runs([run])}
    assert told["error against real A100 runs, decode tp1 pp1", "mean 3.0 points, at most 10"].startswith("mean 2.0")
    assert told["error against real A100 runs, colocated", "mean 5.5 points, at most 9.2"].startswith("not run")
    assert told["P90 TPOT past saturation, real 575 ms", "110 ms simulated"].startswith("400 ms (real 500 ms")


def test_table_2_has_both_systems_at_every_published_rate():
    found = table_2.simulate([30], workers=1)
    assert [(row["system"], row["rate"]) for row in found] == [
        (name, rate) for name in ("vLLM", "DistServe-Low") for rate in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
    ]
    assert all(0 <= row["ours"][30] <= 100 for row in found)
    vllm, distserve, ratio = table_2.compare(found)
    assert "97 / 96.8, 65.5 / 65.1" in vllm.published and "99.3 / 99.3, 87.3 / 88.3" in distserve.published
    assert ratio.published == "2.19x: 2.42 and 1.11 requests/s"


def test_notes_of_many_runs_are_told_once_with_every_place():
    told = merged([("a", "tp = 1: batch: 99 is outside the measured 1 to 95"), ("b", "another"),
                   ("c", "tp = 1: batch: 120 is outside the measured 1 to 95"), ("b", "another")])  # fmt: skip
    assert told == ["tp = 1: batch: 99 is outside the measured 1 to 95 (a, c)", "another (b)"]


def test_a_plan_that_is_not_the_papers_has_nothing_published_beside_it():
    one = EVALUATIONS[0]
    plan = one.plan()
    assert one.is_asked_by(replace(plan, search=replace(plan.search, seed=2, requests=50)))
    for other in (
        replace(plan, slo=SloConfig(0.3, 0.1)),
        replace(plan, cluster=replace(plan.cluster, gpus_per_node=8)),
        replace(plan, workload=replace(plan.workload, cv=4.0)),
    ):
        assert not any(each.is_asked_by(other) for each in EVALUATIONS)
    assert compare(None, "changed", {}, ("joint",)) == []


def parsed(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    define_config(PlanConfig, flag_values=values)
    values(["launcher", *arguments])
    return values


def test_plans_of_the_command_line_keep_the_papers_numbers_only_where_they_are_the_papers():
    assert [case.evaluation for case in chosen_cases(parsed())] == list(EVALUATIONS)
    assert [case.evaluation for case in chosen_cases(parsed("--config.slo.ttft_s=0.3"))] == [None] * 5
    (own,) = chosen_cases(parsed("--config=configs/plan_opt_13b_a100.py"))
    assert own.evaluation is EVALUATIONS[0] and own.plan.search.seed == 2
    (changed,) = chosen_cases(parsed("--config=configs/plan_opt_13b_a100.py", "--config.cluster.gpus_per_node=8"))
    assert changed.evaluation is None and changed.name == "opt-13b, sharegpt"


def test_a_knob_that_a_launcher_sets_itself_is_refused():
    values = parsed("--config.affinity=high")
    refuse(values, {"config.policy": "all are compared"})
    with pytest.raises(ValueError, match="--config.affinity has no effect here: both are searched"):
        refuse(values, {"config.affinity": "both are searched"})


def test_the_papers_placement_is_told_with_what_it_is_worth_and_what_holds_it_back():
    def curve(goodput, ttft, tpot):
        return {"goodput_90": goodput, "unit": f"unit of {goodput}",
                "curve": [{"rate": 1.5 * goodput, "both": 0.5, "ttft": ttft, "tpot": tpot}]}  # fmt: skip

    entry = {"joint": {"DistServe": curve(2.0, 0.9, 0.6), AT_TABLE_3: curve(1.6, 0.6, 0.9)}}
    told = at_table_3(entry, "joint")
    assert "1.60" in told and "where TTFT holds it back" in told and "unit of 2.0 has 2.00 (+25%)" in told
    for found, tied in [(0.18, True), (0.14, False), (0.25, False)]:
        entry = {"published": {"DistServe": curve(found, 0.9, 0.6), AT_TABLE_3: curve(0.23, 0.6, 0.9)}}
        assert ("both pass 0.16, and fewer GPUs win" in at_table_3(entry, "published")) is tied


def test_unknown_experiments_are_refused_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "experiments.reproduce", f"--output_dir={tmp_path}", "--only=nonsense"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--only: 'nonsense' must be one of queueing" in done.stderr


class Balanced(html.parser.HTMLParser):
    """Every element that is opened is closed, in order."""

    def check(self, text: str) -> None:
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("limit", [0.05, 0.7, 9.0, 60.0])
def test_the_rate_of_a_share_is_found_from_far_away(limit):
    asked = []

    def share_at(rate: float) -> float:
        asked.append(rate)
        return 1.0 - 0.1 * rate / limit  # 0.9 at the limit

    assert rate_at(share_at, 0.9, first=1.0) == pytest.approx(limit, rel=1e-6)
    assert len(asked) == len(set(asked)) < 25


def test_a_share_that_is_never_reached_or_never_lost_ends():
    assert rate_at(lambda rate: 0.5, 0.9) == 0.0
    assert rate_at(lambda rate: 1.0, 0.9, highest=50.0) >= 50.0


def test_shares_of_what_was_served_are_counted_by_hand():
    served = Served(1.0, np.array([0.1, 0.3, np.inf, 0.2]), np.array([0.05, 0.05, np.inf, 0.2]), np.zeros((4, 5)),
                    np.full(4, 9), 1)  # fmt: skip
    slo = SloConfig(0.25, 0.1)
    assert served.shares(slo) == (0.25, 0.5, 0.5)
    assert served.share(slo, 2.0) == 0.75
    low, high = served.interval(slo)
    assert 0 <= low < 0.25 < high <= 1


def test_every_system_serves_every_request_of_every_workload():
    for index, one in enumerate(EVALUATIONS):
        unit = pair(one.prefill, one.decode)
        for system in (
            System("DistServe", "disaggregated", unit),
            System("vLLM", "colocated", mixed(Shape(one.vllm_tp, 1))),
            System("DeepSpeed-MII", "chunked", mixed(Shape(one.vllm_tp, 1)), MII),
            System("multiplexed", "multiplexed", multiplexing(unit), foretells=True),
        ):
            served = serve(small(index, 12), system, 0.2)
            assert len(served.ttft_s) == 12 and served.rejected == 0, (one.name, system.name)
            assert np.isfinite(served.ttft_s).all() and (served.stages_s >= 0).all()


def test_a_lone_phase_has_only_its_own_latency():
    one = EVALUATIONS[0]
    system = System("DistServe", "disaggregated", pair(one.prefill, one.decode))
    prefill = serve(small(0), replace(system, unit=replace(system.unit, groups=system.unit.groups[:1])), 0.1,
                    phases=(Role.PREFILL,))  # fmt: skip
    assert (prefill.outputs == 1).all() and (prefill.tpot_s == 0).all()


def test_a_goodput_is_where_the_curve_crosses_and_targets_are_scaled_from_the_same_run():
    plan = small(0)
    system = System("DistServe", "disaggregated", pair(Shape(2, 1), Shape(1, 1)))
    found = study(plan, system, 3.0)
    curve = {point["rate"]: point["both"] for point in found["curve"]}
    inside = [rate for rate, both in curve.items() if both >= 0.9]
    outside = [rate for rate, both in curve.items() if both < 0.9]
    assert max(inside) <= found["goodput_90"] * 1.001 and min(outside) >= found["goodput_90"] * 0.999
    assert found["goodput_99"] <= found["goodput_90"]
    scaled = tighten(plan, system, found["goodput_90"])
    assert scaled["values"] == sorted(scaled["values"]), "wider targets hold more requests"
    assert scaled["tightest"] == pytest.approx(1.0, abs=0.1)


def test_results_come_in_the_order_of_the_jobs():
    assert parallel(divmod, [(7, 2), (9, 4)], "divisions", workers=1) == [(3, 1), (2, 1)]


def test_published_ratios_are_those_of_the_paper():
    assert [one.goodput_over_vllm for one in EVALUATIONS] == [4.60, 2.75, 1.99, 5.72, 4.24]
    assert [one.slo_over_vllm for one in EVALUATIONS] == [1.74, 3.14, 1.77, 1.35, 12.59]
    assert [one.prefill.gpus + one.decode.gpus for one in EVALUATIONS] == [3, 8, 21, 8, 8]
