"""An owner in a process of its own: a NIXL agent with memory, which polls as a NodeStore does.

    test ──pause, resume, hints──▶ pipe ──▶ this process ──▶ answers

It ends when its pipe does. Importable by path of modules: multiprocessing starts it anew (spawn).
"""

import itertools
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

from kvray.link.nixl import NixlLink
from tests.contract.link_contract import Memory, pattern

OWNER_BYTES = 8 << 20
START_LIMIT_S = 60.0  # an interpreter, NIXL (1.3.2 loads torch), the first agent: 2 to 5 s here
ANSWER_LIMIT_S = 10.0
END_LIMIT_S = 5.0  # a killed process
QUICK_POLL_S = 0.0005
IDLE_POLL_S = 0.01
QUICK_FOR_S = 0.2  # after a hint or a command

_numbers = itertools.count(1)


def serve(pipe: Connection, name: str, stamp: int) -> None:
    memory = Memory(OWNER_BYTES)
    memory.bytes[:] = pattern(OWNER_BYTES, stamp)
    link = NixlLink(name)
    link.register(memory.address, OWNER_BYTES)
    pipe.send((link.metadata, memory.address))
    polls = True
    hints_seen = 0
    quick_until = time.monotonic() + QUICK_FOR_S
    while True:
        if polls:
            link.poll()
        now = time.monotonic()
        if link.hints_seen != hints_seen:
            hints_seen = link.hints_seen
            quick_until = now + QUICK_FOR_S
        if pipe.poll(QUICK_POLL_S if now < quick_until else IDLE_POLL_S):
            try:
                command = pipe.recv()
            except EOFError:
                return
            polls = command != "pause" and (polls or command == "resume")
            quick_until = now + QUICK_FOR_S
            pipe.send(link.hints_seen)


class NixlOwner:
    """The test's side of it."""

    def __init__(self) -> None:
        number = next(_numbers)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.name = f"owner-{os.getpid()}-{number}@1"
        self.stamp = number
        self.length_bytes = OWNER_BYTES
        self.process = context.Process(
            target=serve, args=(theirs, self.name, number), name=self.name, daemon=True
        )
        self.process.start()
        theirs.close()
        self.metadata: bytes
        self.address: int
        self.metadata, self.address = self._receive(START_LIMIT_S)

    def pause(self) -> None:
        self._ask("pause")

    def resume(self) -> None:
        self._ask("resume")

    def hints_seen(self) -> int:
        return self._ask("hints")

    def kill(self) -> None:
        self.process.kill()
        self.process.join(END_LIMIT_S)
        assert not self.process.is_alive()

    def freeze(self) -> None:
        """It neither answers nor dies, as a host that is overloaded."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def _ask(self, command: str) -> int:
        self._pipe.send(command)
        answer: int = self._receive(ANSWER_LIMIT_S)
        return answer

    def _receive(self, limit_s: float) -> Any:
        assert self._pipe.poll(limit_s), f"{self.name} does not answer"
        return self._pipe.recv()
