"""Where to put OPT-13B on one node of four A100-80G: chat, ShareGPT lengths (DistServe's evaluation, section 6.2)."""

from ds_jax.config import SloConfig
from ds_jax.plan import ClusterConfig, PlanConfig

config = PlanConfig(
    model="models/published/opt-13b",
    profile="configs/latency/a100_80g_opt_13b.json",
    affinity="low",
    cluster=ClusterConfig(nodes=1, gpus_per_node=4),
    slo=SloConfig(ttft_s=0.25, tpot_s=0.1),
)
