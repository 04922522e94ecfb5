"""Which LoRA adapters an engine has loaded, by their content. Pure; in EngineCore.

vLLM's hash knows an adapter by its name (and path, in 0.32), and the worker reads its files when
the first request needs them. So keys get a salt: the digest of what the ranks have loaded, and not
of what lies in a folder now. Until they have said what that is, a request goes without kvray.

    not loaded ──every rank says the same digest──▶ KNOWN ──given up, or ranks differ──▶ not loaded
                                                     │
                                     another digest under that name
                                                     ▼
                     MIXED: the device still caches blocks of both under one hash, and nothing under
                     this name is looked up or stored until its cache was reset
"""

from collections.abc import Mapping
from dataclasses import dataclass

MAX_NAMES = 4_096  # with one name each; an engine keeps dozens loaded. Past it the oldest is mixed


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """On one rank. number: vLLM's lora_int_id. digest: in hex. is_mixed: this rank had another
    content under the same name before.
    """

    number: int
    digest: str
    is_mixed: bool = False


Loaded = Mapping[str, LoadedAdapter]  # by the adapter's name, all that a rank has


@dataclass(frozen=True, slots=True)
class AdapterChanges:
    """lost: names whose requests neither look up nor store from now on. is_replaced: one of them
    has another content now, so that what is under way may have KV of both.
    """

    lost: frozenset[str]
    is_replaced: bool


class Adapters:
    def __init__(self, rank_count: int) -> None:
        self._rank_count = rank_count
        self._ranks: dict[int, Loaded] = {}
        self._known: dict[str, LoadedAdapter] = {}
        self._last: dict[str, str] = {}  # the digest that a name had when it was known last
        self._mixed: set[str] = set()

    def salt(self, name: str, number: int) -> bytes | None:
        """16 bytes for the keys of requests with this adapter; None if it has no safe name."""
        known = self._known.get(name)
        if known is not None and known.number != number:
            # Two adapters of one name at once: the device cannot tell their blocks apart.
            self._mixed.add(name)
        if known is None or name in self._mixed:
            return None
        return bytes.fromhex(known.digest)

    def report(self, ranks: Mapping[int, Loaded]) -> AdapterChanges:
        """What some ranks have loaded by now."""
        self._ranks.update(ranks)
        before, self._known = self._known, self._agreed()
        replaced = set()
        for name, now in self._known.items():
            last = self._last.pop(name, None)
            if last != now.digest and (last is not None or now.is_mixed):
                self._mixed.add(name)
                replaced.add(name)
            self._last[name] = now.digest
        while len(self._last) > MAX_NAMES:
            self._mixed.add(forgotten := next(iter(self._last)))
            del self._last[forgotten]
        lost = replaced | (before.keys() - self._known.keys())
        return AdapterChanges(frozenset(lost), is_replaced=bool(replaced))

    def device_was_reset(self) -> None:
        """The device caches no block of before any more."""
        self._mixed.clear()

    def _agreed(self) -> dict[str, LoadedAdapter]:
        if len(self._ranks) < self._rank_count:
            return {}
        first, *others = self._ranks.values()
        return {
            name: LoadedAdapter(
                adapter.number,
                adapter.digest,
                is_mixed=any(rank[name].is_mixed for rank in self._ranks.values()),
            )
            for name, adapter in first.items()
            if all(
                name in rank
                and (rank[name].number, rank[name].digest) == (adapter.number, adapter.digest)
                for rank in others
            )
        }
