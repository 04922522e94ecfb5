"""Goal: a process is recognised by pid and start time, and its end is seen; nothing is mistaken
for it. Method: real processes, ended by us.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvray.node.process import (
    boot_id,
    has_ended,
    is_alive,
    open_pidfd,
    own_client_id,
    start_ticks,
)

# The name of a process is what it likes. This one says it when it is asked to.
SCRIPT = """
import sys
for line in sys.stdin:
    open("/proc/self/comm", "w").write(line.strip())
    print("named", flush=True)
"""


@pytest.fixture
def child() -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def started(pid: int) -> int:
    ticks = start_ticks(pid)
    assert ticks is not None
    return ticks


def rename(child: "subprocess.Popen[str]", name: str) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(name + "\n")
    child.stdin.flush()
    assert child.stdout.readline() == "named\n"
    assert Path(f"/proc/{child.pid}/comm").read_text() == name + "\n"


@pytest.mark.parametrize("name", ["python", "a) (b 1 2", ") S 1 2", "((("])
def test_a_name_with_blanks_and_brackets_moves_no_field(
    child: "subprocess.Popen[str]", name: str
) -> None:
    before = started(child.pid)
    rename(child, name)
    assert started(child.pid) == before


def test_a_start_time_is_in_clock_ticks_since_boot(child: "subprocess.Popen[str]") -> None:
    """The child started after this process and before now."""
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    now_ticks = uptime_s * os.sysconf("SC_CLK_TCK")
    assert started(os.getpid()) <= started(child.pid) <= now_ticks + 1


def test_the_end_of_a_process_is_seen_before_anybody_has_reaped_it(
    child: "subprocess.Popen[str]",
) -> None:
    ticks = started(child.pid)
    pidfd = open_pidfd(child.pid, ticks)
    assert pidfd is not None
    assert is_alive(child.pid, ticks)
    assert not has_ended(pidfd)

    child.kill()

    assert has_ended(pidfd, wait_ms=10_000)
    os.close(pidfd)
    assert started(child.pid) == ticks  # a zombie has its row in /proc
    assert not is_alive(child.pid, ticks)

    child.wait()

    assert start_ticks(child.pid) is None
    assert open_pidfd(child.pid, ticks) is None
    assert not is_alive(child.pid, ticks)


def test_another_process_with_the_same_pid_is_not_mistaken_for_it(
    child: "subprocess.Popen[str]",
) -> None:
    earlier = started(child.pid) - 1
    assert open_pidfd(child.pid, earlier) is None
    assert not is_alive(child.pid, earlier)


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1])
def test_no_process_has_an_impossible_pid(pid: int) -> None:
    assert start_ticks(pid) is None
    assert open_pidfd(pid, 1) is None


def test_no_descriptor_is_left_behind(child: "subprocess.Popen[str]") -> None:
    ticks = started(child.pid)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        assert is_alive(child.pid, ticks)
        assert not is_alive(child.pid, ticks + 1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_two_clients_of_one_process_are_told_apart() -> None:
    one, other = own_client_id(), own_client_id()
    assert one is not None
    assert other is not None
    assert (one.pid, one.start_ticks) == (other.pid, other.start_ticks)
    assert (one.pid, one.start_ticks) == (os.getpid(), started(os.getpid()))
    assert one.nonce != other.nonce


def test_all_processes_of_a_boot_see_the_same_boot_id() -> None:
    code = "from kvray.node.process import boot_id; print(boot_id().hex())"
    root = Path(__file__).parents[2]
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == boot_id().hex()
    assert len(boot_id()) == 16
