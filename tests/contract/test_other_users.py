"""What another user of the host puts in kvray's way is neither believed nor told anything.

Method: a process of the user `nobody` takes the names first, in a folder as open as /tmp; the
victim is the engine's end of the local socket, and the command line.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kvray.config import EngineConfig
from kvray.core.ids import Namespace, SlabId
from kvray.engine.discovery import is_there, socket_finder
from kvray.errors import UntrustedError
from kvray.node import process
from kvray.node.client import NodeClient
from kvray.node.mapped import MappedSlab
from kvray.watch import local_ray
from tests.ray_nodes import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")

NOBODY = 65_534
NODE = "b" * 56
SOCKET = f"default-{NODE[:16]}.sock"
# Dropped there and not at exec: this Python may lie where only root comes.
BECOME = """
import os, socket, sys, time
user = int(sys.argv.pop())
os.setgroups([])
os.setgid(user)
os.setuid(user)
"""
LISTEN = """
os.makedirs(os.path.dirname(sys.argv[1]), mode=0o755, exist_ok=True)
listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listening.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
listening.listen()
print("listens", flush=True)
while True:
    connection, _ = listening.accept()
    print(len(connection.recv(1 << 16)), flush=True)
"""
SLEEP = "print('sleeps', flush=True); time.sleep(600)"

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """As open as /tmp."""
    with tempfile.TemporaryDirectory(prefix="kvray-users-") as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


@pytest.fixture
def run() -> Iterator[Run]:
    """Python of this host, as a user; it has said its first line when the call returns."""
    with contextlib.ExitStack() as stack:

        def run(code: str, *arguments: str, user: int = NOBODY) -> "subprocess.Popen[str]":
            running = subprocess.Popen(
                [sys.executable, "-I", "-c", BECOME + code, *arguments, str(user)],
                cwd="/",
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            stack.enter_context(running)
            stack.callback(running.kill)
            assert running.stdout is not None
            assert running.stdout.readline()
            return running

        yield run


def why_not(settings: dict[str, str]) -> str:
    """Why an engine with these settings finds no NodeStore, once it has tried."""
    client = NodeClient(
        find_socket=socket_finder(EngineConfig.parse(settings)),
        engine_nonce=1,
        label="victim",
        namespace=Namespace(b"n" * 16),
    )
    client.start()
    try:
        wait_until(lambda: client.reason not in ("", "not started"), what="a try to connect")
        return client.reason
    finally:
        client.close()


def test_a_folder_that_another_user_took_first_is_no_runtime_folder(
    open_folder: Path, run: Run
) -> None:
    folder = open_folder / "kvray-0"
    run(LISTEN, str(folder / SOCKET))
    settings = {"runtime_dir": str(folder), "node_id": NODE}

    assert f"{folder} belongs to user {NOBODY}" in why_not(settings)
    assert not is_there(EngineConfig.parse(settings))


def test_a_socket_of_another_user_hears_nothing(open_folder: Path, run: Run) -> None:
    path = str(open_folder / SOCKET)
    listens = run(LISTEN, path)

    reason = why_not({"socket_path": path})

    assert f"found process {listens.pid} of user {NOBODY}" in reason
    assert listens.stdout is not None
    assert listens.stdout.readline() == "0\n"  # bytes, until the end of the connection


@pytest.mark.parametrize("taken", ["the folder", "the note"])
def test_a_note_of_another_user_ends_no_process(
    open_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    """`kvray stop` ends the process group that the note names."""
    folder = open_folder / "kvray-0"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("KVRAY_RUNTIME_DIR", str(folder))
    victim = run(SLEEP, user=0)
    note = local_ray.Note(victim.pid, process.start_ticks(victim.pid) or 0, "")
    path = local_ray.note_path("default")
    path.write_bytes(msgspec.json.encode(note))
    os.chown(folder if taken == "the folder" else path, NOBODY, NOBODY)

    with pytest.raises(UntrustedError, match=f"belongs to user {NOBODY}"):
        local_ray.end("default")

    assert victim.poll() is None


def test_a_note_of_ones_own_is_believed(
    open_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder / "kvray-0"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("KVRAY_RUNTIME_DIR", str(folder))
    running = run(SLEEP, user=0)
    note = local_ray.Note(running.pid, process.start_ticks(running.pid) or 0, "")
    local_ray.note_path("default").write_bytes(msgspec.json.encode(note))

    assert local_ray.end("default")

    assert process.start_ticks(running.pid) is None


@pytest.mark.parametrize("kind", ["a file of another user", "a socket", "a folder"])
def test_what_is_handed_over_as_a_slab_is_a_file_of_ones_own(open_folder: Path, kind: str) -> None:
    path = open_folder / "slab"
    if kind == "a file of another user":
        path.write_bytes(bytes(1 << 20))
        os.chown(path, NOBODY, NOBODY)
        descriptor = os.open(path, os.O_RDWR)
    elif kind == "a folder":
        descriptor = os.open(open_folder, os.O_RDONLY)
    else:
        descriptor = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach()
    try:
        with pytest.raises(UntrustedError, match="handed over as the slab"):
            MappedSlab.from_fd(descriptor, 1 << 20, 1 << 16, SlabId(b"S" * 16))
    finally:
        os.close(descriptor)
