"""What a search says: the policies beside each other, the verdict, and the configuration to serve with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_jax.config import Config, SloConfig
from ds_jax.flags import read_config
from ds_jax.placement.comparison import Comparison, compare
from ds_jax.placement.layouts import Group, Shape, Unit
from ds_jax.placement.report import serving_config, summary, verdict
from ds_jax.placement.search import Placement, PlacementSearch
from ds_jax.placement.trial import Outcome
from ds_jax.plan import ClusterConfig, PlanConfig, SearchConfig
from ds_jax.protocol import Role
from models.folder import read_configs

OPT_13B = PlanConfig(
    model="models/published/opt-13b",
    profile="configs/latency/a100_80g_opt_13b.json",
    affinity="low",
    slots=64,
    cluster=ClusterConfig(nodes=1, gpus_per_node=3),
    slo=SloConfig(ttft_s=0.25, tpot_s=0.1),
    search=SearchConfig(requests=40, precision=0.1, workers=1),
)
OPT_66B_ON_TWO = replace(
    OPT_13B,
    model="models/published/opt-66b",
    profile="configs/latency/a100_80g_opt_66b.json",
    cluster=ClusterConfig(nodes=1, gpus_per_node=2),
    slo=SloConfig(ttft_s=5.0, tpot_s=0.3),
)
LATE = Outcome(passed=True, share=0.9, ttft_s=0.2, tpot_s=0.1, ttft_share=0.99, tpot_share=0.91)


def _compared(plan: PlanConfig, beside: tuple[str, ...]) -> tuple[PlacementSearch, Comparison]:
    with PlacementSearch(plan, read_configs(plan.model).arch) as search:
        return search, compare(search, beside)


def test_the_configuration_to_serve_with_is_a_valid_one_of_the_placement_found(tmp_path):
    search, found = _compared(OPT_13B, ("colocated", "deflected"))
    assert set(found.placements) == {"disaggregated", "colocated", "deflected"}
    for placement in found.placements.values():
        file = tmp_path / f"{placement.policy}.py"
        file.write_text(serving_config(OPT_13B, placement, search.hardware, dummy=True), encoding="utf-8")
        config = read_config(str(file), Config)
        config.check()
        assert config.policy == placement.policy and config.devices() == placement.gpus
        assert config.model.dtype == "float16"
        assert all(group.slots == 64 for role, group in config.groups() if role is not Role.PREFILL)
    values = summary(OPT_13B, found)
    assert values["best_colocated_goodput_per_gpu"] == found.placements["colocated"].goodput_per_gpu
    assert values["best_multiplexed_goodput_per_gpu"] == found.placements["deflected"].goodput_per_gpu
    assert values["configurations"] == sum(one.candidate.policy == "disaggregated" for one in found.judged)
    assert set(values["beside_s"]) == {"colocated", "deflected"} and values["search_s"] > 0
    assert "isaggregation" in values["verdict"]


def test_where_only_others_fit_the_best_of_them_is_named_and_all_of_it_is_written_down():
    """The weights of OPT-66B fill two GPUs: there is one instance or none."""
    _, found = _compared(OPT_66B_ON_TWO, ("colocated",))
    assert found.placement is None and set(found.placements) == {"colocated"}
    sentence = found.refusal()
    assert sentence.startswith("disaggregated: ") and "colocated, 1 x mixed tp2 pp1" in sentence
    values = summary(OPT_66B_ON_TWO, found)
    assert values["policy"] == "disaggregated" and values["goodput_per_gpu"] is None
    assert values["best_colocated_goodput_per_gpu"] > 0
    assert "not possible" in values["verdict"] and "colocated" in values["verdict"]
    assert set(values["infeasible"]) == {"disaggregated"}


@pytest.mark.parametrize(
    ("goodputs", "infeasible", "words"),
    [
        ({"disaggregated": 2.0, "colocated": 1.0}, {}, ["pays: 2.00 x", "TPOT holds it back"]),
        ({"disaggregated": 1.0, "colocated": 2.0}, {}, ["does not pay", "2.00 x"]),
        ({"disaggregated": 1.0, "colocated": 1.01}, {}, ["about equal"]),
        ({"disaggregated": 1.0, "colocated": 0.5, "deflected": 2.0}, {}, ["pays", "deflected is better still: 2.00"]),
        ({"disaggregated": 1.0}, {}, ["not known: colocated placements were not asked for"]),
        ({"disaggregated": 1.0}, {"colocated": "memory"}, ["No colocated placement meets both targets (memory)"]),
        ({"multiplexed": 1.0}, {"disaggregated": "memory"}, ["not possible here (memory)", "multiplexed with 1"]),
        ({}, {"disaggregated": "memory", "colocated": "memory"}, ["No placement meets both"]),
    ],
)
def test_the_verdict_tells_what_was_not_asked_from_what_cannot_be(goodputs, infeasible, words):
    unit = Unit((Group(Role.MIXED, Shape(1, 1)),))
    placements = {policy: Placement(policy, unit, 1, goodput, LATE) for policy, goodput in goodputs.items()}
    found = Comparison("disaggregated", placements, infeasible, (), 1.0, {}, False)
    told = verdict(OPT_13B, found)
    assert all(word in told for word in words), told


def test_a_placement_with_pipeline_stages_says_that_only_the_simulator_runs_it(tmp_path):
    search = PlacementSearch(OPT_13B, read_configs(OPT_13B.model).arch)
    unit = Unit((Group(Role.PREFILL, Shape(1, 2)), Group(Role.DECODE, Shape(1, 1))))
    file = tmp_path / "serve.py"
    placement = Placement("disaggregated", unit, 1, 1.0)
    file.write_text(
        serving_config(OPT_13B, placement, search.hardware, dummy=True, instead="serve_pp1.py"), encoding="utf-8"
    )
    assert "pp = 1" in file.read_text() and "serve_pp1.py" in file.read_text()
    assert read_config(str(file), Config).prefill.pp == 2
