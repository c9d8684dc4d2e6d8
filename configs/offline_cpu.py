"""All prompts at once on a CPU of two cores: one instance that prefills and decodes, as many slots as requests.

Two host devices (tp = 2), because a loop over pages runs on one thread: each core has the loop over half of the heads.
Pages are large.

Made for experiments.bench_engine; name a checkpoint with --config.model.path=FOLDER.
"""

from ds_jax.config import CacheConfig, Config, DecodeConfig, MixedConfig, ModelConfig, PrefillConfig

config = Config(
    model=ModelConfig(max_model_len=1280),
    policy="colocated",
    prefill=PrefillConfig(instances=0),
    decode=DecodeConfig(instances=0),
    mixed=MixedConfig(instances=1, tp=2, slots=64, max_step_tokens=2048, max_step_sequences=16),
    cache=CacheConfig(page_size=32, num_pages=1280),
)
