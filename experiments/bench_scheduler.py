"""Measure what schedulers cost: microseconds per event and per planned step, by number of running requests.

python -m experiments.bench_scheduler --output_dir=out/scheduler

Every policy gets the instances that it needs and so many requests that all of them decode at once; whatever it commands
succeeds after a virtual step time. Only the processor time inside the scheduler is measured: first while the requests
come in, all at once, and their prompts run (`filling`), then while all decode, and now and then one ends and another
comes (`steady`). Policies that reckon with slack are also measured with targets on every request and a forecast of step
times: without them they have nothing to reckon with. `undisturbed` is the fastest stretch of 40 steps. OUTPUT_DIR gets
summary.json and a figure.
"""

from __future__ import annotations

import itertools

from absl import flags
from tqdm import tqdm

from ds_jax.config import FORETELLING
from ds_jax.flags import run
from ds_jax.scheduling import POLICIES
from experiments.output import Output, axes, table
from experiments.scheduler_drive import PROMPT_TOKENS, measure

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_RUNNING = flags.DEFINE_multi_integer("running", [16, 64, 256, 1024, 4096], "Numbers of running requests.", 1)
_POLICIES = flags.DEFINE_multi_string("policies", sorted(POLICIES), "Policies to measure.")
_TARGETS = flags.DEFINE_bool("targets", True, "Also with targets and forecasts, for the policies that use them.")
_STEPS = flags.DEFINE_integer("steps", 300, "Decode steps of all requests that are measured.", 1)

_STEADY = ("us_per_event", "us_per_step", "us_per_step_undisturbed", "us_per_token")


def main(argv: list[str]) -> None:
    """Measure every policy at every size, print and write the results."""
    output = Output(_OUTPUT_DIR.value)
    results = []
    cases = [(policy, targets) for policy in _POLICIES.value for targets in (False, True)
             if not targets or (_TARGETS.value and policy in FORETELLING)]  # fmt: skip
    for (policy, targets), requests in tqdm(list(itertools.product(cases, _RUNNING.value)), desc="schedulers"):
        results.append(measure(policy, requests, _STEPS.value, targets) | {"name": _name(policy, targets)})
    output.summary({"cases": results, "steps": _STEPS.value, "prompt_tokens": PROMPT_TOKENS})

    figure, (panel,) = axes()
    for name in (_name(*case) for case in cases):
        mine = [result for result in results if result["name"] == name]
        us = [one["steady"]["us_per_step_undisturbed"] for one in mine]
        panel.plot([one["running"] for one in mine], us, marker="o", label=name)
    panel.set(xscale="log", yscale="log", xlabel="running requests", ylabel="µs per planned step")
    panel.legend()
    output.figure("scheduler", figure)
    header = (
        "policy", "running", "µs/event", "µs/step", "undisturbed", "µs/token", "filling: µs/event", "µs/step",
    )  # fmt: skip
    print(
        table(
            header,
            [
                (
                    one["name"],
                    one["running"],
                    *(one["steady"][name] for name in _STEADY),
                    *(one["filling"][name] for name in ("us_per_event", "us_per_step")),
                )
                for one in results
            ],
        )
    )
    print(f"written to {output.folder}")


def _name(policy: str, targets: bool) -> str:
    return f"{policy}, targets" if targets else policy


if __name__ == "__main__":
    run(main)
