"""What trials told before, kept in a folder: a search that is run again, or goes on, does not simulate it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ds_jax.placement.goodput import Goodput, Known
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.trial import Requests
from ds_jax.plan import PlanConfig

if TYPE_CHECKING:
    from ds_jax.placement.race import Candidate

FORMAT = 2
"""Counted up when simulator or schedulers change what a candidate comes to."""


class GoodputCache:
    """One JSON file per candidate, named by a digest of all that its goodput depends on."""

    def __init__(self, plan: PlanConfig, hardware: Hardware, requests: Requests):
        self.folder = Path(plan.search.cache).expanduser() if plan.search.cache else None
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        judging = {name: getattr(plan.search, name) for name in ("rule", "attainment", "precision")}
        facts = {
            "model": plan.model,
            "dtype": plan.dtype,
            "slots": plan.slots,
            "max_step_tokens": plan.max_step_tokens,
            "slo": dataclasses.asdict(plan.slo),
            "gpus": [plan.cluster.gpu, plan.cluster.decode_gpu],
            "search": judging,
        }
        self._facts = json.dumps([FORMAT, facts, hardware.fingerprint(), requests.digest()], sort_keys=True)
        self._cluster = repr(plan.cluster)

    def get(self, candidate: Candidate) -> tuple[Known, Goodput | None]:
        """What is known of the candidate, and its goodput if it was found to the end."""
        path = self._path(candidate)
        if path is None or not path.is_file():
            return Known(), None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            known = Known(int(record["passes"]), int(record["fails"]))
            per_gpu = record["per_gpu"]
            return known, None if per_gpu is None else Goodput(float(per_gpu), 0, cached=True)
        except (ValueError, KeyError, TypeError):
            return Known(), None  # a file that was cut short: it is found again, and written anew

    def put(self, candidate: Candidate, known: Known, goodput: Goodput | None) -> None:
        """Keep what new trials have told."""
        path = self._path(candidate)
        if path is None or not known.trials or goodput is None:
            return
        whole = not goodput.below and goodput.exact
        record = {
            "candidate": str(candidate),
            "passes": known.passes,
            "fails": known.fails,
            "per_gpu": goodput.per_gpu if whole else None,
        }
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(record) + "\n", encoding="utf-8")
        part.replace(path)

    def _path(self, candidate: Candidate) -> Path | None:
        if self.folder is None:
            return None
        where = self._cluster if candidate.unit.kv_crosses_nodes else ""  # else it is the same on any cluster
        digest = hashlib.sha256(f"{self._facts}{candidate}{where}".encode()).hexdigest()[:32]
        return self.folder / f"{digest}.json"
