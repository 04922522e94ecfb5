"""What a router takes as the prompt of a request, and how it names the beginnings of prompts."""

from types import SimpleNamespace

import pytest

from kvray.serve.prompts import CHARS_PER_TOKEN, CHUNK_TOKENS, Prompt, prompt_of

CHUNK_CHARS = CHUNK_TOKENS * CHARS_PER_TOKEN
DOCUMENT = "the quick brown fox " * 1_000


def prompt(text: object) -> Prompt:
    return prompt_of([SimpleNamespace(prompt=text)])


def chat(*messages: object) -> Prompt:
    return prompt_of([SimpleNamespace(messages=list(messages))])


def test_prompts_share_the_names_of_what_they_share() -> None:
    one, other = prompt(DOCUMENT + "a" * CHUNK_CHARS), prompt(DOCUMENT + "b" * CHUNK_CHARS)
    shared = len(DOCUMENT) // CHUNK_CHARS
    assert one.chunks[:shared] == other.chunks[:shared]
    assert not set(one.chunks[shared:]) & set(other.chunks[shared:])


def test_a_name_says_all_that_comes_before() -> None:
    assert not set(prompt("x" + DOCUMENT[1:]).chunks) & set(prompt(DOCUMENT).chunks)


def test_what_fills_no_chunk_has_no_name_and_yet_tokens() -> None:
    assert prompt("x" * (CHUNK_CHARS - 1)) == Prompt((), CHUNK_TOKENS)
    assert len(prompt("x" * CHUNK_CHARS).chunks) == 1


@pytest.mark.parametrize(
    "content", [DOCUMENT, [{"type": "text", "text": DOCUMENT}], [SimpleNamespace(text=DOCUMENT)]]
)
def test_messages_are_read_in_each_of_their_shapes(content: object) -> None:
    message = {"role": "user", "content": content}
    assert chat(message) == prompt("user" + DOCUMENT)
    assert chat(SimpleNamespace(**message)) == prompt("user" + DOCUMENT)


def test_token_ids_are_cut_by_tokens() -> None:
    found = prompt(list(range(2 * CHUNK_TOKENS + 1)))
    assert len(found.chunks) == 2
    assert found.tokens == 2 * CHUNK_TOKENS + 1


def test_a_request_without_a_prompt_is_a_prompt_of_nothing() -> None:
    assert prompt_of([SimpleNamespace(audio=b""), 3]) == Prompt((), 0)
