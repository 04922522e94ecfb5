"""Which process is it, and is it still there. No psutil: three files of /proc and a pidfd.

A pid alone names nothing, since it is given to another process later; a pid with the start time of
its process (field 22 of /proc/PID/stat, clock ticks since boot) names one process for ever.

Both sides of the local seam use this, so it imports neither Ray nor vLLM nor NIXL.
"""

import errno
import os
import secrets
import select
from pathlib import Path
from uuid import UUID

from kvray.core.ids import ClientId

# A process of another pid namespace, or of another user under hidepid, looks as if it was gone.
_UNREADABLE = (FileNotFoundError, ProcessLookupError, PermissionError)
_STATE_FIELD = 3  # of /proc/PID/stat, counted from 1 as proc(5) does; the first after the name
_START_FIELD = 22
_DEAD_STATES = (b"Z", b"X", b"x")


def boot_id() -> bytes:
    """16 bytes that change with every boot of the host; equal in all of its containers."""
    return UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it can not be seen (any more).

    A zombie still has a start time: ask is_alive() whether somebody is there.
    """
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[_START_FIELD - _STATE_FIELD])


def own_client_id() -> ClientId | None:
    """A new identity for one client of this process; another nonce at every call.

    None where /proc does not tell our own start time: such a process runs uncached.
    """
    started = start_ticks(os.getpid())
    if started is None:
        return None
    return ClientId(pid=os.getpid(), start_ticks=started, nonce=secrets.randbits(63))


def open_pidfd(pid: int, start_ticks: int) -> int | None:
    """A file descriptor that becomes readable when this very process has ended, all its threads
    included; None if it has ended already. The caller closes it.

    Free of races: the start time is read after the descriptor was opened, so a pid that has been
    given to another process meanwhile is found out. OSError is a real fault (no descriptors left).
    """
    if pid <= 0:
        return None
    try:
        descriptor = os.pidfd_open(pid)
    except OSError as exc:
        if exc.errno in (errno.ESRCH, errno.EINVAL):  # EINVAL: a thread, not a process
            return None
        raise
    fields = _stat_fields(pid)
    if fields is None or int(fields[_START_FIELD - _STATE_FIELD]) != start_ticks:
        os.close(descriptor)
        return None
    return descriptor


def has_ended(pidfd: int, *, wait_ms: int = 0) -> bool:
    """Whether the process of this pidfd has ended; waits for it up to wait_ms."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(wait_ms))


def is_alive(pid: int, start_ticks: int) -> bool:
    """Whether this very process, or a thread of it, may still run. A zombie is not alive."""
    try:
        descriptor = open_pidfd(pid, start_ticks)
    except OSError:
        # No pidfd to be had (a sandbox forbids it, or no descriptor is left): the state says it,
        # except for a leader that has ended before its threads.
        fields = _stat_fields(pid)
        return (
            fields is not None
            and int(fields[_START_FIELD - _STATE_FIELD]) == start_ticks
            and fields[0] not in _DEAD_STATES
        )
    if descriptor is None:
        return False
    try:
        return not has_ended(descriptor)
    finally:
        os.close(descriptor)


def _stat_fields(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat from the state on.

    The name before it is whatever the process likes, blanks and brackets included: so from the
    last bracket on.
    """
    if pid <= 0:
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except _UNREADABLE:
        return None
    return stat.rpartition(b")")[2].split()
