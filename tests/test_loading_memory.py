"""Loading takes little memory beside the weights: the launcher that measures it, on a small checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from models.folder import CHECKOUT


def test_loading_takes_no_more_than_one_parameter_beside_the_weights(tmp_path: Path):
    arguments = ["--gigabytes=0.3", "--shards=3", "--tp=2", f"--output_dir={tmp_path}"]
    subprocess.run([sys.executable, "-m", "experiments.loading_memory", *arguments], cwd=CHECKOUT, check=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["array_bytes"] >= summary["bytes_read"] > 2.5e8  # norms lie on both devices, and are read once
    assert summary["extra_bytes"] < summary["largest_parameter_bytes"]
