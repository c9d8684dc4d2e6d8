"""What a search finds for the embedded model is served on forced host devices without an edit."""

from __future__ import annotations

import json
import subprocess
import sys

import httpx

from ds_jax.latency import LatencyProfile, StepFit
from tests.server.test_signals import CHECKOUT, process


def test_a_placement_found_from_a_profile_is_served_as_it_is(tmp_path):
    """Profile, search, serve, ask: on two devices, with one size of prefill step, so that little is compiled."""
    fit = StepFit(1, (0.01, 1e-4, 1e-7), (0.01, 1e-6, 4e-4))
    LatencyProfile("cpu", "story", "float32", {1: fit}, kv_tokens={"1,1": 4096}, copy_bytes_per_s=1e9).save(
        tmp_path / "profile.json"
    )
    search = [sys.executable, "-m", "experiments.placement_search", "--config=configs/plan_story.py",
              f"--config.profile={tmp_path / 'profile.json'}", f"--output_dir={tmp_path}", "--beside=",
              "--config.cluster.gpus_per_node=2", "--config.search.requests=60", "--config.slots=4",
              "--config.max_step_tokens=64", "--config.token_buckets=64", "--config.workload.name=24/16"]  # fmt: skip
    done = subprocess.run(search, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["prefill_instances"] == summary["decode_instances"] == 1
    with process("-m", "experiments.serve", f"--config={tmp_path / 'serve.py'}", "--port=0") as server:
        asked = {"model": "story", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 8 and answer.json()["choices"][0]["text"]
