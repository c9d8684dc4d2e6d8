"""A sequence as every scheduler tracks it, and its life.

::

    WAITING ──▶ PREFILLING ──▶ READY ──▶ COPYING ──▶ LANDED ──▶ RUNNING ──▶ ENDED
       ▲             │           │ ▲         │          ▲          │
       │             │           │ └─ copy ──┘          │          │
       │             │           │   failed             │          │ preempted
       │   instance  │           └── stays where it is ─┘          ▼
       └── lost ─────┴────────────────────────────────────────── LEAVING
            replays when its last steps in flight are done; or swapped: COPYING ──▶ SWAPPED ──▶ COPYING ──▶ LANDED
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from ds_jax.protocol import Request

if TYPE_CHECKING:
    from ds_jax.scheduling.batch import RunningBatch
    from ds_jax.scheduling.ledger import Lease


class Phase(enum.Enum):
    WAITING = enum.auto()
    """In the queue of an instance, or of the policy until an instance takes it."""
    FOLLOWING = enum.auto()
    """Waits to sample from the prefill of another sequence of the same request, its leader."""
    PREFILLING = enum.auto()
    """Has pages for its whole prompt; chunks of it are in flight, or more are to come."""
    READY = enum.auto()
    """Prefilled, first token sampled; its pages wait to be pulled."""
    COPYING = enum.auto()
    """A copy is in flight; both ends are reserved."""
    LANDED = enum.auto()
    """Its pages are on the instance that will decode it; it waits for a slot."""
    RUNNING = enum.auto()
    """Has a slot in a running batch."""
    LEAVING = enum.auto()
    """Preempted: gave its pages up; replays, or is swapped out, as soon as its steps in flight are done."""
    SWAPPED = enum.auto()
    """Preempted, its pages are in host memory: it waits for pages on the device to come back to."""
    ENDED = enum.auto()
    """Finished, stopped or rejected; only steps and copies in flight may still know it."""


class Sequence:
    """Counts and whereabouts of one living sequence."""

    __slots__ = (
        "arrived_ns",
        "batch",
        "charged",
        "copy",
        "counted",
        "ends_at",
        "family",
        "first_ns",
        "forks",
        "grows_at",
        "home",
        "id",
        "joined",
        "lease",
        "most_tokens",
        "order",
        "phase",
        "pinned",
        "prefilled",
        "request",
        "sampling",
        "slot",
        "steady",
        "steps",
        "swap",
        "ticks",
    )

    def __init__(self, request: Request, order: int, id: int | None = None):
        self.request = request
        self.id = request.id if id is None else id
        self.order = order
        """Place in the order of arrival: lower is older."""
        self.most_tokens = request.prompt_tokens + request.max_tokens - 1
        """Most tokens that will ever need KV: the last one sampled is never fed back."""
        self.arrived_ns = 0
        self.first_ns: int | None = None
        """When its first token was heard of."""
        self.phase = Phase.WAITING
        self.home: Any = None
        """The Worker where it waits, or where its pages are."""
        self.lease: Lease | None = None
        self.copy: int | None = None
        """Copy in flight."""
        self.swap: tuple[Lease, Lease] | None = None
        """While LEAVING for host memory: the pages on the device, given up but pinned, and those on the host."""
        self.forks: list[Sequence] = []
        """Sequences that follow this one: n > 1 outputs share the prefill of their prompt."""
        self.family: list[Sequence] = [self]
        """All sequences of the request."""

        self.prefilled = 0
        """Tokens whose prefill is planned, in the present replay."""
        self.charged = 0
        """Tokens that its prefill counts in the load of the instance where it waits."""
        self.steps = 0
        """Steps in flight that prefill it."""
        self.sampling = 0
        """Output tokens that those will sample: 0 or 1."""

        self.counted = 0
        """Output tokens confirmed; while it is steady, before it became so."""
        self.batch: RunningBatch | None = None
        """The running batch that it is in, or that has steps in flight of it."""
        self.slot = 0
        self.steady = False
        """It is in every decode step of its batch from number `joined` on, as `RunningBatch` explains."""
        self.joined = 0
        self.grows_at = self.ends_at = -1
        """Numbers of the decode step that needs another page, and of the first that it is not in any more."""
        self.ticks: list[int] = []
        """While it is not steady: numbers of the decode steps in flight that it is in."""
        self.pinned: Lease | None = None
        """While there are such: the pages that they use."""

    @property
    def emitted(self) -> int:
        """Output tokens confirmed."""
        if self.steady and self.batch is not None and self.batch.done > self.joined:
            return self.counted + self.batch.done - self.joined
        return self.counted

    @property
    def planned(self) -> int:
        """Output tokens that steps in flight will sample."""
        if self.steady and self.batch is not None:
            return self.batch.planned - max(self.batch.done, self.joined)
        return self.sampling + len(self.ticks)

    @property
    def tokens(self) -> int:
        """Tokens whose values are known: prompt and confirmed output."""
        return self.request.prompt_tokens + (self.emitted if self.steady else self.counted)

    @property
    def has_more(self) -> bool:
        """Whether another token may be planned on top of those in flight."""
        return self.emitted + self.planned < self.request.max_tokens

    @property
    def in_flight(self) -> bool:
        """Whether steps in flight name it."""
        return bool(self.steps or self.ticks or (self.steady and self.planned))
