"""A link that goes silent. A process of its own, since UCX reads its variables when it is loaded.

    python -m tests.contract.silent_link           in this process's network: reads, and cuts
    python -m tests.contract.silent_link SOCKET    in the namespace: an owner, told by that socket

Prints one JSON object of what happened, in milliseconds; NamespacesError where there are none.
"""

import json
import os
import sys
import tempfile
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import numpy as np

from kvray.core.ids import ReadId
from kvray.link.base import ReadEnd, Segments
from kvray.link.nixl import NixlLink
from tests.contract.link_contract import Memory
from tests.contract.nixl_owner import OWNER_BYTES, serve
from tests.namespaces import Namespaces, namespaces
from tests.processes import ProcessGroup

OWNER = "owner"
READ_LIMIT_S = 10.0  # without a limit on silence a read stays under way for a quarter of an hour
HEALED_LIMIT_S = 5.0
POLL_S = 0.001


def main() -> None:
    if len(sys.argv) > 1:
        serve(Client(sys.argv[1]), OWNER, 0)
        return
    with namespaces("b") as net, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Listener(str(folder / "socket")) as listener:
            owner = start_owner(net, folder)
            try:
                with listener.accept() as pipe:
                    sys.stdout.write(json.dumps(cut_and_heal(net, pipe)) + "\n")
                    sys.stdout.flush()
            finally:
                owner.end()
    os._exit(0)  # a read may be under way still


def start_owner(net: Namespaces, folder: Path) -> ProcessGroup:
    command = [sys.executable, "-m", "tests.contract.silent_link", str(folder / "socket")]
    return ProcessGroup(
        net.command("b", *command),
        environment={**os.environ, "UCX_TLS": "tcp", "UCX_NET_DEVICES": net.device("data")},
        log=folder / "owner.log",
    )


def cut_and_heal(net: Namespaces, pipe: Connection) -> dict[str, int | str]:
    os.environ |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": net.own_device("data")}
    metadata, address = pipe.recv()
    memory = Memory(OWNER_BYTES)
    link = NixlLink("reader")
    link.register(memory.address, OWNER_BYTES)
    link.connect(OWNER, metadata)
    whole = Segments(*(np.array([n], np.uint64) for n in (memory.address, address, OWNER_BYTES)))
    before = read(link, 1, whole, READ_LIMIT_S)
    assert before is not None, "no read even before the cut"
    net.cut("b", "data")
    begun_s = time.monotonic()
    during = read(link, 2, whole, READ_LIMIT_S)
    silent_ms = round((time.monotonic() - begun_s) * 1_000)
    if during is None:
        return {"during": "none", "silent_ms": silent_ms}
    net.heal("b", "data")
    healed_s = time.monotonic()
    after = read(link, 3, whole, HEALED_LIMIT_S)
    return {
        "before": before.outcome.name,
        "during": during.outcome.name,
        "silent_ms": silent_ms,
        "after": after.outcome.name if after is not None else "none",
        "healed_ms": round((time.monotonic() - healed_s) * 1_000),
    }


def read(link: NixlLink, number: int, segments: Segments, limit_s: float) -> ReadEnd | None:
    """None if it does not end."""
    link.post_read(ReadId(number), OWNER, segments)
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        for end in link.poll():
            return end
        time.sleep(POLL_S)
    return None


if __name__ == "__main__":
    main()
