"""The engine of lookup_local that reserves a slot, says so, and waits to be killed.

A file of its own, so that it starts without loading what measures it.

    python benchmarks/lookup_killed.py SOCKET ENGINE_NONCE
"""

import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kvray.core.ids import BlockKey, Maker, Namespace
from kvray.node.client import ClientState, NodeClient

SESSION_LIMIT_S = 10.0  # a hello takes a millisecond
BLOCK_BYTES = 4_096


def main(socket_path: str, nonce: int) -> None:
    connected = threading.Event()
    client = NodeClient(
        find_socket=lambda: socket_path,
        engine_nonce=nonce,
        namespace=Namespace(bytes(16)),
        label="an engine that will be killed",
        maker=Maker(1),
        budget_s=SESSION_LIMIT_S,
        on_session=lambda _: connected.set(),
    )
    client.start()
    assert connected.wait(SESSION_LIMIT_S), "no session"
    assert client.state is ClientState.CONNECTED
    client.begin_step()
    key = BlockKey(os.urandom(16))
    assert client.reserve([key], run_lengths=[1], run_slot_bytes=[BLOCK_BYTES]) is not None
    print("reserved", flush=True)
    while True:
        time.sleep(SESSION_LIMIT_S)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
