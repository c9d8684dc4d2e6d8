"""The sizes that an instance's programs are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from ds_jax.config import DecodeConfig, GroupConfig, MixedConfig, PrefillConfig
from ds_jax.protocol import pages_for

SMALLEST_STEP_TOKENS = 32
SMALLEST_COPY_PAGES = 4
FEWEST_BUCKETED_SLOTS = 17
"""With fewer slots a step of all costs about as much as one of one (on a CPU up to twice), and a program less is
compiled."""
MOST_HOST_PAGES = 64
"""Pages that one program moves to or from host memory; further ones take further runs of it."""


@dataclass(frozen=True)
class Shapes:
    """Everything about one instance that a compiled program fixes."""

    pages: int
    """Pages of the pool."""
    page_size: int
    max_model_len: int
    """Most tokens of one sequence."""
    slots: int = 0
    """Sequences of a decode step; 0: no decode program."""
    slot_buckets: tuple[int, ...] = ()
    """Sequences of a decode step, ascending: the first slots, as many as reach the last one in use."""
    rows: int = 0
    """Prompts of a prefill step."""
    token_buckets: tuple[int, ...] = ()
    """Prompt tokens of a prefill step, ascending; empty: no prefill program."""
    mixes: bool = False
    """Whether steps with prompt chunks and decodes have programs; else such a step runs one after the other."""
    host_pages: int = 0
    """Pages in host memory; 0: no programs to move them."""

    @property
    def table_pages(self) -> int:
        """Width of a page table: pages of the longest sequence."""
        return pages_for(self.max_model_len, self.page_size)

    @property
    def page_buckets(self) -> tuple[int, ...]:
        """Pages of a copy."""
        return powers(SMALLEST_COPY_PAGES, self.table_pages, 2)

    @property
    def host_buckets(self) -> tuple[int, ...]:
        """Pages that go to or from host memory at a time."""
        return powers(SMALLEST_COPY_PAGES, min(self.table_pages, MOST_HOST_PAGES), 4) if self.host_pages else ()

    @property
    def edit_buckets(self) -> tuple[int, ...]:
        """Slots that the host changes between two decode steps."""
        return powers(2, self.slots, 4) if self.slots else ()


def powers(first: int, last: int, base: int) -> tuple[int, ...]:
    """first, first * base, … below `last`, then `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= base
    return (*sizes, last)


def bucket_for(size: int, buckets: tuple[int, ...], what: str) -> int:
    """The smallest bucket that holds `size`.

    Raises:
        ValueError: none does.
    """
    for bucket in buckets:
        if size <= bucket:
            return bucket
    raise ValueError(f"{what} = {size} must be at most {buckets[-1] if buckets else 0}")


def token_buckets(group: GroupConfig, max_model_len: int) -> tuple[int, ...]:
    """Step sizes to compile for a group: its own, or powers of two that reach what a step may hold."""
    if not isinstance(group, PrefillConfig):
        return ()
    if group.token_buckets:
        buckets = sorted(set(group.token_buckets))
        return tuple(size for size in buckets if size <= bucket_or_last(group.max_step_tokens, buckets))
    longest = SMALLEST_STEP_TOKENS
    while longest < max_model_len:
        longest *= 2
    return powers(SMALLEST_STEP_TOKENS, min(group.max_step_tokens, longest), 2)


def slot_buckets(group: GroupConfig) -> tuple[int, ...]:
    """Batches to compile for a group: its own and that of all slots, or 1, 16, …, where there are enough slots."""
    if not isinstance(group, DecodeConfig | MixedConfig):
        return ()
    if group.slot_buckets:
        return (*sorted({size for size in group.slot_buckets if size < group.slots}), group.slots)
    return powers(1, group.slots, 16) if group.slots >= FEWEST_BUCKETED_SLOTS else (group.slots,)


def bucket_or_last(size: int, buckets: list[int]) -> int:
    """The smallest bucket that holds `size`, or the largest there is."""
    return next((bucket for bucket in buckets if size <= bucket), buckets[-1])


def step_tokens(group: GroupConfig, buckets: tuple[int, ...]) -> int:
    """Most prompt tokens in one step of a group with these buckets."""
    return min(group.max_step_tokens, buckets[-1]) if isinstance(group, PrefillConfig) else 0
