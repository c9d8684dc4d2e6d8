"""Goodputs that were found before, kept in a folder: a search that is run again, or goes on, does not simulate them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ds_jax.placement.goodput import Goodput
from ds_jax.placement.hardware import Hardware
from ds_jax.plan import PlanConfig

if TYPE_CHECKING:
    from ds_jax.placement.search import Candidate

FORMAT = 1
"""Counted up when simulator or schedulers change what a candidate comes to."""


class GoodputCache:
    """One JSON file per candidate, named by a digest of all that its goodput depends on."""

    def __init__(self, plan: PlanConfig, hardware: Hardware):
        self.folder = Path(plan.search.cache).expanduser() if plan.search.cache else None
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        keys = ("model", "dtype", "slots", "max_step_tokens", "slo", "workload", "search")
        facts = {key: value for key, value in dataclasses.asdict(plan).items() if key in keys}
        for irrelevant in ("prune", "workers", "cache", "max_pp", "max_tp"):
            del facts["search"][irrelevant]
        del facts["workload"]["rate"]
        self._facts = json.dumps([FORMAT, facts, hardware.fingerprint()], sort_keys=True)

    def get(self, candidate: Candidate) -> Goodput | None:
        """What is known of the candidate."""
        path = self._path(candidate)
        if path is None or not path.is_file():
            return None
        try:
            return Goodput(float(json.loads(path.read_text(encoding="utf-8"))["per_gpu"]), 0)
        except (ValueError, KeyError, TypeError):
            return None  # a file that was cut short: it is found again, and written anew

    def put(self, candidate: Candidate, goodput: Goodput) -> None:
        """Keep a goodput that was found to the end."""
        path = self._path(candidate)
        if path is None or goodput.below or not goodput.trials:
            return
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"candidate": str(candidate), "per_gpu": goodput.per_gpu}) + "\n", encoding="utf-8")
        part.replace(path)

    def _path(self, candidate: Candidate) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(f"{self._facts}{candidate}".encode()).hexdigest()[:32]
        return self.folder / f"{digest}.json"
