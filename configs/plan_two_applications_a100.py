"""Two applications of OPT-13B on one node of eight A100-80G: chat, and summaries of long documents with looser targets.

Each gets GPUs of its own, so that the smaller share of the two rates that it asks for is as large as can be.
"""

from ds_jax.config import SloConfig
from ds_jax.plan import Application, ClusterConfig, PlanConfig, WorkloadConfig

config = PlanConfig(
    model="models/published/opt-13b",
    profile="configs/latency/a100_80g_opt_13b.json",
    affinity="low",
    cluster=ClusterConfig(nodes=1, gpus_per_node=8),
    applications=(
        Application("chat", WorkloadConfig("sharegpt", rate=6.0), SloConfig(ttft_s=0.25, tpot_s=0.1)),
        Application("summaries", WorkloadConfig("longbench", rate=3.0), SloConfig(ttft_s=4.0, tpot_s=0.15)),
    ),
)
