"""OPT-13B on eight A100-80G under a workload that shifts between chat and long documents (experiments.replanning)."""

from ds_jax.config import SloConfig
from ds_jax.plan import ClusterConfig, PlanConfig, SearchConfig

config = PlanConfig(
    model="models/published/opt-13b",
    profile="configs/latency/a100_80g_opt_13b.json",
    affinity="high",
    cluster=ClusterConfig(nodes=1, gpus_per_node=8),
    slo=SloConfig(ttft_s=1.0, tpot_s=0.1),
    search=SearchConfig(requests=500, precision=0.1),
)
