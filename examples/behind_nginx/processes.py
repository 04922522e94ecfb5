"""A command in a session and process group of its own, and ended with all that it has started."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

GRACE_S = 20.0  # `vllm serve` ends its engine within 5 s, three times that beside other work
ORPHANS_S = 2.0  # of what the leader has left behind: nobody else ends it
KILL_LIMIT_S = 10.0
POLL_S = 0.05
TAIL_LINES = 40


class Group:
    """Started at once; its output in a file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._leader = subprocess.Popen(  # noqa: S603 (what the scene is made of)
                # TERM also when this process is killed and can not end it any more.
                ["setpriv", "--pdeathsig", "TERM", "--", *command],  # noqa: S607 (util-linux)
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pgid = self._leader.pid

    def members(self) -> list[int]:
        """Its processes that are alive."""
        alive = [pid for pid, group in _groups() if group == self.pgid]
        self._leader.poll()  # after the look: whoever was a zombie then is none any more
        return alive

    def has_ended(self) -> bool:
        """The leader, and so the service; what it has started may still be there."""
        return self._leader.poll() is not None

    def ask_to_end(self) -> None:
        """The leader only: it ends its own children better than a signal to all of them does."""
        with suppress(ProcessLookupError):
            self._leader.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Returns when no process of the group is left. May be repeated."""
        self.ask_to_end()
        with suppress(subprocess.TimeoutExpired):
            self._leader.wait(GRACE_S)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._wait_gone(ORPHANS_S):
                return
            with suppress(ProcessLookupError):
                os.killpg(self.pgid, number)
        self._wait_gone(KILL_LIMIT_S)

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])

    def _wait_gone(self, limit_s: float) -> bool:
        end_s = time.monotonic() + limit_s
        while self.members():
            if time.monotonic() > end_s:
                return False
            time.sleep(POLL_S)
        return True


def is_listening(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def is_free(port: int) -> bool:
    """Whether this process may listen there, on loopback."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_ports(count: int) -> list[int]:
    """Different ones, which nobody had a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def _groups() -> Iterator[tuple[int, int]]:
    """(pid, process group) of every process that is not a zombie."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                # "pid (name) state parent group ...": a name may contain blanks and brackets
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if state != "Z":
                    yield int(entry.name), int(group)
