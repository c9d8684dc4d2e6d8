"""One living epoch of an instance, as schedulers see it: its pages, its prompts, its batches, its steps in flight."""

from __future__ import annotations

from itertools import chain

from ds_jax.protocol import Decodes, Instance, Medium, Place, Role
from ds_jax.scheduling.decode import Decoding
from ds_jax.scheduling.flight import STEPS_PER_LANE
from ds_jax.scheduling.ledger import Lease, PageLedger
from ds_jax.scheduling.prefill import Prompts
from ds_jax.scheduling.sequence import Phase, Sequence


class Worker:
    """What a policy plans for. Every worker has both sides; which of them it uses is the policy's to say."""

    def __init__(
        self,
        instance: Instance,
        pull_watermark: float = 1.0,
        steps_per_lane: int = STEPS_PER_LANE,
        swaps: bool = False,
    ):
        self.instance = instance
        self.ledger = PageLedger(instance.pages, instance.page_size)
        self.in_flight = [0] * instance.lanes
        self.steps_per_lane = steps_per_lane
        self.last_step = [-1] * instance.lanes
        """The step that was last launched on each lane."""
        self.prefills = instance.role is not Role.DECODE
        """Whether its role lets it run prompts."""
        self.decodes = instance.role is not Role.PREFILL
        """Whether its role lets it generate."""
        self.alive = True
        self.draining = False
        self.host = PageLedger(instance.host_pages, instance.page_size)
        """Pages in host memory, of sequences that are swapped out."""
        self._on_device = Place(instance.id, instance.epoch, Medium.DEVICE)
        self._on_host = Place(instance.id, instance.epoch, Medium.HOST)
        self.decoding = Decoding(self, pull_watermark)
        self.prompts = Prompts(instance, self.ledger, self.decoding.swapped)
        self.swaps = swaps
        self.preempted: list[Sequence] = []
        """Preempted since the policy last looked; they replay when nothing of them is in flight."""

    def place_of(self, lease: Lease) -> Place:
        """The end of a copy that these pages of the worker are."""
        return self._on_host if lease.ledger is self.host else self._on_device

    @property
    def load(self) -> int:
        """Tokens in its pages, promised to it, or waiting for their prefill: what dispatch compares."""
        return self.prompts.load + (self.ledger.used + self.decoding.inbox_pages) * self.instance.page_size

    def open(self, lane: int) -> bool:
        """Whether the lane may have another step in flight."""
        return self.in_flight[lane] < self.steps_per_lane

    def free_lane(self) -> int | None:
        """The lane with the fewest steps in flight, if it may have another; of several, the one whose turn it is."""
        if len(self.in_flight) == 1:
            return 0 if self.in_flight[0] < self.steps_per_lane else None
        lane = min(range(len(self.in_flight)), key=lambda lane: (self.in_flight[lane], self.last_step[lane]))
        return lane if self.in_flight[lane] < self.steps_per_lane else None

    def has_seats(self, count: int) -> bool:
        """Whether so many sequences more would find slots here, beside all that decode and are being prefilled."""
        instance = self.instance
        return self.decoding.count + self.prompts.running + count <= max(instance.slots * instance.lanes, count)

    def can_start_beside(self, sequence: Sequence) -> bool:
        """Whether it may begin a prompt although hand-overs wait to be pulled: there are pages for all of them, and
        none waits for a slot of those that land here: prompts that go on where they are would keep it waiting."""
        decoding = self.decoding
        if decoding.inbox and decoding.full:
            return False
        return self.prompts.can_start(sequence, spare=decoding.inbox_pages)

    def next_decodes(self, lane: int) -> Decodes:
        """All members of the lane's batch that can take another step. It must be launched next, if not empty."""
        return self.decoding.batches[lane].decodes(self.find_page)

    # --- preemption ---------------------------------------------------------------------------------------------------

    def find_page(self, sequence: Sequence) -> bool:
        """Free a page for the sequence by preempting the newest; the oldest is never preempted.

        False if it must sit this step out: pages are about to come free, or it was itself the newest.
        """
        while not self.ledger.free:
            if self.ledger.leaving:
                return False
            decoding = self.decoding
            members = [
                *chain(decoding.running, decoding.landed.values(), decoding.siblings.values()),
                *self.prompts.partial.values(),
            ]
            if len(members) == 1:
                return False  # the rest of the pool is in flight, and can be preempted once it has landed
            victim = max(members, key=lambda member: member.order)
            self.evict(victim, swap=self.swaps)
            self.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def evict(self, sequence: Sequence, swap: bool = False) -> None:
        """Take a sequence out of what it does here and drop its pages; steps in flight still pin them.

        Args:
            swap: keep what is in the pages for host memory, if that has room: they stay pinned until they are copied.
        """
        assert sequence.lease is not None
        tokens = sequence.tokens + sequence.planned - 1
        if swap and sequence.phase in (Phase.RUNNING, Phase.LANDED) and self.host.can_take(tokens):
            self.ledger.pin(sequence.lease)
            sequence.swap = sequence.lease, self.host.take(tokens)
        if sequence.phase is Phase.PREFILLING:
            self.prompts.abandon(sequence)
        else:
            self.decoding.remove(sequence)
        self.ledger.drop(sequence.lease)
        sequence.lease = None
        sequence.phase = Phase.LEAVING
