"""The form that the DistServe paper gives step times (OSDI'24, appendix A), from a model's shape.

With t tokens in a step's prompts, t2 the sum of their squares, h hidden size, m width of the MLP and b block size of
the attention kernel:

    prefill = C1 (4 t h^2 + 2 t h m) + C2 (3 h t2 / b) + C3
    decode  = C4 (4 h^2 + 2 h m) + C5 (3 h t)                    t: tokens of context of all sequences

C1 and C4 stand for the matrix products (bound by arithmetic, and by reading weights), C2 and C5 for attention, C3 for
what does not depend on length. With tensor parallelism h and m are divided by tp, as the paper says; a product of two
of them shrinks with tp^2, which the coefficients, fitted for each tp, make good.

It is linear in the same sums as `StepFit`, which lets each be written as the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_jax.architecture import Architecture
from ds_jax.latency.fitted import StepFit


@dataclass(frozen=True)
class PaperForm:
    """The five coefficients, in seconds per unit of what they multiply."""

    c1: float
    c2: float
    c3: float
    c4: float
    c5: float
    block: int = 32
    """b: tokens that the attention kernel takes at a time."""

    def step_fit(self, arch: Architecture, tp: int) -> StepFit:
        """The same as coefficients of sums of tokens."""
        products, hidden = _shape(arch, tp)
        return StepFit(
            tp,
            prefill=(self.c3, self.c1 * products, self.c2 * 3 * hidden / self.block),
            decode=(self.c4 * products, self.c5 * 3 * hidden, 0.0),
        )


def paper_form(fit: StepFit, arch: Architecture, block: int = 32) -> PaperForm:
    """The paper's coefficients of a fit. What that has for each sequence of a decode step has no place in them."""
    products, hidden = _shape(arch, fit.tp)
    a, b, c = fit.prefill
    base, context, _ = fit.decode
    return PaperForm(b / products, c * block / (3 * hidden), a, base / products, context / (3 * hidden), block)


def _shape(arch: Architecture, tp: int) -> tuple[float, float]:
    """4 h^2 + 2 h m, and h, of one device."""
    h, m = arch.hidden_size / tp, arch.intermediate_size / tp
    return 4 * h * h + 2 * h * m, h
