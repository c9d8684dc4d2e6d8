"""Several applications on one cluster: every division is weighed, and the best one taken."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from ds_jax.config import SloConfig
from ds_jax.knobs import parse
from ds_jax.placement.division import Share, divide, fit, place_applications, shares
from ds_jax.placement.search import Infeasible, PlacementSearch
from ds_jax.plan import Application, ClusterConfig, PlanConfig, SearchConfig, WorkloadConfig
from models.folder import read_configs

CHAT = Application("chat", WorkloadConfig("humaneval", rate=8.0), SloConfig(ttft_s=0.25, tpot_s=0.1))
LONG = Application("long", WorkloadConfig("longbench", rate=1.0), SloConfig(ttft_s=4.0, tpot_s=0.2))
PLAN = PlanConfig(
    model="models/published/opt-13b",
    profile="configs/latency/a100_80g_opt_13b.json",
    policy="colocated",
    cluster=ClusterConfig(nodes=1, gpus_per_node=4),
    search=SearchConfig(requests=40, precision=0.1, workers=1, max_pp=1),
    applications=(CHAT, LONG),
)


def test_a_division_of_a_small_cluster_is_the_best_of_all():
    """Oracle: one search for each application on each side of each cut of the four GPUs."""
    arch = read_configs(PLAN.model).arch
    division = place_applications(PLAN, arch)
    carried = {}
    for gpus in (1, 2, 3):
        sides = []
        for one, size in ((CHAT, gpus), (LONG, 4 - gpus)):
            alone = replace(PLAN, applications=(), slo=one.slo, workload=WorkloadConfig(one.workload.name),
                            cluster=ClusterConfig(1, size))  # fmt: skip
            with PlacementSearch(alone, arch) as search:
                placement = search.place("colocated")
            sides.append(placement.goodput_per_gpu * placement.gpus / one.workload.rate)
        carried[gpus] = min(sides)
    best = max(carried, key=lambda gpus: carried[gpus])
    assert division.carried == pytest.approx(carried[best])
    assert [tenant.share.gpus for tenant in division.tenants] == [best, 4 - best]
    assert sum(tenant.placement.gpus for tenant in division.tenants) <= 4


@pytest.mark.parametrize("wanted", [(0.0, 0.0, 0.0), (1.0, 3.0, 2.0)])
def test_no_division_into_shares_that_fit_is_better(wanted):
    """Oracle: all triples of shares, on a cluster whose shares cannot be split across its nodes."""
    cluster = ClusterConfig(nodes=2, gpus_per_node=4)
    every = shares(cluster)
    assert [share.gpus for share in every] == [1, 2, 3, 4, 8]
    served = [
        {share: share.gpus**power for share in every if share.gpus >= least}
        for power, least in ((0.5, 1), (1.0, 2), (1.4, 2))
    ]

    def worth(chosen):
        rates = [rates[share] for rates, share in zip(served, chosen, strict=True)]
        return min(rate / need for rate, need in zip(rates, wanted, strict=True)) if all(wanted) else sum(rates)

    possible = [chosen for chosen in itertools.product(*served) if fit(chosen, cluster)]
    chosen = divide(served, wanted, cluster)
    assert chosen in possible
    assert worth(chosen) == pytest.approx(max(map(worth, possible)))


def test_shares_stay_inside_nodes_or_take_whole_ones():
    cluster = ClusterConfig(nodes=2, gpus_per_node=4)
    half = Share(1, 2)
    assert fit([half] * 4, cluster) and not fit([half] * 5, cluster)
    assert fit([Share(1, 3), Share(1, 3)], cluster) and not fit([Share(1, 3), Share(1, 3), half], cluster)
    assert fit([Share(1, 4), half, half], cluster) and not fit([Share(2, 4), half], cluster)


def test_applications_that_do_not_fit_together_are_refused_with_their_smallest_shares():
    """The weights of OPT-66B take two GPUs of every application."""
    plan = replace(PLAN, model="models/published/opt-66b", profile="configs/latency/a100_80g_opt_66b.json",
                   cluster=ClusterConfig(1, 3), applications=(replace(CHAT, slo=LONG.slo), LONG))  # fmt: skip
    with pytest.raises(Infeasible, match=r"1 x 3 is too small .* smallest shares are chat 2 GPUs, long 2 GPUs"):
        place_applications(plan, read_configs(plan.model).arch)


def test_applications_can_be_given_by_a_flag():
    text = "name=chat,workload.name=sharegpt,workload.rate=4,slo.ttft_s=0.2;name=docs,slo.tpot_s=0.15"
    chat, docs = parse(tuple[Application, ...], text)
    assert (chat.name, chat.workload.rate, chat.slo.ttft_s) == ("chat", 4.0, 0.2)
    assert docs == Application("docs", slo=SloConfig(ttft_s=0.25, tpot_s=0.15))
    with pytest.raises(ValueError, match=r"'slo.ttft=1' must be NAME=VALUE .* did you mean slo.ttft_s"):
        parse(tuple[Application, ...], "name=chat,slo.ttft=1")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"applications": (replace(CHAT, name="a b"), LONG)}, "name = 'a b' must be of letters"),
        ({"applications": (CHAT, replace(LONG, name="chat"))}, "the name chat is given 2 times"),
        ({"applications": (CHAT, replace(LONG, workload=WorkloadConfig()))}, r"long.workload.rate = 0 must be greater"),
        ({"applications": (replace(CHAT, slo=SloConfig()), LONG)}, "chat.slo.ttft_s = 0.0 must be greater than 0"),
        ({"cluster": ClusterConfig(1, 1)}, "2 of them need a GPU each; the cluster has 1"),
        ({"cluster": ClusterConfig(1, 4, decode_gpu="l40s-48g")}, "decode_gpu = l40s-48g must be empty"),
    ],
)
def test_applications_that_make_no_sense_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(PLAN, **changes).check()
