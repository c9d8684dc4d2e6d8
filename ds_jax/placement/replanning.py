"""Replanning: the placement follows the workload (DistServe, section 4.3: in the paper only).

When the shift test tells that rate or lengths have changed, the phases are placed anew for the requests since then. A
fleet changes only where it must and where that pays. Short runs flatter what is slow to fill, such as decoding with
many slots, so phases are weighed by what they do in the long run, and runs are as long as it takes to see it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ds_jax.architecture import Architecture
from ds_jax.placement.changeover import Fleet
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Group, Shape, Unit, shapes
from ds_jax.placement.search import Candidate, Infeasible, PlacementSearch
from ds_jax.placement.trial import BOTH, Requests, Trials
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role
from ds_jax.workload import Lengths, submissions

HEADROOM = 1.25
"""A fleet that serves so many times the present rate has no need to change."""
GAIN = 1.15
"""Another fleet must serve so many times as much to be worth a change."""
WHOLE = 4
"""Fleets that are simulated whole: the best by what their phases can do."""
LONGEST = 3000
"""Most requests of such a simulation."""
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of the prompts, that stand for all of them; the last one is the longest that must be in time."""


class Replanner:
    """Plans the fleet of one cluster for what its requests look like. `plan.workload` is not looked at."""

    def __init__(self, plan: PlanConfig, arch: Architecture):
        self.plan, self.arch = plan, arch
        self.hardware = Hardware(plan, arch)
        self.gpus = plan.cluster.nodes * plan.cluster.gpus_per_node

    def fleet(self, lengths: Sequence[Lengths], rate: float = 0.0, now: Fleet | None = None) -> Fleet:
        """The prefill and decode instances that together serve the most requests like these.

        Every pair of shapes and counts that the cluster has GPUs for is weighed by min(prefill, decode), each phase by
        a formula (`phase_rate`); the best few are simulated whole. Of equals the one with the fewest GPUs at work.

        Args:
            lengths: a sample of requests.
            rate: requests/s that there are now.
            now: the fleet that there is. It stays as long as it serves HEADROOM times the rate, or as no other serves
                GAIN times as much.

        Raises:
            Infeasible: no pair of shapes serves these requests inside the targets.
        """
        weighed = self._weighed(lengths)
        trials = Trials(self.plan, self.hardware, self._like(lengths, weighed[0][0] if weighed else rate))
        if now is not None and trials.run(Unit(now), "disaggregated", HEADROOM * rate).passed:
            return now
        with PlacementSearch(self.plan, self.arch, requests=trials.requests) as search:
            candidates = [Candidate(Unit(fleet), "disaggregated") for _, _, fleet in weighed[:WHOLE]]
            judged = search.judge(candidates, "whole fleets")
        served = [
            (one.goodput.per_gpu * one.candidate.unit.gpus if one.goodput is not None else 0.0, gpus, fleet)
            for one, (_, gpus, fleet) in zip(judged, weighed, strict=False)
        ]
        best = max(served, key=lambda one: one[:2], default=None)
        if best is None or best[0] <= 0:
            mean = np.mean(np.array(lengths), axis=0)
            raise Infeasible(
                f"no instances serve requests of {mean[0]:.0f} / {mean[1]:.0f} tokens inside the targets on "
                f"{self.gpus} GPUs"
            )
        if now is not None and trials.run(Unit(now), "disaggregated", best[0] / GAIN).passed:
            return now
        return best[2]

    def served(self, fleet: Fleet, lengths: Sequence[Lengths]) -> float:
        """Requests/s like these that the fleet serves inside the targets."""
        most = min(group.instances * self.phase_rate(group.role, group.shape, lengths) for group in fleet)
        with PlacementSearch(self.plan, self.arch, requests=self._like(lengths, most)) as search:
            (judged,) = search.judge([Candidate(Unit(fleet), "disaggregated")], "a fleet")
        return judged.goodput.per_gpu * Unit(fleet).gpus if judged.goodput is not None else 0.0

    def phase_rate(self, role: Role, shape: Shape, lengths: Sequence[Lengths]) -> float:
        """Requests/s of one instance in the long run, by a formula; 0 if it cannot work.

        Prefill: prompts that come at random and take D each wait in M/D/1 (DistServe, equation 1), so that 90 % of them
        wait less than about ln(10) times the mean wait, rho D / (2 (1 - rho)); prompts shorter than L_m share steps.
        Decode: the largest batch that memory and the target allow, all the time.
        """
        group = Group(role, shape)
        longest = max(one.prompt + one.output for one in lengths) - 1
        if not self.hardware.measured(group) or self.hardware.kv_tokens(group) < longest:
            return 0.0
        step_s = self.hardware.step_time(group).step_s
        prompts, outputs = np.array(lengths).T
        if role is Role.PREFILL:
            together = max(1, int(self.hardware.l_m(group) / prompts.mean()))
            times = [step_s([(0, int(prompt))] * together, 0, 0) for prompt in np.quantile(prompts, QUANTILES)]
            late_s, mean_s = times[-1], float(np.mean(times))
            slack_s = self.plan.slo.ttft_s - late_s
            load = slack_s / (slack_s + 0.5 * math.log(10) * mean_s) if slack_s > 0 else 0.0
            return load * together * shape.pp / mean_s
        # A sequence that is looked at while it decodes is a long one, by the inspection paradox, and half through.
        context = float((outputs * (prompts + outputs / 2)).sum() / outputs.sum())
        most = min(self.plan.slots, int(self.hardware.kv_tokens(group) / context / shape.pp))
        batch = bisect_right(range(1, most + 1), self.plan.slo.tpot_s, key=lambda b: step_s((), b, round(b * context)))
        if not batch:
            return 0.0
        return batch * shape.pp / step_s((), batch, round(batch * context)) / max(float(outputs.mean()) - 1, 1.0)

    def splits(self, fleet: Fleet) -> list[Fleet]:
        """All fleets of these two shapes that leave no GPU idle that could work."""
        prefill, decode = fleet
        found = []
        for n in range(1, (self.gpus - decode.shape.gpus) // prefill.shape.gpus + 1):
            m = (self.gpus - n * prefill.shape.gpus) // decode.shape.gpus
            found.append((replace(prefill, instances=n), replace(decode, instances=m)))
        return found

    def _weighed(self, lengths: Sequence[Lengths]) -> list[tuple[float, int, Fleet]]:
        """(requests/s by the phases alone, - GPUs at work, fleet), the best first."""
        possible = shapes(self.arch, self.plan, self._most_gpus())
        rates = {role: {shape: self.phase_rate(role, shape, lengths) for shape in possible} for role in BOTH}
        weighed: list[tuple[float, int, Fleet]] = []
        for prefill, prefill_rate in rates[Role.PREFILL].items():
            for decode, decode_rate in rates[Role.DECODE].items():
                for n in range(1, (self.gpus - decode.gpus) // prefill.gpus + 1):
                    m = (self.gpus - n * prefill.gpus) // decode.gpus
                    fleet = (Group(Role.PREFILL, prefill, n), Group(Role.DECODE, decode, m))
                    rate = round(min(n * prefill_rate, m * decode_rate), 3)
                    if rate > 0:
                        weighed.append((rate, -sum(group.gpus for group in fleet), fleet))
        return sorted(weighed, key=lambda one: one[:2], reverse=True)

    def _most_gpus(self) -> int:
        """Of one instance: both phases need one, and a cluster with a single one of each is hard to balance."""
        return min(self.plan.cluster.gpus_per_node, max(1, self.gpus // 2))

    def _like(self, lengths: Sequence[Lengths], rate: float) -> Requests:
        """Requests with lengths drawn from these, arriving at random: as many as it takes, at about this rate, for the
        fleet to fill and for its queues to show."""
        span_s = 30.0 + 4 * self.plan.slo.tpot_s * float(np.mean([one.output for one in lengths]))
        count = max(self.plan.search.requests or 1000, min(round(rate * span_s), LONGEST))
        random = np.random.default_rng(self.plan.search.seed)
        drawn = [lengths[index] for index in random.integers(0, len(lengths), count)]
        gaps = np.cumsum(random.exponential(1e9, count)).astype(int)
        return Requests(self.plan, submissions([int(gap) for gap in gaps], drawn))
