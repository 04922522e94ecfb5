"""Whose a thing is, asked before it is trusted: a folder, a file, the process behind a socket.

    NodeStore ──folder 0700, socket, slab──▶ engines, command line
        ▲                                          │
        └───────── both ends ask the kernel ───────┘

A name in /tmp belongs to the user who took it first, so a name proves nothing. Root passes for
nobody but root: an engine of root trusts no NodeStore of another user either. Nothing is imported
but the standard library: engines load this module.
"""

import os
import socket
import stat
import struct

from kvray.errors import UntrustedError

PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
MAX_NOTE_BYTES = 64 * 1024  # of a file that is read whole; kvray's own have a few hundred


def check_private_folder(folder: str) -> None:
    """Raises UntrustedError if another user could put something there, FileNotFoundError if it is
    missing.
    """
    advice = "Remove it, or set KVRAY_RUNTIME_DIR to another folder"
    found = os.lstat(folder)  # a symbolic link is no folder: who made it may turn it later
    if not stat.S_ISDIR(found.st_mode):
        raise UntrustedError(f"the runtime folder {folder} is not a folder. {advice}")
    if found.st_uid != os.geteuid():
        raise UntrustedError(
            f"the runtime folder {folder} belongs to user {found.st_uid}, not to {os.geteuid()}. "
            "Set KVRAY_RUNTIME_DIR to another folder"
        )
    if found.st_mode & 0o077:
        raise UntrustedError(
            f"the runtime folder {folder} is open to others (mode {stat.S_IMODE(found.st_mode):o})."
            f" Run `chmod 700 {folder}`, or set KVRAY_RUNTIME_DIR to another folder"
        )


def check_own_file(descriptor: int, what: str) -> None:
    """Raises UntrustedError for what is no plain file of this user."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise UntrustedError(f"{what} is no plain file")
    if found.st_uid != os.geteuid():
        raise UntrustedError(f"{what} belongs to user {found.st_uid}, not to {os.geteuid()}")


def read_own_file(path: str) -> bytes:
    """The whole of a small file of this user, in a folder that is private. Raises UntrustedError
    and OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        check_own_file(descriptor, path)
        return file.read(MAX_NOTE_BYTES)


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """pid and uid of the process at the other end of a unix socket, by the kernel's word: of the
    one that listened or connected, also where another one has the descriptor since.
    """
    pid, uid, _ = PEER_CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    )
    return pid, uid


def check_own_peer(sock: socket.socket, path: str) -> None:
    """Raises UntrustedError if another user listens there."""
    pid, uid = peer_of(sock)
    if uid != os.geteuid():
        raise UntrustedError(
            f"expected a NodeStore of user {os.geteuid()} at {path}, found process {pid} of user "
            f"{uid}. Nothing is read from it or sent to it"
        )
