"""What a configuration asks of its devices: parameters, bytes of weights and of KV, and the tokens that fit.

python -m experiments.describe --config=configs/opt_66b.py --device_memory_gib=80

Nothing is loaded and no device is touched: config.json is enough. "tokens that fit" leaves out what programs need while
they run; --config.cache.memory_fraction is for that. With --output_dir, the folder gets summary.json and config.json
(the resolved configuration).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags

from ds_jax.architecture import DTYPE_BYTES
from ds_jax.config import Config
from ds_jax.flags import define_config, load_config, run
from models.folder import read_configs

define_config(default_file="configs/story.py")
_MEMORY_GIB = flags.DEFINE_float("device_memory_gib", None, "Memory of one device in GiB; 80 GB are 74.5.", 0.001)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for summary.json and config.json.")


def describe(config: Config, device_memory_gib: float | None = None) -> dict[str, Any]:
    """The numbers of a configuration; bytes are of the type that it resolves to.

    Args:
        config: what to describe.
        device_memory_gib: memory of one device; None leaves out what follows from it.

    Returns:
        The model's own numbers, and one entry per group of instances under "groups".

    Raises:
        ValueError, FileNotFoundError: config or checkpoint are wrong, or a group's tp does not fit the model.
    """
    config.check()
    checkpoint = read_configs(config.model.path)
    arch = checkpoint.arch
    dtype: str = checkpoint.dtype if config.model.dtype == "auto" else config.model.dtype
    groups = []
    for role, group in config.groups():
        try:
            weights = arch.parameters_per_device(group.tp) * DTYPE_BYTES[dtype]
        except ValueError as error:
            raise ValueError(f"{role}.{error}") from None
        kv = arch.kv_bytes_per_token_per_device(dtype, group.tp)
        entry: dict[str, Any] = {
            "role": str(role),
            "instances": group.instances,
            "tp": group.tp,
            "weight_bytes_per_device": weights,
            "kv_bytes_per_token_per_device": kv,
        }
        if config.cache.num_pages:
            entry["tokens_asked_for"] = config.cache.num_pages * config.cache.page_size
        if device_memory_gib is not None:
            left = int(device_memory_gib * 2**30 * config.cache.memory_fraction) - weights
            entry["tokens_that_fit"] = max(left, 0) // (kv * config.cache.page_size) * config.cache.page_size
        groups.append(entry)
    parameters = arch.parameters()
    return {
        "model": config.model.path,
        "family": arch.family,
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_heads": arch.num_heads,
        "num_kv_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.intermediate_size,
        "num_experts": arch.experts.count if arch.experts else 0,
        "vocab_size": arch.vocab_size,
        "max_positions": arch.max_positions,
        "parameters": parameters,
        "dtype": dtype,
        "weight_bytes": parameters * DTYPE_BYTES[dtype],
        "kv_bytes_per_token": arch.kv_bytes_per_token(dtype),
        "devices": config.devices(),
        "device_memory_gib": device_memory_gib,
        "groups": groups,
    }


def table(summary: dict[str, Any], config: Config) -> str:
    """The summary for people."""
    memory, auto = summary["device_memory_gib"], config.model.dtype == "auto"
    experts = f" of {summary['num_experts']} experts" if summary["num_experts"] else ""
    lines = [
        f"model              {summary['model']} ({summary['family']})",
        f"layers             {summary['num_layers']} of width {summary['hidden_size']:,}, "
        f"MLP {summary['intermediate_size']:,}{experts}",
        f"heads              {summary['num_heads']}, KV heads {summary['num_kv_heads']}, of {summary['head_dim']}",
        f"vocabulary         {summary['vocab_size']:,}",
        f"longest sequence   {summary['max_positions']:,} tokens",
        f"parameters         {summary['parameters']:,}",
        f"type               {summary['dtype']}" + (" (the checkpoint's own; float32 on the CPU)" if auto else ""),
        f"weights            {_size(summary['weight_bytes'])}",
        f"KV per token       {_size(summary['kv_bytes_per_token'])}",
        f"devices            {summary['devices']}",
        "",
    ]
    rows = [["", *(f"{group['instances']} {group['role']}, tp {group['tp']}" for group in summary["groups"])]]
    for name, title in (
        ("weight_bytes_per_device", "weights per device"),
        ("kv_bytes_per_token_per_device", "KV per token per device"),
    ):
        rows.append([title, *(_size(group[name]) for group in summary["groups"])])
    if config.cache.num_pages:
        rows.append(["tokens in cache.num_pages", *(f"{group['tokens_asked_for']:,}" for group in summary["groups"])])
    if memory is not None:
        title = f"tokens that fit in {config.cache.memory_fraction:g} x {memory:g} GiB"
        fit = (group["tokens_that_fit"] for group in summary["groups"])
        rows.append([title, *(f"{tokens:,}" if tokens else "none" for tokens in fit)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for title, *cells in rows:
        shown = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("   ".join([title.ljust(widths[0]), *shown]).rstrip())
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Print the table; write it down where asked to."""
    config = load_config()
    summary = describe(config, _MEMORY_GIB.value)
    if _OUTPUT_DIR.value:
        folder = Path(_OUTPUT_DIR.value)
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in (("summary.json", summary), ("config.json", dataclasses.asdict(config))):
            (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(summary, config))


def _size(nbytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.2f} GiB"


if __name__ == "__main__":
    run(main)
