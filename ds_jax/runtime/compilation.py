"""Ahead-of-time compilation, the cache of compiled programs, and a count of compilations that come too late."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

log = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX records this once per program that it compiles or fetches from the persistent cache."""

_expecting = threading.local()


def keep_compiled_programs(folder: str) -> None:
    """Keep compiled programs in `folder` between runs; "" or a folder that JAX was already told of changes nothing."""
    if not folder or jax.config.jax_compilation_cache_dir:
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("no cache of compiled programs: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # JAX settles at the first compilation of a process whether there is a cache.
    compilation_cache.reset_cache()


def compile_ahead(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    donate: tuple[int, ...] = (),
    out_shardings: Any = None,
    compiler_options: Mapping[str, bool | str] | None = None,
) -> Any:
    """Compile `function` for arguments of exactly these shapes, types and shardings.

    Args:
        function: what to compile.
        arguments: trees of `jax.ShapeDtypeStruct` with shardings.
        donate: positions of arguments whose memory the results take over.
        out_shardings: of the results; None leaves them to the compiler.
        compiler_options: XLA's, for this program.

    Returns:
        The compiled program: call it with arguments as described; it never compiles again.
    """
    with compiling():
        lowered = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings).lower(*arguments)
        return lowered.compile(compiler_options=dict(compiler_options or {}))


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Compilations on this thread are meant: no counter counts them."""
    before = getattr(_expecting, "now", False)
    _expecting.now = True
    try:
        yield
    finally:
        _expecting.now = before


class CompilationCounter:
    """Counts the programs that this process compiles between `start` and `stop`, unless inside `compiling`."""

    def __init__(self) -> None:
        self.count = 0
        self._running = False

    def start(self) -> None:
        if not self._running:
            self._running = True
            jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def stop(self) -> None:
        if self._running:
            self._running = False
            jax.monitoring.unregister_event_duration_listener(self._on_duration)

    def _on_duration(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event != _COMPILED or getattr(_expecting, "now", False):
            return
        self.count += 1
        log.warning(
            "COMPILATION WHILE SERVING: %s took %.0f ms; everything waited for it (%d since start-up)",
            details.get("fun_name", "a program"),
            duration_secs * 1e3,
            self.count,
        )
