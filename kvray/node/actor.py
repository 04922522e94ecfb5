"""The NodeStore: the Ray actor that owns the slab of one node.

    Ray ──▶ status, wake, drain, take_over, measure_link, clear, stop
                                 └──▶ NodeLoop, a thread that does the work

Placed, named and restarted as kvray.cluster.placement says. Its constructor returns at once and
never fails, so that a NodeStore that can not start can say why (see node.loop).
"""

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from kvray.actors import (
    NOBODY,
    log_to_stderr,
    note_who_asked,
    refuse_optimized,
    run_at_normal_priority,
    take_short_turns,
)
from kvray.config import MAX_EXTENT_BYTES, Config
from kvray.core import arguments
from kvray.core.ids import NodeId
from kvray.errors import ArgumentError

if TYPE_CHECKING:
    from kvray.node.serving import Serving

logger = logging.getLogger("kvray.node")

# Of one take_over: a batch that a peer reads in a fraction of a second, also over 1 GbE.
MAX_TAKE_OVER_KEYS = 256
TAKE_OVER_DEADLINE_S = 5.0
REPR_LIMIT_S = 1.0  # a slab that is adopted is open by then, and a new one of some gigabytes
WIPE_STEP_BYTES = 16 << 20  # 2 ms in which nobody is answered
STOP_DEADLINE_S = 20.0  # threads end within 5 s each; unmapping a terabyte takes seconds


class NodeStore:
    """One per Ray node and cluster. Ray may call several methods at a time.

    settings: Config.to_dict(). node_id: Ray's id of the node that it is pinned to.
    """

    def __init__(self, settings: dict[str, object], node_id: str) -> None:
        refuse_optimized()
        log_to_stderr()
        run_at_normal_priority()
        take_short_turns()
        # Not before: Ray has started this process at niceness 15, beside engines that compute and
        # wait for it, and to import all this takes 0.2 s of a core.
        from kvray.node.loop import NodeLoop
        from kvray.node.meters import MeterThread

        self._node_id = node_id
        self._loop = NodeLoop(Config.parse(settings), NodeId(node_id))
        self._loop.start()
        self._meters = MeterThread(node_id, self._loop.status)
        self._meters.start()

    def __repr__(self) -> str:
        """Ray asks once, when this actor has been made, and shows that in its lists and logs."""
        return f"NodeStore(node={self._node_id[:8]}, {self._loop.describe(REPR_LIMIT_S)})"

    def wake(self) -> None:
        """A peer is about to connect to us or to read from us: poll the link quickly."""
        self._loop.wake()

    def status(self) -> dict[str, Any]:
        """Plain data: phase and problem of the start, and the core's snapshot when it serves."""
        return self._loop.status()

    def block_bytes(self, key: bytes) -> bytes | None:
        """A copy of a READY block's payload, for tests and verification."""
        wanted = arguments.a_key(key)
        payload: bytes | None = self._loop.ask(lambda serving: serving.block_bytes(wanted))
        return payload

    def block_keys(self) -> list[bytes]:
        """Of all READY blocks, for tests and verification."""
        keys: list[bytes] = self._loop.ask(lambda serving: serving.block_keys())
        return keys

    def drain(self, *, asked_by: str = NOBODY) -> tuple[list[bytes], list[int]]:
        """Store nothing more for engines, and say what is READY: keys, payload bytes."""
        note_who_asked("drain", arguments.a_text(asked_by, "asked_by"))
        listed: tuple[list[bytes], list[int]] = self._loop.ask(lambda serving: serving.drain())
        return listed

    def take_over(self, keys: list[bytes], sizes: list[int]) -> list[bytes]:
        """Get these blocks from a node that drains, into free room, and keep them. sizes: payload
        bytes. Returns the keys that are READY here after TAKE_OVER_DEADLINE_S at most.
        """
        names = arguments.keys(keys, at_most=MAX_TAKE_OVER_KEYS)
        if not names or len(set(names)) != len(names):
            raise ArgumentError(f"expected different keys, found {len(names)} in all")
        of_each = arguments.sizes(sizes, count=len(names), at_most=MAX_EXTENT_BYTES)
        wants = list(zip(names, of_each, strict=True))
        return self._loop.take_over(wants, deadline_s=TAKE_OVER_DEADLINE_S)

    def measure_link(self, peer_id: str, *, is_far: bool) -> dict[str, Any]:
        """How good the link to this node is, and which way its bytes come (see node.measuring).
        is_far: it is on another machine.
        """
        from kvray.node.host import read_counters
        from kvray.node.measuring import with_way

        peer = arguments.a_node_id(peer_id)
        far = arguments.a_flag(is_far, "is_far")
        return with_way(lambda: self._loop.measure(peer), read_counters, is_far=far)

    def clear(self, *, wipe: bool = False, asked_by: str = NOBODY) -> int:
        """Evict every block that nobody has pinned. wipe: then overwrite what no block lies in, a
        step at a time, between which engines are answered; what is evicted meanwhile may be left.
        Returns the bytes overwritten.
        """
        arguments.a_flag(wipe, "wipe")
        note_who_asked(
            "clear and wipe" if wipe else "clear", arguments.a_text(asked_by, "asked_by")
        )
        self._loop.ask(lambda serving: serving.clear())
        if not wipe:
            return 0
        begin, end = self._loop.ask(lambda serving: serving.payload())
        return sum(
            self._loop.ask(partial(_wipe, begin=at, end=min(at + WIPE_STEP_BYTES, end)))
            for at in range(begin, end, WIPE_STEP_BYTES)
        )

    def recent(self) -> list[tuple[int, str]]:
        """The last events of the core: how many ms ago, and what."""
        events: list[tuple[int, str]] = self._loop.ask(lambda serving: serving.recent())
        return events

    def check(self) -> None:
        """Assert all invariants; a broken one ends this process, as any bug does."""
        self._loop.ask(lambda serving: serving.check())

    def stop(self, *, asked_by: str = NOBODY) -> list[str]:
        """Say bye and leave no slab and no socket; the caller kills the actor then. Returns the
        paths that are left all the same.
        """
        note_who_asked("stop", arguments.a_text(asked_by, "asked_by"))
        self._meters.end()
        return self._loop.stop(STOP_DEADLINE_S)


def _wipe(serving: "Serving", *, begin: int, end: int) -> int:
    return serving.wipe(begin, end)
