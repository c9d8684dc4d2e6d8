"""Where to put OPT-13B on one node of four A100-80G: chat, ShareGPT lengths (DistServe's evaluation, section 6.2)."""

from ds_jax.config import SloConfig
from ds_jax.plan import ClusterConfig, PlanConfig, SearchConfig

config = PlanConfig(
    model="models/published/opt-13b",
    profile="configs/latency/a100_80g_opt_13b.json",
    affinity="low",
    cluster=ClusterConfig(nodes=1, gpus_per_node=4),
    slo=SloConfig(ttft_s=0.25, tpot_s=0.1),
    # Of ten draws, the one whose 300 requests are most like the 300 of the published runs (mean prompt 780 tokens).
    # Over all ten, search.rule = published gives 1.41 to 2.34 requests/s/GPU at 200/100 ms; the public code says 1.56.
    search=SearchConfig(seed=2),
)
