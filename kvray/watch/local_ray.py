"""A Ray cluster that `kvray start` begins where there is none, and `kvray stop` ends.

    none ──begin──▶ `ray start --head --block` in a session of its own ──end──▶ none
                     note in the runtime folder: pid, start time, address

Only what the note names is ended, and only if that process is still the one that was started: a pid
that was given to another process since is left alone, and so is every other Ray on this machine.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvray.config import default_runtime_dir
from kvray.errors import NodeLostError
from kvray.node import process
from kvray.node.slab_file import runtime_directory
from kvray.ownership import check_private_folder, read_own_file

BEGIN_LIMIT_S = 60.0  # Ray starts in seconds; a busy host needs longer
END_LIMIT_S = 45.0  # `ray start --block` ends its children, in seconds
UP = "Ray runtime started"  # what `ray start` says then
CURRENT = "ray/ray_current_cluster"  # where Ray notes what `ray start` has begun on this host
LOOK_PERIOD_S = 0.1
# Ray itself cannot be kept to loopback: it replaces 127.0.0.1 by the host's own address. Its ports
# ask for the token, UCX's ask for nothing.
UCX_ON_LOOPBACK = "lo"
OPTIONS = (
    "--port=0",
    "--dashboard-host=127.0.0.1",
    "--include-dashboard=false",
)
LOG_TAIL_CHARS = 2_000  # of a start that failed


class Note(msgspec.Struct, frozen=True):
    """Which process is the cluster, and where Ray says that it is."""

    pid: int
    start_ticks: int
    address: str


def note_path(cluster_name: str) -> Path:
    """In the folder of sockets, which belongs to this user alone."""
    return Path(default_runtime_dir()) / f"{cluster_name}.ray.json"


def begin(cluster_name: str) -> None:
    """Start a head node that outlives this process. Raises NodeLostError with the end of its log.

    Whoever has looked for a Ray cluster before must look again in a new process: Ray reads once
    whether there is a token to show.
    """
    folder = runtime_directory(None)
    log_path = folder / f"{cluster_name}.ray.log"
    ray_command = [sys.executable, "-m", "ray.scripts.scripts"]
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":  # as ray.init() does for its own
        subprocess.run(  # noqa: S603 (Ray's own command)
            [*ray_command, "get-auth-token", "--generate"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=BEGIN_LIMIT_S,
            check=True,
        )
    with log_path.open("wb") as log:
        head = subprocess.Popen(  # noqa: S603 (Ray's own command)
            [*ray_command, "start", "--head", "--block", *OPTIONS],
            env=os.environ
            | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # its only node
            | {"UCX_NET_DEVICES": os.environ.get("UCX_NET_DEVICES", UCX_ON_LOOPBACK)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    start_ticks = process.start_ticks(head.pid)
    for _ in _rounds(BEGIN_LIMIT_S):
        if head.poll() is not None or start_ticks is None:
            break
        if UP in log_path.read_text(errors="replace"):
            note = Note(head.pid, start_ticks, _current_address())
            _write(note_path(cluster_name), msgspec.json.encode(note))
            return
    _end_session(head.pid)
    tail = log_path.read_text(errors="replace")[-LOG_TAIL_CHARS:]
    raise NodeLostError(
        f"`ray start --head` did not come up within {BEGIN_LIMIT_S:.0f} s; {log_path} ends so:\n"
        f"{tail}"
    )


def end(cluster_name: str) -> bool:
    """End the Ray cluster that begin() has started under this name; whether there was one."""
    path = note_path(cluster_name)
    note = read_note(cluster_name)
    if note is None:
        path.unlink(missing_ok=True)
        return False
    _end_session(note.pid)
    path.unlink(missing_ok=True)
    if note.address and _current_address() == note.address:  # and not of one begun since
        _current_path().unlink(missing_ok=True)
    return True


def read_note(cluster_name: str) -> Note | None:
    """None if there is none, or its process is gone. Raises UntrustedError for one that another
    user could have written: what it names is about to be ended.
    """
    try:
        check_private_folder(default_runtime_dir())
        note = msgspec.json.decode(read_own_file(str(note_path(cluster_name))), type=Note)
    except (OSError, msgspec.DecodeError):
        return None
    return note if process.start_ticks(note.pid) == note.start_ticks else None


def _current_path() -> Path:
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / CURRENT


def _current_address() -> str:
    """Where Ray's own commands would look for a cluster; empty if they know of none."""
    try:
        return _current_path().read_text().strip()
    except OSError:
        return ""


def _end_session(pid: int) -> None:
    """Of a process that leads its group and session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
        for _ in _rounds(END_LIMIT_S):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # if it is our own child
            if not _group_lives(pid):
                return


def _group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _rounds(limit_s: float) -> Iterator[None]:
    """Of a wait that ends by itself."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        yield
        time.sleep(LOOK_PERIOD_S)
