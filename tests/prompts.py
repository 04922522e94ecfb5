"""Prompts of random tokens for the tiny models, the same for the same seed."""

import random

from tests.models import VOCABULARY

CHUNK_TOKENS = 128  # vLLM's block on the CPU


def prompt_of(token_count: int, *, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(1, VOCABULARY) for _ in range(token_count)]


def full_chunks(token_count: int) -> int:
    """Tokens of a prompt that lie in full chunks."""
    return token_count // CHUNK_TOKENS * CHUNK_TOKENS
