"""Runs a command and lets no process outlive it: `python -m tests.contained --limit-s N -- CMD`.

    contained (child subreaper)
     └── CMD, leader of its own session and process group
          ├── engines, raylets, actors ...    also in sessions of their own, also daemons
          └── ...

The kernel hands every orphan below a subreaper to it, whatever its session or group, so the tree of
/proc under this process is complete. What is still there some seconds after CMD has
ended is named, ended, and makes the run fail: a test that leaks an engine is a wrong test.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

GRACE_S = 15.0  # Ray's own processes notice the end of their driver within 10 s
INTERRUPT_S = 60.0  # finalizers of a test end two multiprocess engines and a Ray cluster
TERMINATE_S = 5.0
POLL_S = 0.1

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.contained")
    parser.add_argument("--limit-s", type=float, required=True, help="CMD is interrupted then")
    parser.add_argument("--grace-s", type=float, default=GRACE_S, help="for what CMD has left")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    return run(command, limit_s=options.limit_s, grace_s=options.grace_s)


def run(command: list[str], *, limit_s: float, grace_s: float) -> int:
    """The exit status of the command; 1 if that is 0 but processes were left behind."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    process = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 (there is no other thread here)
    )

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    status = _wait(process, limit_s=limit_s)
    leftovers = _wait_until_none(grace_s)
    for pid, name in leftovers.items():
        sys.stderr.write(f"left behind by the tests: process {pid}: {name}\n")
    _end_descendants()
    return status or (1 if leftovers else 0)


def _wait(process: subprocess.Popen[bytes], *, limit_s: float) -> int:
    """Its exit status as a shell says it. Orphans are reaped meanwhile, as init would do it."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        sys.stderr.write(f"interrupted: the run took longer than {limit_s:.0f} s\n")
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # pytest runs finalizers, prints what it has
        signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, INTERRUPT_S)

    def give_up(_number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    pid, status = os.waitpid(-1, 0)
    while pid != process.pid:
        pid, status = os.waitpid(-1, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def _wait_until_none(limit_s: float) -> dict[int, str]:
    """What is still alive below this process after limit_s; returns early when nothing is."""
    deadline = time.monotonic() + limit_s
    while True:
        alive = {pid: _name(pid) for pid in descendants()}
        _reap()  # afterwards: who ended just before that look is a zombie by then, and no more
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(POLL_S)


def _end_descendants() -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in descendants():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if not _wait_until_none(TERMINATE_S):
            return


def descendants() -> list[int]:
    """Processes below this one, however far, that have not ended."""
    parents = dict(_parents())
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    frontier = [os.getpid()]
    while frontier:
        below = children.get(frontier.pop(), [])
        found += below
        frontier += below
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """(pid, parent's pid) of every process that is not a zombie."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):  # it ended meanwhile
            # "pid (name) state parent ...": a name may contain blanks and brackets
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                yield int(entry.name), int(parent)


def _name(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "?"
    return b" ".join(words).decode(errors="replace").strip()[:200]


def _reap() -> None:
    """Takes the exit status of orphans that were handed to this process and have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _die_with_parent() -> None:
    # Whoever started us in the background had a shell that ignores SIGINT, and children inherit it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
