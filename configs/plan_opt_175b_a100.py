"""Where to put OPT-175B on four nodes of eight A100-80G: chat, ShareGPT lengths (DistServe's evaluation, section 6.2).

Nobody published step times of this model: they are extrapolated from the figures of GPU and model.
"""

from ds_jax.config import SloConfig
from ds_jax.plan import ClusterConfig, PlanConfig

config = PlanConfig(
    model="models/published/opt-175b",
    affinity="low",
    cluster=ClusterConfig(nodes=4, gpus_per_node=8),
    slo=SloConfig(ttft_s=4.0, tpot_s=0.2),
)
