"""The MLPs of a mixture of experts, each over the tokens that were sent to it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from kernels.backends import Backend, choose
from kernels.expert_mlp import definition, xla

FORMS = {"xla": xla.apply, "definition": definition.apply}


# Compiled as part of its caller; the jit makes JAX look at it once, not once per layer.
@functools.partial(jax.jit, static_argnames=("activation", "backend"))
def apply(
    x: Float[Array, "T E"],
    up: Float[Array, "X 2 M E"],
    down: Float[Array, "X E M"],
    chosen: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    *,
    activation: Callable[[jax.Array], jax.Array],
    backend: Backend = "auto",
) -> Float[Array, "T E"]:
    """The sum over j of weights[t, j] down (act(gate x) * up x) of expert chosen[t, j], for each token t.

    Args:
        x: what the tokens are.
        up: of each expert, gate and up, as [out, in].
        down: of each expert, as [out, in].
        chosen: expert numbers; those outside 0 .. X - 1 live elsewhere and add nothing here.
        weights: of the chosen experts, float32.
        activation: of the gate.

    Returns:
        float32. Each expert's own output has been rounded to the type of x.
    """
    return choose("expert MLP", backend, FORMS)(x, up, down, chosen, weights, activation=activation)
