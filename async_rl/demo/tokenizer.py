"""The demo's tokenizer, in which one character is one token. Knows no other module.

It is saved as a Hugging Face fast tokenizer, so that every tool loads it the way it loads any other.
"""

from __future__ import annotations

import string
from pathlib import Path

EOS, UNKNOWN = "<eos>", "<unk>"
# Letters are what the task is about, ">" ends its prompts; the rest fills the vocabulary to 32, a power of two, so
# that it splits evenly over tensor-parallel ranks and no token id is without a string.
CHARACTERS = string.ascii_lowercase + "> ,."
TOKENS = (EOS, UNKNOWN, *CHARACTERS)
EOS_ID = TOKENS.index(EOS)


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; AutoTokenizer.from_pretrained(folder) loads them offline."""
    # Imported here: the two take seconds, and the task needs only the constants above.
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
