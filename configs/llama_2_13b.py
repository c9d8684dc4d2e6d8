"""Llama 2 13B on GPUs of 80 GB: one prefill and one decode instance, one GPU each.

Weights are random; a folder with real ones is served by adding
--config.model.path=FOLDER --config.model.load_format=safetensors
"""

from ds_jax.config import Config, DecodeConfig, ModelConfig

config = Config(
    model=ModelConfig(path="models/published/llama-2-13b", load_format="dummy"),
    decode=DecodeConfig(slots=64),
)
