"""Where to put the embedded story model on forced CPU devices of one machine, from a profile of experiments.profile.

.venv/bin/python -m experiments.placement_search --config=configs/plan_story.py \
    --config.profile=out/profile/profile.json --output_dir=out/plan_story
"""

from ds_jax.config import SloConfig
from ds_jax.plan import ClusterConfig, PlanConfig, SearchConfig, WorkloadConfig

config = PlanConfig(
    model="models/embedded/story",
    dtype="float32",
    slots=16,
    # As in configs/story.py, which the profile is measured with: what is found is served as it was measured.
    max_step_tokens=512,
    token_buckets=(64, 512),
    affinity="low",
    cluster=ClusterConfig(nodes=1, gpus_per_node=4, gpu="own"),
    slo=SloConfig(ttft_s=1.0, tpot_s=0.1),
    workload=WorkloadConfig(name="64/48"),
    search=SearchConfig(max_pp=1, requests=300),
)
