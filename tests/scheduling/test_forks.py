"""n > 1: sequences of one request share the prefill and the full pages of their prompt."""

from __future__ import annotations

import pytest

from ds_jax.protocol import (
    Arrived,
    Command,
    Copy,
    CopyDone,
    Instance,
    InstanceLost,
    InstanceUp,
    Reject,
    Request,
    Role,
    Run,
    StepDone,
    Stopped,
)
from ds_jax.scheduling.disaggregated import Disaggregated
from ds_jax.scheduling.ledger import PageLedger

PAGE = 4


class World:
    """One prefill and one decode instance; answers whatever the scheduler asks for."""

    def __init__(self, pages: int = 32):
        self.scheduler = Disaggregated()
        self.pages = pages
        self.open: list[Command] = []
        self.copies: list[Copy] = []
        self.emitted: dict[int, int] = {}
        self.over: set[int] = set()
        self.rejected: dict[int, str] = {}
        self.tell(InstanceUp(Instance(0, Role.PREFILL, 0, pages, PAGE, 1, 0, 32, 4, 16)))
        self.tell(InstanceUp(Instance(1, Role.DECODE, 0, pages, PAGE, 1, 8)))

    def tell(self, event) -> None:
        for command in self.scheduler.handle(event, 0):
            if isinstance(command, Reject):
                self.rejected[command.sequence] = command.why
            else:
                self.open.append(command)
        for ledger in self.scheduler.ledgers.values():
            ledger.check()

    def ledger(self, instance: int) -> PageLedger:
        return self.scheduler.ledgers[instance]

    def answer(self, ok: bool = True) -> Command:
        """Answer the oldest command."""
        command = self.open.pop(0)
        if isinstance(command, Copy):
            self.copies.append(command)
            self.tell(CopyDone(command.id, ok))
        elif isinstance(command, Run):
            step = command.step
            kept = [work[0] for work in step.prefills if work.samples] + [work[0] for work in step.decodes]
            emitted = {id: 1 for id in kept if id not in self.over}
            for id in emitted:
                self.emitted[id] = self.emitted.get(id, 0) + 1
            self.tell(StepDone(step.id, emitted))
        return command

    def finish(self) -> None:
        while self.open:
            self.answer()
        assert not self.scheduler.sequences
        assert all(ledger.used == 0 for ledger in self.scheduler.ledgers.values())


def test_four_outputs_use_the_prompts_pages_once() -> None:
    world = World(pages=64)
    world.tell(Arrived(Request(10, prompt_tokens=14, max_tokens=30, n=4)))
    [run] = world.open
    assert isinstance(run, Run)
    assert [(work.sequence, work.start, work.length) for work in run.step.prefills] == [
        (10, 0, 14),
        (11, 14, 0),
        (12, 14, 0),
        (13, 14, 0),
    ]
    assert world.ledger(0).used == 4, "14 tokens lie in 4 pages, for all four"
    while len(world.copies) < 4:
        world.answer()
    first, *others = world.copies
    assert len(first.pages) == 4
    assert not first.shared
    for other in others:
        assert other.shared == tuple(there for _, there in first.pages[:3]), "three pages are full: shared"
        assert len(other.pages) == 1, "the last page will be written to: each has its own"
    held = {page for copy in world.copies for page in (*copy.shared, *(there for _, there in copy.pages))}
    assert len(held) == 3 + 4
    assert all(world.ledger(1).references(page) == 4 for page in others[0].shared)
    world.finish()
    assert world.emitted == dict.fromkeys(range(10, 14), 30)


def test_a_prompt_of_full_pages_is_copied_once() -> None:
    world = World()
    world.tell(Arrived(Request(0, prompt_tokens=8, max_tokens=3, n=2)))
    while len(world.copies) < 2:
        world.answer()
    assert [len(copy.pages) for copy in world.copies] == [2, 0]
    world.finish()


def test_shared_pages_stay_until_the_last_of_the_family_has_gone() -> None:
    world = World()
    world.tell(Arrived(Request(0, prompt_tokens=8, max_tokens=6, n=2)))
    while len(world.copies) < 2:
        world.answer()
    shared = world.copies[1].shared
    world.over.add(0)
    world.tell(Stopped(0, "stop"))
    while any(isinstance(one, Run) and any(work[0] == 0 for work in one.step.decodes) for one in world.open):
        world.answer()
    assert all(world.ledger(1).references(page) == 1 for page in shared)
    world.finish()
    assert world.emitted[1] == 6


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_any_of_the_family_may_stop_before_the_prefill(stopped: int) -> None:
    world = World()
    world.tell(Arrived(Request(90, prompt_tokens=30, max_tokens=2)))
    world.tell(Arrived(Request(91, prompt_tokens=30, max_tokens=2)))
    world.tell(Arrived(Request(0, prompt_tokens=6, max_tokens=3, n=3)))
    world.over.add(stopped)
    world.tell(Stopped(stopped, "abort"))
    world.finish()
    assert {id: count for id, count in world.emitted.items() if id < 3} == {id: 3 for id in range(3) if id != stopped}


def test_a_lost_decode_instance_replays_each_of_the_family() -> None:
    world = World()
    world.tell(Arrived(Request(0, prompt_tokens=6, max_tokens=5, n=3)))
    while len(world.copies) < 3:
        world.answer()
    world.open.clear()
    world.tell(InstanceLost(1, 0))
    world.tell(InstanceUp(Instance(1, Role.DECODE, 1, 32, PAGE, 1, 8)))
    world.finish()
    assert all(world.emitted[id] >= 5 for id in range(3))


def test_a_failed_copy_is_tried_again_and_nothing_is_shared_with_it() -> None:
    world = World()
    world.tell(Arrived(Request(0, prompt_tokens=9, max_tokens=3, n=2)))
    world.answer()
    world.answer(ok=False)
    assert not world.copies[0].shared
    world.finish()
    landed = world.copies[1:]
    assert not landed[0].shared
    assert landed[1].shared == tuple(there for _, there in landed[0].pages[:2])


def test_more_outputs_than_a_step_has_rows_are_refused() -> None:
    world = World()
    world.tell(Arrived(Request(0, prompt_tokens=4, max_tokens=2, n=5)))
    assert set(world.rejected) == set(range(5))
    assert "n = 5 must be at most 4" in world.rejected[0]


def test_a_small_pool_preempts_members_of_a_family_and_all_end() -> None:
    world = World(pages=9)
    world.tell(Arrived(Request(0, prompt_tokens=10, max_tokens=20, n=4)))
    world.finish()
    assert all(world.emitted[id] == 20 for id in range(4))
