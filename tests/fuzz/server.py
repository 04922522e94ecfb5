"""The local socket: hostile clients get no session, leave nothing behind, and disturb nobody.

On the calling thread, turn by turn, with plain sockets; a good client stays connected beside them.
"""

import socket
import tempfile
from pathlib import Path
from random import Random

from kvray.core.codec import encode
from kvray.core.layout import FORMAT_VERSION
from kvray.node import wire
from kvray.node.server import MessageReceived
from tests.fuzz.outcome import Outcome, mutant, rounds
from tests.unit.test_local_server import BYE, Loop, hello

MAX_GARBAGE_BYTES = 190_000  # below what a packet may have, so that it arrives
STAY_SHARE = 0.1  # of the clients: they stay connected and say nothing more


def run(random: Random, seconds: float) -> Outcome:
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="kvray-") as folder:
        path = Path(folder) / "s.sock"
        loop = Loop(path)
        good = loop.client()
        good.say(hello())
        loop.turn()
        before, staying = _descriptors(), []
        for _ in rounds(outcome, seconds):
            sock = wire.make_socket()
            try:
                sock.connect(str(path))
                _annoy(sock, random)
            except OSError:  # its queue is full, or it has hung up already
                pass
            _turn(loop, outcome)
            if random.random() < STAY_SHARE:
                staying.append(sock)
            else:
                sock.close()
            while len(staying) > 8:
                staying.pop(0).close()
        for sock in staying:
            sock.close()
        while any(_turn(loop, outcome)):
            pass
        good.say(BYE)
        heard = [event for event in _turn(loop, outcome) if isinstance(event, MessageReceived)]
        if not heard:
            outcome.fail("the good client is not heard any more")
        if (left := _descriptors() - before) > 0:
            outcome.fail(f"{left} descriptors are left")
        loop.close()
    return outcome


def _annoy(sock: socket.socket, random: Random) -> None:
    right = encode(hello())
    match random.randrange(7):
        case 0:
            sock.send(random.randbytes(random.randrange(1, 4_000)))
        case 1:
            sock.send(mutant(random, [right]))
        case 2:
            sock.send(bytes([FORMAT_VERSION]) + random.randbytes(MAX_GARBAGE_BYTES))
        case 3:
            socket.send_fds(sock, [b"x"], [0] * random.randrange(1, 60))
        case 4:
            sock.send(right)
            sock.send(mutant(random, [encode(BYE)]))
        case 5:
            sock.send(encode(hello(pid=1)))
        case _:
            pass  # it only connects


def _turn(loop: Loop, outcome: Outcome) -> list[object]:
    try:
        return list(loop.turn())
    except Exception as exc:  # noqa: BLE001 (that is what is looked for)
        outcome.fail(f"{type(exc).__name__}: {exc}")
        return []


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
