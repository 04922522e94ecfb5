"""Calls to the directory and their answers, and who can not reach whom.

Each message finds its own way: it may be lost, come twice, late or after a later one. A cut link
loses what is sent over it; a one-sided read that needs it stands still (sim.link).
"""

from collections import deque
from typing import TYPE_CHECKING

from kvray.core.codec import decode, encode
from kvray.core.commands import CallDirectory, NodeCommand
from kvray.core.messages import (
    MAX_CALL_BYTES,
    Announce,
    AnnounceReply,
    Locate,
    LocateReply,
    NodeHello,
    NodeHelloReply,
)

if TYPE_CHECKING:
    from tests.sim.process import NodeProcess
    from tests.sim.world import World

DIRECTORY = "directory"
KEPT_HELLOS = 16
_Reply = NodeHelloReply | AnnounceReply | LocateReply


class Network:
    """All links of the cluster, by the names of their ends."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._cuts: dict[tuple[str, str], int] = {}  # (from, to), how many partitions cut it
        self._latest_us: dict[str, int] = {}  # by node: when its latest message is there
        # The last ones, of whatever epoch. Their answers are lost.
        self._hellos: deque[tuple[str, bytes]] = deque(maxlen=KEPT_HELLOS)

    def is_cut(self, one: str, other: str) -> bool:
        """Whether something one of them needs from the other can not come."""
        return (one, other) in self._cuts or (other, one) in self._cuts

    def cut(self, links: list[tuple[str, str]], duration_us: int) -> None:
        for link in links:
            self._cuts[link] = self._cuts.get(link, 0) + 1
        self._world.schedule.after(duration_us, self._mend, links)

    def _mend(self, links: list[tuple[str, str]]) -> None:
        for link in links:
            if self._cuts.get(link, 0) > 1:
                self._cuts[link] -= 1
            else:
                self._cuts.pop(link, None)

    def heal(self) -> None:
        self._cuts.clear()

    # -- calls -----------------------------------------------------------------------------------

    def call(self, caller: "NodeProcess", call: CallDirectory) -> None:
        """Made by a node. Its answer goes to this life of it only."""
        data = encode(call.message)
        world = self._world
        world.note(caller.name, "calls", call.call_id, type(call.message).__name__)
        if world.hits("call_dropped", caller.name, call.call_id):
            return
        if isinstance(call.message, NodeHello):
            self._hellos.append((caller.name, data))
        delays_us = [self._delay_us("call_delayed", caller.name)]
        if world.hits("call_duplicated", caller.name, call.call_id):
            delays_us.append(self._delay_us("call_delayed", caller.name))
        if isinstance(call.message, NodeHello) and world.hits("hello_duplicated", caller.name):
            # Long after the node has gone on: the directory asks for everything once more.
            delays_us.append(world.random.randrange(100_000, 5_000_000))
        for delay_us in delays_us:
            at_us = world.schedule.now_us + delay_us
            if at_us < self._latest_us.get(caller.name, 0):
                world.count("call_overtaken")
            self._latest_us[caller.name] = max(at_us, self._latest_us.get(caller.name, 0))
            world.schedule.at(at_us, self._arrive, caller, call.call_id, data)

    def repeat_hello(self) -> str | None:
        """One that was said some time ago arrives once more. Whose, if it does."""
        directory = self._world.directory
        if not self._hellos or directory.core is None:
            return None
        name, data = self._world.random.choice(self._hellos)
        directory.answer(decode(data, max_bytes=MAX_CALL_BYTES, expect=NodeHello))
        return name

    def _arrive(self, caller: "NodeProcess", call_id: int, data: bytes) -> None:
        world = self._world
        if (caller.name, DIRECTORY) in self._cuts:
            return
        core = world.directory.core
        if core is None:
            if world.random.randrange(2):  # Ray says so, or does not
                world.schedule.after(5_000, caller.call_failed, call_id)
            return
        message = decode(data, max_bytes=MAX_CALL_BYTES, expect=NodeHello | Announce | Locate)
        answer = encode(world.directory.answer(message))
        if world.hits("answer_dropped", caller.name, call_id):
            return
        copies = 1 + world.hits("answer_duplicated", caller.name, call_id)
        for _ in range(copies):
            delay_us = self._delay_us("answer_delayed", caller.name)
            world.schedule.after(delay_us, self._answer, caller, call_id, answer)

    def _answer(self, caller: "NodeProcess", call_id: int, answer: bytes) -> None:
        if (DIRECTORY, caller.name) in self._cuts or caller.ended:
            return
        reply = decode(answer, max_bytes=MAX_CALL_BYTES, expect=_Reply)

        def come(now_ms: int) -> list[NodeCommand]:
            caller.calls.pop(call_id, None)
            return caller.core.on_directory_reply(call_id, reply, now_ms)

        self._world.note(caller.name, "is answered", call_id, type(reply).__name__)
        caller.event(come)

    def _delay_us(self, kind: str, name: str) -> int:
        random = self._world.random
        if self._world.hits(kind, name):
            return random.choice((20_000, 300_000, 700_000, 3_000_000))
        return random.randrange(200, 3_000)
