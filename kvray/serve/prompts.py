"""The chunks of a request as a router sees it: names for equal prefixes, and about how many tokens.

A router gets the request before anybody has tokenised it, so the names are of the text, not those
under which vLLM and the directory know the blocks: two prompts with the same beginning have the
same names up to there, and nothing more is said. Prompts of token ids are cut by tokens.
"""

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

CHUNK_TOKENS = 512
CHARS_PER_TOKEN = 4  # of English; an estimate, which scales all costs of a prompt alike
NAME_BYTES = 16
MAX_CHARS = 16_777_216  # what comes after so much decides nothing any more


class Prompt(NamedTuple):
    """chunks: names of the full chunks, each of CHUNK_TOKENS tokens; equal if all before are."""

    chunks: tuple[bytes, ...]
    tokens: int


def prompt_of(arguments: Sequence[object]) -> Prompt:
    """Of the first argument with messages or a prompt, as OpenAI's requests have. What has neither
    is a prompt of nothing.
    """
    for argument in arguments:
        for name in ("messages", "prompt"):
            found = getattr(argument, name, None)
            if found is not None:
                return _cut(found)
    return Prompt((), 0)


def _cut(found: object) -> Prompt:
    if isinstance(found, list) and found and all(isinstance(part, int) for part in found):
        ids = array("q", found)
        return Prompt(_names(ids.tobytes(), CHUNK_TOKENS * ids.itemsize), len(ids))
    text = "".join(_texts(found))[:MAX_CHARS]
    chunk_bytes = CHUNK_TOKENS * CHARS_PER_TOKEN
    data = text.encode(errors="replace")
    return Prompt(_names(data, chunk_bytes), -(-len(data) // CHARS_PER_TOKEN))


def _names(data: bytes, chunk_bytes: int) -> tuple[bytes, ...]:
    running = blake2b(digest_size=NAME_BYTES)
    names = []
    for end in range(chunk_bytes, len(data) + 1, chunk_bytes):
        running.update(data[end - chunk_bytes : end])
        names.append(running.copy().digest())
    return tuple(names)


def _texts(value: object) -> Iterator[str]:
    """Texts of a string, of a message (its role too, which the template writes), of lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for name in ("role", "content", "text"):
            yield from _texts(value.get(name))
    elif value is not None:
        for name in ("role", "content", "text"):
            yield from _texts(getattr(value, name, None))
