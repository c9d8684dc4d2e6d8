"""The OpenAI-compatible HTTP front end. It knows the engine only by `AsyncEngine`'s methods."""
