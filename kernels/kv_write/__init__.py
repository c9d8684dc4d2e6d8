"""Writing the keys and values of new tokens into their pages, the keys turned to their positions on the way."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from kernels.backends import Backend, Form, choose
from kernels.kv_write import definition, xla

FORMS: dict[str, Form] = {"xla": xla.write, "definition": definition.write}


def write(
    k_pages: Float[Array, "P K N D"],
    v_pages: Float[Array, "P K N D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    slots: Int[Array, " T"],
    cosine: Float[Array, "T half"] | None = None,
    sine: Float[Array, "T half"] | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[Float[Array, "P K N D"], Float[Array, "P K N D"]]:
    """Put token t's key and value at slots[t] = page * N + offset; in place where the pages are donated.

    A slot below 0 or from P * N on writes nothing (padding). Slots that write must differ. Keys and values are
    cast to the pages' type.

    Args:
        cosine, sine: float32, half = D / 2: dimension i of each key is turned with dimension i + D / 2 by these angles
            (RoFormer, eq. 34, in the layout of Hugging Face checkpoints), in float32. None: keys come as they are.
        backend: which form; there is none but XLA's: few bytes are moved, and XLA turns and scatters them in one
            operation.
    """
    name = "xla" if backend == "mosaic" else backend
    return choose("KV write", name, FORMS)(k_pages, v_pages, k, v, slots, cosine, sine)
