"""Fully asynchronous, streaming RL post-training of mixture-of-experts language models."""

__version__ = "0.1.0"
