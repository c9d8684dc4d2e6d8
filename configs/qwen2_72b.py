"""Qwen2 72B on GPUs of 80 GB: one prefill and one decode instance, 4 GPUs each.

Weights are random; a folder with real ones is served by adding
--config.model.path=FOLDER --config.model.load_format=safetensors
"""

from ds_jax.config import Config, DecodeConfig, ModelConfig, PrefillConfig

config = Config(
    model=ModelConfig(path="models/published/qwen2-72b", load_format="dummy"),
    prefill=PrefillConfig(tp=4),
    decode=DecodeConfig(tp=4, slots=256),
)
