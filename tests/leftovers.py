"""What kvray may leave behind, counted: threads, file descriptors, segments and sockets.

Processes are counted by tests/contained.py, which runs the suite. Here is what is to be seen from
inside: whoever compares two `Leftovers`, taken before and after a module of tests, finds what that
module has left.
"""

import gc
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvray.config import SHM_FOLDER, default_runtime_dir

SETTLE_LIMIT_S = 15.0  # an actor that was killed gives its slab back within 5 s, Ray's way
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Leftovers:
    """fds: of this process, by what they lead to. Lock files stay by design and do not count."""

    threads: frozenset[str]
    files: frozenset[str]
    fds: Counter[str]

    def since(self, before: "Leftovers", *, all_fds: bool) -> list[str]:
        """What there is more than before. all_fds: not only kvray's own, by their names."""
        more = [f"thread {name}" for name in sorted(self.threads - before.threads)]
        more += [f"file {path}" for path in sorted(self.files - before.files)]
        more += [
            f"{count} file descriptors of {kind}"
            for kind, count in sorted((self.fds - before.fds).items())
            if all_fds or "kvray" in kind
        ]
        return more


def look() -> Leftovers:
    gc.collect()
    return Leftovers(
        threads=frozenset(
            f"{thread.name} ({thread.ident})"
            for thread in threading.enumerate()
            if thread.name.startswith("kvray")
        ),
        files=frozenset(map(str, _files())),
        fds=Counter(_fds()),
    )


def wait_for_none(before: Leftovers, *, all_fds: bool) -> list[str]:
    """What is left after a while; returns early when nothing is."""
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while (left := look().since(before, all_fds=all_fds)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return left


def _files() -> Iterator[Path]:
    """Slabs and sockets that nobody uses: others on this host may run a kvray of theirs."""
    slabs = set(Path(SHM_FOLDER).glob("kvray-*"))
    if slabs:
        yield from slabs - _mapped()
    for path in Path(default_runtime_dir()).glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as knock:
            try:
                knock.connect(str(path))
            except OSError:
                yield path


def _mapped() -> set[Path]:
    """The files of SHM_FOLDER that any process has mapped."""
    found: set[Path] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it ended meanwhile
            lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
            found |= {Path(line[5]) for line in lines if line[5:] and SHM_FOLDER in line[5]}
    return found


def _fds() -> Iterator[str]:
    """Sockets and pipes without their numbers, which are never the same twice."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one of this very loop
            yield str(entry.readlink()).split(":[", maxsplit=1)[0]
