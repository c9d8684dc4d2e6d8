"""Random weights without any file but config.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ds_jax.config import ModelConfig
from ds_jax.sampling import SamplingParams
from tests import goldens
from tests.engine.serving import config_for, serve


def test_dummy_weights_serve_text_by_bytes(tmp_path: Path) -> None:
    case = goldens.CASES[0]
    config = json.loads((case.folder / "config.json").read_text()) | {"vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = config_for(case)
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        serve(replace(base, model=ModelConfig(path=str(tmp_path))))
    dummy = replace(base, model=ModelConfig(path=str(tmp_path), load_format="dummy", max_model_len=96))
    with serve(dummy) as llm:
        output = llm.generate(["héllo"], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))[0]
        assert len(output.prompt_token_ids) == len("héllo".encode())
        assert llm.tokenizer.decode(output.prompt_token_ids) == "héllo"
        assert len(output.token_ids) == 5
