"""How fast engines compute and links bring, out of what NodeStores say of themselves. Pure.

    status of a node ──┬── engines: prefill_tokens, prefill_us     ──▶ prefill of one token
                       ├──          stored_tokens, stored_bytes    ──▶ bytes of one token
                       └── peers:   bytes_per_ms of what was read  ──▶ links, by (reader, owner)

For whoever has to weigh one place of a prompt against another (core.routing). All is measured by
work that was done anyway; what has not been done yet is not known.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Of all engines together: some prompts of each, so a change of load or model shows within minutes.
MAX_KEPT_TOKENS = 262_144
MIN_TOKENS = 1_024  # one long prompt says more than no measurement

PREFILL_TOKENS, PREFILL_US = "prefill_tokens", "prefill_us"  # counters of an engine's reports
STORED_TOKENS, STORED_BYTES = "stored_tokens", "stored_bytes"


@dataclass(frozen=True, slots=True)
class Speeds:
    """None: not measured yet. links: bytes a ms, by (node that reads, node that is read from)."""

    prefill_us_per_token: float | None = None
    bytes_per_token: float | None = None
    links: Mapping[tuple[str, str], float] = field(default_factory=dict)


class SpeedsSeen:
    """Fed with one look after another. model: count its engines only; "" counts all, which is
    right where the cluster serves one model.
    """

    def __init__(self, model: str = "") -> None:
        self._model = model
        self._engines: dict[tuple[str, int, int], Mapping[str, int]] = {}  # as they last were
        self._prefill = _Mean()
        self._stored = _Mean()

    def look(self, nodes: Mapping[str, Mapping[str, Any]]) -> Speeds:
        """nodes: by id, what each NodeStore has said (NodeStore.status)."""
        engines = dict(self._engines_of(nodes))
        for name, counters in engines.items():
            before = self._engines.get(name, {})
            grown = {key: count - before.get(key, 0) for key, count in counters.items()}
            self._prefill.add(grown.get(PREFILL_US, 0), grown.get(PREFILL_TOKENS, 0))
            self._stored.add(grown.get(STORED_BYTES, 0), grown.get(STORED_TOKENS, 0))
        self._engines = engines
        return Speeds(self._prefill.a_token(), self._stored.a_token(), dict(_links_of(nodes)))

    def _engines_of(
        self, nodes: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[tuple[tuple[str, int, int], Mapping[str, int]]]:
        """An engine is known by its node, the epoch that counts it, and its process."""
        for node_id, said in nodes.items():
            for client in said.get("clients", ()):
                if client["role"] == "engine" and self._model in ("", client["model"]):
                    yield (node_id, said.get("epoch", 0), client["pid"]), client["counters"]


class _Mean:
    """Of what a token takes, over the last MAX_KEPT_TOKENS or so."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._tokens = 0.0

    def add(self, amount: float, tokens: float) -> None:
        if amount <= 0 or tokens <= 0:
            return
        self._sum += amount
        self._tokens += tokens
        if self._tokens > MAX_KEPT_TOKENS:
            self._sum *= MAX_KEPT_TOKENS / 2 / self._tokens
            self._tokens = MAX_KEPT_TOKENS / 2

    def a_token(self) -> float | None:
        return self._sum / self._tokens if self._tokens >= MIN_TOKENS else None


def _links_of(
    nodes: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[tuple[str, str], float]]:
    for reader, said in nodes.items():
        for owner, link in said.get("fetch", {}).get("peers", {}).items():
            if link["bytes_per_ms"]:
                yield (reader, owner), link["bytes_per_ms"]
