"""A tokenizer built here: one token a byte, so that no vocabulary has to be fetched."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer over bytes, inside and at the end of a word, and two marks. 514 tokens."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
