"""Writing the keys and values of new tokens into their pages."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from kernels.backends import Backend, choose
from kernels.kv_write import definition, xla

FORMS = {"xla": xla.write, "definition": definition.write}


def write(
    k_pages: Float[Array, "P K N D"],
    v_pages: Float[Array, "P K N D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    slots: Int[Array, " T"],
    *,
    backend: Backend = "auto",
) -> tuple[Float[Array, "P K N D"], Float[Array, "P K N D"]]:
    """Put token t's key and value at slots[t] = page * N + offset; in place where the pages are donated.

    A slot below 0 or from P * N on writes nothing (padding). Slots that write must differ. Keys and values are
    cast to the pages' type.
    """
    return choose("KV write", backend, FORMS)(k_pages, v_pages, k, v, slots)
