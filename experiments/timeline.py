"""Draw a recorder log.

python -m experiments.timeline --log=out/story/events.jsonl --output_dir=out/timeline

OUTPUT_DIR gets trace.json, to be opened at https://ui.perfetto.dev or chrome://tracing, and summary.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from ds_jax.flags import run

_LOG = flags.DEFINE_string("log", None, "Log of events and commands (JSON lines).", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)


def main(argv: list[str]) -> None:
    """Read the log, write the pictures, print the figures."""
    from ds_jax.recorder import load
    from ds_jax.timeline import read

    timeline = read(load(_LOG.value))
    folder = Path(_OUTPUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    summary = timeline.summary()
    (folder / "trace.json").write_text(json.dumps(timeline.chrome_trace()) + "\n", encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    for name, value in summary.items():
        if isinstance(value, dict):
            print(f"{name:28}" + ", ".join(f"{key} {_short(one)}" for key, one in value.items()))
        elif isinstance(value, list):
            for row in value:
                print(f"{name:28}" + ", ".join(f"{key} {_short(one)}" for key, one in row.items()))
        else:
            print(f"{name:28}{_short(value)}")
    print(f"written to {folder}; open trace.json at https://ui.perfetto.dev")


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(main)
