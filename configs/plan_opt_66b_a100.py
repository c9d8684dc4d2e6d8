"""Where to put OPT-66B on one node of eight A100-80G: chat, ShareGPT lengths (DistServe's evaluation, section 6.2)."""

from ds_jax.config import SloConfig
from ds_jax.plan import ClusterConfig, PlanConfig

config = PlanConfig(
    model="models/published/opt-66b",
    profile="configs/latency/a100_80g_opt_66b.json",
    affinity="low",
    cluster=ClusterConfig(nodes=1, gpus_per_node=8),
    slo=SloConfig(ttft_s=2.5, tpot_s=0.15),
)
