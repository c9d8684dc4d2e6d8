"""Gemma 2 27B on GPUs of 80 GB: one prefill and one decode instance, 2 GPUs each.

Weights are random; a folder with real ones is served by adding
--config.model.path=FOLDER --config.model.load_format=safetensors
"""

from ds_jax.config import Config, DecodeConfig, ModelConfig, PrefillConfig

config = Config(
    model=ModelConfig(path="models/published/gemma-2-27b", load_format="dummy"),
    prefill=PrefillConfig(tp=2),
    decode=DecodeConfig(tp=2, slots=256),
)
