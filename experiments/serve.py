"""Serve a model over HTTP with the OpenAI API.

python -m experiments.serve --config=configs/story.py --port=8000

Every flag --config.NAME below overrides one field of the configuration file.
"""

from __future__ import annotations

from absl import flags

from ds_jax.flags import define_config, load_config, run

define_config(default_file="configs/story.py")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all of this machine's.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 picks a free one.", lower_bound=0, upper_bound=65535)


def main(argv: list[str]) -> None:
    """Build the engine and serve until a signal ends it."""
    config = load_config()

    # Only now the heavy imports: --help and a mistake in a flag answer at once.
    from ds_jax.runtime.platform import force_host_devices

    force_host_devices(config)

    from ds_jax.async_engine import AsyncEngine
    from ds_jax.server import serve

    listener = serve.listen(_HOST.value, _PORT.value)  # a port in use is found out before the slow part
    serve.run(AsyncEngine(config), listener=listener)


if __name__ == "__main__":
    run(main)
