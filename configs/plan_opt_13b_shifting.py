"""OPT-13B on four A100-80G under a workload that shifts from short questions with long answers to long documents with
short ones, and back (experiments.replanning). The first wants GPUs that decode, the second GPUs that prefill."""

from ds_jax.config import SloConfig
from ds_jax.plan import ClusterConfig, PlanConfig, SearchConfig

config = PlanConfig(
    model="models/published/opt-13b",
    profile="configs/latency/a100_80g_opt_13b.json",
    affinity="high",
    cluster=ClusterConfig(nodes=1, gpus_per_node=4),
    slo=SloConfig(ttft_s=1.0, tpot_s=0.1),
    search=SearchConfig(requests=1000, precision=0.05, max_pp=1),
)
