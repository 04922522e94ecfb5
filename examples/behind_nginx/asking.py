"""Prompts over HTTP, through nginx, and out of which cache the tokens of each came."""

import logging
import time
from dataclasses import dataclass

from behind_nginx.errors import SceneError
from behind_nginx.scene import DEADLINE_S, Scene
from kvray.core.reasons import tokens_by_source

# The OpenMP threads of an engine go on spinning for 0.2 s after its last step, on cores that all
# share here. One question at a time is measured.
QUIET_S = 0.5
POLL_S = 0.05


@dataclass(frozen=True)
class Answer:
    """ttft_ms: from the request to the first token, at the client. node: who answered, as nginx
    says. sources: prompt tokens by where they came from, as the NodeStore of that node counts.
    """

    text: str
    prompt_tokens: int
    ttft_ms: float
    node: str
    sources: dict[str, int]


class Client:
    def __init__(self, scene: Scene, *, model: str) -> None:
        from openai import OpenAI

        for name in ("httpx", "httpx2"):  # OpenAI's client uses one of them: a line a request
            logging.getLogger(name).setLevel(logging.WARNING)
        self._scene = scene
        self._model = model
        self._openai = OpenAI(base_url=f"http://127.0.0.1:{scene.port}/v1", api_key="none")

    def ask(self, question: str, *, max_tokens: int) -> Answer:
        before = self._tokens()
        begun_s = time.perf_counter()
        response = self._openai.chat.completions.with_raw_response.create(
            model=self._model,
            messages=[{"role": "user", "content": question}],
            max_tokens=max_tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
        )
        first_s, text, prompt_tokens = 0.0, "", 0
        for chunk in response.parse():
            if chunk.choices and chunk.choices[0].delta.content:
                first_s = first_s or time.perf_counter()
                text += chunk.choices[0].delta.content
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
        node = self._scene.node_of(response.headers["x-engine"])
        sources = self._sources(node, before[node], prompt_tokens)
        time.sleep(QUIET_S)
        return Answer(text, prompt_tokens, (first_s - begun_s) * 1_000, node, sources)

    def _tokens(self) -> dict[str, dict[str, int]]:
        """Of each node: the prompt tokens of its engine, by source."""
        assert self._scene.cluster is not None
        return {
            node.node_id: tokens_by_source([node.details["engine_totals"]])
            for node in self._scene.cluster.nodes()
        }

    def _sources(self, node: str, before: dict[str, int], prompt_tokens: int) -> dict[str, int]:
        """An engine tells its NodeStore within a moment of a request's end."""
        end_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < end_s:
            now = self._tokens()[node]
            grown = {source: now[source] - before[source] for source in now}
            if sum(grown.values()) >= prompt_tokens:
                return grown
            time.sleep(POLL_S)
        raise SceneError(
            f"the NodeStore of node {node[:8]} has not heard of a request that its engine has "
            "answered: is the engine attached? (kvray doctor)"
        )
