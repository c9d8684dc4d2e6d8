"""Decoder-only transformers in flax: one definition, the families that it covers, and their checkpoints."""
