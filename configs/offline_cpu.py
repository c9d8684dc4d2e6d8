"""All prompts at once on a CPU of two cores: one instance that prefills and decodes, as many slots as requests.

Two host devices (tp = 2), because a loop over pages runs on one thread: each core has the loop over half of the heads.
Pages are large, steps are no larger than what the caches like, and oneDNN multiplies: prompts take most of the time
here, and the start need not be quick. Steps are compiled for more sizes than they would be else, since what a step is
padded with costs as much as what it is for.

Made for experiments.bench_engine; name a checkpoint with --config.model.path=FOLDER.
"""

from ds_jax.config import CacheConfig, Config, DecodeConfig, KernelsConfig, MixedConfig, ModelConfig, PrefillConfig

config = Config(
    model=ModelConfig(max_model_len=1280),
    policy="colocated",
    prefill=PrefillConfig(instances=0),
    decode=DecodeConfig(instances=0),
    mixed=MixedConfig(
        instances=1,
        tp=2,
        slots=64,
        slot_buckets=(1, 4, 16, 32),
        max_step_tokens=512,
        max_step_sequences=16,
        token_buckets=(32, 128, 256, 384, 512),
    ),
    cache=CacheConfig(page_size=64, num_pages=640),
    kernels=KernelsConfig(cpu_matmul="onednn"),
)
