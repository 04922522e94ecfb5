"""Conversations against one address, for behind_nginx.py --load multi_turn.

vLLM's own client for this, benchmark_serving_multi_turn, is no part of its wheel; this one asks
the same endpoint, /v1/completions, as a stream of token ids.

Each session is a task that takes its turns one after another; AT_ONCE of all sessions have a
request under way. A turn's prompt is everything said so far, answers included.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

import aiohttp

TURN_TOKENS = 128
ANSWER_TOKENS = 16
AT_ONCE = 2  # one for each engine
VOCABULARY = 49_000  # of SmolLM2: 49,152
FIRST_TOKEN_ID = 20  # below are its special ones
LIMIT_S = 600.0
SEEDS_PER_RUN = 10_000  # more than a run has sessions


@dataclass(frozen=True, slots=True)
class Shape:
    """first_tokens: of a session's first turn."""

    sessions: int
    turns: int
    first_tokens: int

    @property
    def session_tokens(self) -> int:
        later = (self.turns - 1) * (TURN_TOKENS + ANSWER_TOKENS)
        return self.first_tokens + ANSWER_TOKENS + later


@dataclass(slots=True)
class Talks:
    """What came of it. ttft_ms: of each turn, over all sessions."""

    ttft_ms: list[list[float]]
    failed: int = 0
    duration_s: float = 0.0
    errors: list[str] = field(default_factory=list)


def talk(port: int, model: str, shape: Shape, *, seed: int) -> Talks:
    talks = Talks([[] for _ in range(shape.turns)])
    begun_s = time.perf_counter()
    asyncio.run(_all(port, model, shape, talks, seed=seed))
    talks.duration_s = time.perf_counter() - begun_s
    return talks


async def _all(port: int, model: str, shape: Shape, talks: Talks, *, seed: int) -> None:
    slots = asyncio.Semaphore(AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=LIMIT_S)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as http:

        async def session(number: int) -> None:
            source = random.Random(seed * SEEDS_PER_RUN + number)
            said: list[int] = []
            for turn in range(shape.turns):
                count = TURN_TOKENS if turn else shape.first_tokens
                said += [source.randrange(FIRST_TOKEN_ID, VOCABULARY) for _ in range(count)]
                async with slots:
                    try:
                        ttft_ms, answer = await _ask(http, model, said)
                    except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
                        talks.failed += shape.turns - turn
                        talks.errors.append(f"{type(exc).__name__}: {exc}")
                        return
                talks.ttft_ms[turn].append(ttft_ms)
                said += answer

        await asyncio.gather(*(session(number) for number in range(shape.sessions)))


async def _ask(
    http: aiohttp.ClientSession, model: str, prompt: list[int]
) -> tuple[float, list[int]]:
    """TTFT in ms and the answer's token ids. Raises ValueError for an answer that is none."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0,
        "ignore_eos": True, "stream": True, "return_token_ids": True,
    }  # fmt: skip
    begun_s = time.perf_counter()
    first_s = 0.0
    answer: list[int] = []
    async with http.post("/v1/completions", json=body) as response:
        if not response.ok:
            raise ValueError(f"HTTP {response.status}: {(await response.text())[:200]}")
        async for line in response.content:
            text = line.decode().strip().removeprefix("data: ")
            if not text or text == "[DONE]":
                continue
            for choice in json.loads(text).get("choices", []):
                answer += choice.get("token_ids") or []
                if answer and not first_s:
                    first_s = time.perf_counter()
    if len(answer) != ANSWER_TOKENS:
        raise ValueError(f"expected {ANSWER_TOKENS} tokens, found {len(answer)}")
    return (first_s - begun_s) * 1_000, answer
