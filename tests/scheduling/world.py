"""A world driven by hand: each test says what happens, and looks at what the scheduler commands.

Everything goes through `Contract`, so that a scenario also fails when a command breaks the protocol.
"""

from __future__ import annotations

from typing import Any

from ds_jax.protocol import (
    Arrived,
    Command,
    Copy,
    CopyDone,
    Event,
    Instance,
    InstanceUp,
    Reject,
    Request,
    Role,
    Run,
    Step,
    StepDone,
    Stopped,
)
from ds_jax.simulation import Contract


def prefill_instance(id: int = 0, **changes: Any) -> Instance:
    """Two tokens a page; limits wide unless changed."""
    limits = {"max_step_tokens": 100, "max_step_sequences": 100, "saturation_tokens": 100} | changes
    return Instance(**({"id": id, "role": Role.PREFILL, "epoch": 0, "pages": 100, "page_size": 2} | limits))


def decode_instance(id: int = 1, **changes: Any) -> Instance:
    return Instance(**({"id": id, "role": Role.DECODE, "epoch": 0, "pages": 100, "page_size": 2, "slots": 8} | changes))


class World:
    def __init__(self, scheduler: Any, *instances: Instance):
        self.scheduler = scheduler
        self.contract = Contract()
        self.now_ns = 0
        self.news: list[Command] = []
        """Commands since they were last taken."""
        for instance in instances:
            self.tell(InstanceUp(instance))

    def tell(self, event: Event) -> list[Command]:
        commands = self.scheduler.handle(event, self.now_ns)
        self.contract.hear(event, commands, self.now_ns)
        for ledger in self.scheduler.ledgers.values():
            ledger.check()
        self.news += commands
        return commands

    def arrive(self, id: int, prompt: int, max_tokens: int = 100, **rest: Any) -> list[Command]:
        return self.tell(Arrived(Request(id, prompt, max_tokens, **rest)))

    def stop(self, id: int, reason: str = "stop") -> list[Command]:
        return self.tell(Stopped(id, reason))

    def steps(self, instance: int | None = None) -> list[Step]:
        """Steps in flight, in the order of their commands."""
        flights = [flight.step for flight in self.contract.steps.values()]
        return [step for step in flights if instance in (None, step.instance)]

    def copies(self) -> list[Copy]:
        """Copies in flight."""
        return [flight.copy for flight in self.contract.copies.values()]

    def finish(self, step: Step, without: tuple[int, ...] = ()) -> list[Command]:
        """The step is done and every token kept that it samples, but for sequences that are over and `without`."""
        sampled = [work.sequence for work in step.prefills if work.samples] + [work.sequence for work in step.decodes]
        kept = [id for id in sampled if id not in without and not self.contract.sequences[id].over]
        return self.tell(StepDone(step.id, dict.fromkeys(kept, 1)))

    def land(self, copy: Copy, ok: bool = True) -> list[Command]:
        return self.tell(CopyDone(copy.id, ok))

    def prefill_all(self) -> None:
        """Finish all prefill steps, and those that they make room for."""
        while steps := [step for step in self.steps() if step.prefills]:
            self.finish(steps[0])

    def decoding(self, *prompts: int, max_tokens: int = 100) -> None:
        """Bring sequences 0, 1, ... of these prompts to the decode instance, each into its slot."""
        for id, prompt in enumerate(prompts):
            self.arrive(id, prompt, max_tokens)
            self.prefill_all()
            self.land(self.copies()[0])

    def take_news(self) -> list[Command]:
        news, self.news = self.news, []
        return news


def prefilled(step: Step) -> list[tuple[int, int, int]]:
    """(sequence, start, length) of a step's prefills."""
    return [(work.sequence, work.start, work.length) for work in step.prefills]


def decoded(step: Step) -> list[int]:
    return [work.sequence for work in step.decodes]


def runs(commands: list[Command]) -> list[Step]:
    return [command.step for command in commands if isinstance(command, Run)]


def copies(commands: list[Command]) -> list[Copy]:
    return [command for command in commands if isinstance(command, Copy)]


def rejects(commands: list[Command]) -> list[Reject]:
    return [command for command in commands if isinstance(command, Reject)]
