"""What the frameworks share: the FP8 recipes, by name only."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
