"""How much host memory loading a checkpoint takes beyond the weights themselves, and how fast it is.

python -m experiments.loading_memory --gigabytes=4 --shards=8 --tp=1 --output_dir=out/loading

Writes a Llama checkpoint of random numbers to a temporary folder, drops it from the page cache, and loads it in a fresh
process onto CPU devices, whose arrays are host memory and therefore subtracted. OUTPUT_DIR gets summary.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from ds_jax.flags import run

_GIGABYTES = flags.DEFINE_float("gigabytes", 4.0, "Size of the weights in 1e9 bytes.", lower_bound=0.01)
_SHARDS = flags.DEFINE_integer("shards", 8, "Files that they are spread over.", lower_bound=1)
_TP = flags.DEFINE_integer("tp", 1, "Devices that share each layer.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "What they are loaded as; stored as bfloat16.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for summary.json.")

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
"""All but the number of layers, which follows from the size."""


def write_checkpoint(folder: Path, nbytes: float, shards: int, seed: int = 0) -> int:
    """Write a checkpoint of about `nbytes` of random bfloat16, spread evenly over `shards` files; returns the bytes."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    e, m, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["hidden_size"] // 2
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (e, e),
        "self_attn.k_proj": (kv, e),
        "self_attn.v_proj": (kv, e),
        "self_attn.o_proj": (e, e),
        "mlp.gate_proj": (m, e),
        "mlp.up_proj": (m, e),
        "mlp.down_proj": (e, m),
        "input_layernorm": (e,),
        "post_attention_layernorm": (e,),
    }
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (CONFIG["vocab_size"], e),
        "model.norm": (e,),
        "lm_head": (CONFIG["vocab_size"], e),
    }
    size = {name: 2 * int(np.prod(shape)) for name, shape in (layer | ends).items()}
    layers = max(1, round((nbytes - sum(size[name] for name in ends)) / sum(size[name] for name in layer)))
    shapes = ends | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())

    generator = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    files: list[dict[str, Any]] = [{} for _ in range(shards)]
    begin = 0
    for name, shape in shapes.items():
        files[min(begin * shards // total, shards - 1)][name + ".weight"] = shape
        begin += 2 * int(np.prod(shape))
    for number, tensors in enumerate(files):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        numbers = {
            name: generator.integers(0x3000, 0x3F80, shape, np.uint16).view(ml_dtypes.bfloat16)  # from 1e-10 to 1
            for name, shape in tensors.items()
        }
        save_file(numbers, folder / file)
        weight_map |= dict.fromkeys(numbers, file)
        _drop_from_page_cache(folder / file)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def measure(folder: str, tp: int, dtype: str, progress: bool = True) -> dict[str, float]:
    """Load a checkpoint onto `tp` CPU devices of this process, which must be fresh, and watch its memory (Linux)."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", tp)
    import jax.numpy as jnp
    from tqdm import tqdm

    from models.checkpoint import bytes_to_read, load_params, open_checkpoint
    from models.sharding import make_mesh

    mesh = make_mesh(jax.devices(), tp)
    jnp.zeros(8).block_until_ready()
    checkpoint = open_checkpoint(folder)
    total = bytes_to_read(checkpoint, mesh)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    begin = time.monotonic()
    with tqdm(total=total, desc="load weights", unit="B", unit_scale=True, disable=not progress) as bar:
        params = load_params(checkpoint, mesh, jnp.dtype(dtype), bar.update)
        read = bar.n if progress else total
    seconds = time.monotonic() - begin
    leaves = jax.tree.leaves(params)
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    peak = _memory("VmHWM")
    return {
        "bytes_read": read,
        "array_bytes": held,
        "largest_parameter_bytes": max(leaf.nbytes for leaf in leaves),
        "rss_before_bytes": before,
        "peak_rss_bytes": peak,
        "extra_bytes": peak - before - held,
        "seconds": seconds,
        "bytes_per_s": read / seconds,
    }


def main(argv: list[str]) -> None:
    """Write, load, report."""
    with tempfile.TemporaryDirectory(prefix="ds_jax_loading_") as folder:
        write_checkpoint(Path(folder), _GIGABYTES.value * 1e9, _SHARDS.value)
        script = (
            "import json; from experiments.loading_memory import measure; "
            f"print(json.dumps(measure({folder!r}, {_TP.value}, {_DTYPE.value!r})))"
        )
        done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    summary = {"shards": _SHARDS.value, "tp": _TP.value, "dtype": _DTYPE.value, **json.loads(done.stdout)}
    if _OUTPUT_DIR.value:
        path = Path(_OUTPUT_DIR.value)
        path.mkdir(parents=True, exist_ok=True)
        (path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for name, value in summary.items():
        shown = f"{value / 1e6:,.1f} MB" if "bytes" in name else f"{value:.3g}" if isinstance(value, float) else value
        print(f"{name:26}{shown}")


def _drop_from_page_cache(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: this measurement needs Linux")


if __name__ == "__main__":
    run(main)
