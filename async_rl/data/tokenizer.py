"""The checkpoint's tokenizer, loaded the same way by every process that needs it."""

from __future__ import annotations

from typing import Any

from async_rl.config.schema import RunConfig
from async_rl.errors import ModelError


def load_tokenizer(config: RunConfig) -> Any:
    """Load the Hugging Face tokenizer of model.path. Raises ModelError when it cannot be loaded."""
    from transformers import AutoTokenizer  # takes a second; the command line must not pay for it

    path = config.model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path}: no tokenizer can be loaded: {' '.join(str(error).split())}") from None
    return tokenizer
