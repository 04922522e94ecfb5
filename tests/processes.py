"""Processes of tests: each in a session and process group of its own, and ended with all of it.

    ProcessGroup(command)      started, its output in a file
     ├── EngineCore, Worker    vLLM's children stay in the group, also when their parent is killed
     └── ...
    end()                      TERM to the group, then KILL, each wait bounded; may be repeated

Whoever starts a group ends it (a fixture's finalizer). Should the interpreter end without that,
atexit does; should it be killed, the child sees the end of its channel (tests/engine_process.py) or
`python -m tests.contained` ends what is left.
"""

import atexit
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

TERM_LIMIT_S = 10.0  # vLLM's own shutdown of a multiprocess engine takes 2 to 5 s
KILL_LIMIT_S = 10.0  # a killed process with 3 GB mapped is gone in a second, ten on a busy machine
POLL_S = 0.02
LOG_TAIL_LINES = 60

_alive: set["ProcessGroup"] = set()


class ProcessGroup:
    """One command and everything that it starts."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._leader = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        self.pgid = self._leader.pid
        _alive.add(self)

    def members(self) -> list[int]:
        """Its processes that are alive, the leader among them."""
        alive = [pid for pid, group in _groups() if group == self.pgid]
        self._leader.poll()  # after the look: whoever was a zombie then is none any more
        return alive

    def shared_memory(self) -> set[Path]:
        """What multiprocessing made in /dev/shm and the group has mapped; no slab of kvray."""
        mapped = {file for pid in self.members() for file in _mapped_files(pid)}
        with os.scandir("/dev/shm") as entries:
            device = Path("/dev/shm").stat().st_dev
            return {
                Path(entry.path)
                for entry in entries
                if (device, entry.inode()) in mapped and entry.name.startswith(("psm_", "sem.mp-"))
            }

    def exit_status(self) -> int | None:
        """The leader's, None while it is alive."""
        return self._leader.poll()

    def wait(self, *, limit_s: float) -> bool:
        """Waits until no process of the group is left."""
        deadline = time.monotonic() + limit_s
        while self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def end(self) -> None:
        if not self._signal(signal.SIGTERM, limit_s=TERM_LIMIT_S):
            self.kill()
        _alive.discard(self)

    def kill(self) -> None:
        """Ends every process of the group at once, as a machine that crashes would."""
        shared_memory = self.shared_memory()
        gone = self._signal(signal.SIGKILL, limit_s=KILL_LIMIT_S)
        assert gone, f"processes {self.members()} outlived SIGKILL"
        for path in shared_memory:  # 400 MB of a multiprocess engine, which nobody else frees now
            path.unlink(missing_ok=True)
        _alive.discard(self)

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def _signal(self, number: int, *, limit_s: float) -> bool:
        if self.members():
            with suppress(ProcessLookupError):
                os.killpg(self.pgid, number)
        return self.wait(limit_s=limit_s)


@atexit.register
def _end_all() -> None:
    for group in list(_alive):
        group.kill()


def _mapped_files(pid: int) -> set[tuple[int, int]]:
    """Device and inode of files in a /dev/shm. By inode, since a semaphore is mapped under a name
    that it had once; by device, since a process may have a /dev/shm of its own (tests/cluster).
    """
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it ended meanwhile
        return set()
    found = re.findall(r" ([0-9a-f]+):([0-9a-f]+) (\d+) +/dev/shm/", maps)
    return {
        (os.makedev(int(major, 16), int(minor, 16)), int(inode)) for major, minor, inode in found
    }


def _groups() -> Iterator[tuple[int, int]]:
    """(pid, process group) of every process that is not a zombie."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                # "pid (name) state parent group ...": a name may contain blanks and brackets
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if state != "Z":
                    yield int(entry.name), int(group)
