"""Compilations that come too late are counted, and said loudly."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds_jax.runtime.compilation import CompilationCounter, compile_ahead


def new_program(number: int) -> None:
    jax.jit(lambda x: x * number + 1)(np.ones(number + 100, np.float32))


def test_a_compilation_while_serving_is_counted_and_logged(caplog: pytest.LogCaptureFixture):
    counter = CompilationCounter()
    new_program(1)
    counter.start()
    try:
        with caplog.at_level(logging.WARNING):
            new_program(2)
        assert counter.count == 1
        assert "COMPILATION WHILE SERVING" in caplog.text
        new_program(2 + 1)
        assert counter.count == 2
    finally:
        counter.stop()
    new_program(4)
    assert counter.count == 2


def test_programs_compiled_ahead_are_not_counted_and_never_compile_again():
    counter = CompilationCounter()
    counter.start()
    try:
        x = jax.ShapeDtypeStruct((77,), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[1]))
        program = compile_ahead(lambda x: x + 1, (x,), donate=(0,))
        result = program(program(np.arange(77, dtype=np.int32)))
        assert np.asarray(result)[0] == 2
        assert counter.count == 0
    finally:
        counter.stop()


def test_a_program_refuses_what_it_was_not_compiled_for():
    x = jax.ShapeDtypeStruct((7,), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    program = compile_ahead(lambda x: x + 1, (x,))
    with pytest.raises(TypeError):
        program(np.arange(8, dtype=np.int32))
