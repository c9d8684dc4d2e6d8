"""The embedded story model, disaggregated: one prefill and one decode instance. What `make serve` serves.

Small on purpose, so that it starts within seconds on two CPU cores: two prefill programs, a small pool.
"""

from ds_jax.config import CacheConfig, Config, DecodeConfig, ModelConfig, PrefillConfig

config = Config(
    model=ModelConfig(path="models/embedded/story", served_name="story"),
    policy="disaggregated",
    prefill=PrefillConfig(max_step_tokens=512, max_step_sequences=8, saturation_tokens=256, token_buckets=(64, 512)),
    decode=DecodeConfig(slots=16),
    cache=CacheConfig(page_size=16, num_pages=1024),
)
