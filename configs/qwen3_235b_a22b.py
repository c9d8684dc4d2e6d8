"""Qwen3 235B-A22B on GPUs of 80 GB: one prefill and one decode instance, 16 GPUs each.

Weights are random; a folder with real ones is served by adding
--config.model.path=FOLDER --config.model.load_format=safetensors
"""

from ds_jax.config import Config, DecodeConfig, ModelConfig, PrefillConfig

config = Config(
    model=ModelConfig(path="models/published/qwen3-235b-a22b", load_format="dummy"),
    prefill=PrefillConfig(tp=16),
    decode=DecodeConfig(tp=16, slots=256),
)
