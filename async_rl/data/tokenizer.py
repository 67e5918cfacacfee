"""The checkpoint's tokenizer, loaded the same way by every process that needs it, and how it encodes prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
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


def prompt_encoder(
    encode: Callable[[str], Sequence[int]],
    token: Callable[[int], str | None],
    on_removed: Callable[[str], None] = lambda _: None,
) -> Callable[[str], Sequence[int]]:
    """Return ``encode`` without a second beginning-of-sequence token.

    A chat template writes that token as text, and a tokenizer may add it to any text. Of a prompt that begins with its
    text the added one is removed, as Transformers and vLLM do where they apply the template themselves. ``token``
    returns the text of a token id. ``on_removed`` is called with the token at the first removal.
    """
    added = list(encode("")[:1])
    first = token(added[0]) if added else None
    # Not an end-of-sequence token, which is added behind the text.
    if first is None or list(encode("a")[:1]) != added:
        return encode
    reported = False

    def encode_prompt(text: str) -> Sequence[int]:
        nonlocal reported
        ids = encode(text)
        if not text.startswith(first) or list(ids[:2]) != added * 2:
            return ids
        if not reported:
            reported = True
            on_removed(first)
        return ids[1:]

    return encode_prompt


def stop_token_ids(folder: Path) -> list[int]:
    """Return the tokens that end a response: those configured, or else the tokenizer's. Raises ModelError."""
    if configured := configured_stop_tokens(folder):
        return configured
    token = end_token(folder)
    return [] if token is None else [token]


def configured_stop_tokens(folder: Path) -> list[int]:
    """Return eos_token_id of generation_config.json or else config.json; [] without one. Raises ModelError."""
    for name in ("generation_config.json", "config.json"):
        if (eos := _read(folder / name).get("eos_token_id")) is not None:
            return list(eos) if isinstance(eos, list) else [eos]
    return []


def end_token(folder: Path) -> int | None:
    """Return the id of the tokenizer's end-of-sequence token from its files; None if they name none.

    Raises ModelError when a file is not JSON.
    """
    name = _read(folder / "tokenizer_config.json").get("eos_token")
    if name is None:
        name = _read(folder / "special_tokens_map.json").get("eos_token")
    if isinstance(name, dict):
        name = name.get("content")
    if name is None:
        return None
    for number, entry in _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        if entry.get("content") == name:
            return int(number)
    file = folder / "tokenizer.json"
    return tokenizer_file(file).token_to_id(name) if file.is_file() else None


def tokenizer_file(path: Path) -> Any:
    """Read a tokenizer.json without Transformers. Raises ModelError."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  tokenizers raises plain Exceptions
        raise ModelError(f"model.path {path.parent}: tokenizer.json cannot be read ({error})") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path.parent}: {path.name}: {error}") from None
    return found if isinstance(found, dict) else {}
