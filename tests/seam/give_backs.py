"""python -m tests.seam.give_backs [--count N] [--json]: tickets are given back while updates for
them arrive, and how often the engine took that for a breach of the protocol.

Method: the real client and a scripted NodeStore in one process. A few look-ups wait; then the
NodeStore settles all of them while the engine's thread gives them back. Python changes threads as
often as it can meanwhile.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kvray.core.ids import BlockKey, Namespace
from kvray.core.messages import KeyState, Lookup, LookupUpdate
from kvray.node.client import NodeClient, Ticket
from tests.ray_nodes import wait_until
from tests.scripted_node import PAGE, ScriptedNode, all_waits, place_of, rows_of

ROUND = 50  # tickets
KEY = [BlockKey(b"k" * 16)]
SWITCH_INTERVAL_S = 1e-6
AMPLE_BUDGET_S = 5.0


@dataclass(frozen=True, slots=True)
class Races:
    """raced: whose update had come by then; the others met it under way. refusals: sessions that
    have ended.
    """

    give_backs: int
    raced: int
    refusals: int


def race(folder: Path, count: int) -> Races:
    path = folder / "node.sock"
    with ScriptedNode(path) as node:
        node.script[Lookup] = all_waits
        client = NodeClient(
            find_socket=lambda: str(path),
            engine_nonce=1,
            namespace=Namespace(b"n" * 16),
            label="",
            budget_s=AMPLE_BUDGET_S,
        )
        client.start()
        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            wait_until(lambda: client.session is not None, what="a session")
            done = raced = 0
            while done < count and client.session is not None:
                tickets = [_ask(client) for _ in range(ROUND)]
                _settle(node, tickets)
                for ticket in tickets:
                    client.unpin(ticket)
                    raced += KeyState.HIT in ticket.states
                done += len(tickets)
                node.heard.clear()
            # Whatever was on its way has been heard when this is answered.
            refusals = client.counters["sessions"] - 1 + (client.session is None)
            return Races(done, raced, refusals)
        finally:
            sys.setswitchinterval(interval_s)
            client.close()


def _ask(client: NodeClient) -> Ticket:
    client.begin_step()
    ticket = client.lookup(
        KEY, run_lengths=[1], run_is_prefix=[True], run_slot_bytes=[PAGE], deadline_ms=1_000
    )
    assert ticket is not None
    return ticket


def _settle(node: ScriptedNode, tickets: list[Ticket]) -> None:
    """Returns at once; the NodeStore says it on its own thread."""
    ops = [op for ticket in tickets for op in ticket.ops]
    hit = bytes([KeyState.HIT])

    def say() -> None:
        for op in ops:
            node.server.send(node.sessions[-1], LookupUpdate(op, [0], hit, rows_of(place_of(3))))

    node._calls.append(say)  # noqa: SLF001 (call() would wait for it)
    os.eventfd_write(node._wake_fd, 1)  # noqa: SLF001


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.seam.give_backs", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="give-backs")
    parser.add_argument("--json", action="store_true", help="nothing but one line of JSON")
    options = parser.parse_args()
    begun_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kvray-") as folder:
        races = race(Path(folder), options.count)
    took_s = round(time.perf_counter() - begun_s, 1)
    print(json.dumps({**asdict(races), "took_s": took_s}))  # noqa: T201 (for machines)
    return 1 if races.refusals or races.give_backs < options.count else 0


if __name__ == "__main__":
    sys.exit(main())
