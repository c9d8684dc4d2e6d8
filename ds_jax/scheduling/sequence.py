"""A sequence as every scheduler tracks it, and its life.

::

    WAITING ──▶ PREFILLING ──▶ READY ──▶ COPYING ──▶ LANDED ──▶ RUNNING ──▶ ENDED
       ▲             │            ▲          │          │           │
       │             │            └── copy failed       │           │
       │             │ instance lost                    │ preempted │
       │             │                                  ▼           ▼
       └─────────────┴────────────────────────────────── LEAVING ◀──┘
                          replays when its last steps in flight are done
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from ds_jax.protocol import Request

if TYPE_CHECKING:
    from ds_jax.scheduling.ledger import Lease


class Phase(enum.Enum):
    WAITING = enum.auto()
    """In a prefill queue, or waiting for a prefill instance to exist."""
    FOLLOWING = enum.auto()
    """Waits to sample from the prefill of another sequence of the same request, its leader."""
    PREFILLING = enum.auto()
    """Has pages for its whole prompt; chunks of it are in flight, or more are to come."""
    READY = enum.auto()
    """Prefilled, first token sampled; its pages wait to be pulled."""
    COPYING = enum.auto()
    """A copy is in flight; both ends are reserved."""
    LANDED = enum.auto()
    """Its pages are on the decode instance; it waits for a slot."""
    RUNNING = enum.auto()
    """Has a slot in a running batch."""
    LEAVING = enum.auto()
    """Preempted: gave its pages up; replays as soon as its steps in flight are done."""
    ENDED = enum.auto()
    """Finished, stopped or rejected; only steps and copies in flight may still know it."""


class Sequence:
    """Counts and whereabouts of one living sequence."""

    __slots__ = (
        "charged",
        "copy",
        "emitted",
        "family",
        "forks",
        "home",
        "id",
        "lane",
        "lease",
        "order",
        "phase",
        "planned",
        "prefilled",
        "request",
        "slot",
        "steps",
    )

    def __init__(self, request: Request, order: int, id: int | None = None):
        self.request = request
        self.id = request.id if id is None else id
        self.order = order
        """Place in the order of arrival: lower is older."""
        self.phase = Phase.WAITING
        self.emitted = 0
        """Output tokens confirmed."""
        self.planned = 0
        """Output tokens that steps in flight will sample."""
        self.prefilled = 0
        """Tokens whose prefill is planned, in the present replay."""
        self.charged = 0
        """Tokens that its prefill counts in the load of the instance where it waits."""
        self.steps = 0
        """Steps in flight that name it."""
        self.home: Any = None
        """The instance state whose queue or batch it is in."""
        self.lease: Lease | None = None
        self.lane = 0
        self.slot = 0
        self.copy: int | None = None
        """Copy in flight."""
        self.forks: list[Sequence] = []
        """Sequences that follow this one: n > 1 outputs share the prefill of their prompt."""
        self.family: list[Sequence] = [self]
        """All sequences of the request."""

    @property
    def tokens(self) -> int:
        """Tokens whose values are known: prompt and confirmed output."""
        return self.request.prompt_tokens + self.emitted

    @property
    def most_tokens(self) -> int:
        """Most tokens that will ever need KV: the last one sampled is never fed back."""
        return self.request.prompt_tokens + self.request.max_tokens - 1

    @property
    def has_more(self) -> bool:
        """Whether another token may be planned on top of those in flight."""
        return self.emitted + self.planned < self.request.max_tokens
