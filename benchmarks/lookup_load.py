"""A NodeStore under many clients at once, beside an echo server under the same.

    local_client_operations    CLIENTS processes, each sends its next operation when it has the
                               answer to the last one: 80 % a look-up of KEYS keys, all hits, and
                               its unpin, 10 % a reserve of as many, 10 % a commit of those
    echo                       the same messages, byte for byte in length, both ways, to a server
                               that does nothing but answer: one process, one selector, Python
    p99_over_echo              the ratio, median over interleaved rounds. In such a closed loop
                               each server is as busy as it can be, and the echo server does several
                               times the operations meanwhile; so also:
    p99_over_echo_paced        with PACED_PER_S operations/s in all at either server
    engine_hello_bye_ms        of an engine that comes and goes: connect and hello, or bye
    engine_hello_bye_loaded_ms the same beside the clients

An operation's time is from its first send until its answer has come. Nobody waits for an unpin's
Ack, as no engine does, so the unpin delays the operation after it.
"""

import itertools
import multiprocessing
import os
import random
import selectors
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measure import percentile, spread
from kvray.core.codec import decode, encode, pack_keys
from kvray.core.ids import BlockKey, ClientId, Maker, Namespace, OpId, Role, SlabId
from kvray.core.messages import (
    MAX_MESSAGE_BYTES,
    Ack,
    Bye,
    Commit,
    Hello,
    HelloReply,
    LocalAnswer,
    LocalRequest,
    Lookup,
    Reserve,
    ReserveReply,
    Unpin,
)
from kvray.node import process, wire

CLIENTS = 8
KEYS = 64
BLOCK_BYTES = 4_096
ROUNDS, ROUND_S = 7, 1.5
SMOKE_ROUNDS, SMOKE_ROUND_S = 2, 0.3
HELLOS = 500  # quiet; enough for a p99
SMOKE_HELLOS = 20
PACED_PER_S = 5_000  # what a NodeStore must be able to do
LOOKUP_SHARE = 0.8  # the rest: reserves and commits in turn
REPLY_LENGTH_BYTES = 4  # at the head of each message to the echo server: how long its answer is
FIRST_OP = 2**20  # in msgpack all from here on have one length, and so have the messages
ANSWER_LIMIT_S = 30.0  # far beyond any answer: only a bug waits so long

console = Console(stderr=True)


# ---- one client


class Caller:
    """A connection on which each message is sent and its answer awaited by one thread."""

    def __init__(self, path: str) -> None:
        self.sock = wire.make_socket()
        self.sock.connect(path)
        self.sock.settimeout(ANSWER_LIMIT_S)


class Visitor(Caller):
    """An engine that says hello, and bye."""

    def __init__(self, path: str, nonce: int) -> None:
        super().__init__(path)
        self._ops = itertools.count(FIRST_OP)
        self._acks_due = 0
        pid = os.getpid()
        start_ticks = process.start_ticks(pid)
        assert start_ticks is not None
        client = ClientId(pid, start_ticks, nonce)
        hello = Hello(
            OpId(next(self._ops)), client, Role.ENGINE, nonce, Namespace(bytes(16)), "load",
            SlabId(b""), maker=Maker(1),
        )  # fmt: skip
        self.sock.send(encode(hello))
        data, fds, _, _ = socket.recv_fds(self.sock, MAX_MESSAGE_BYTES, 1)
        for fd in fds:
            os.close(fd)
        reply = decode(data, max_bytes=MAX_MESSAGE_BYTES, expect=LocalAnswer)
        assert isinstance(reply, HelloReply), reply
        self.slab_id = reply.slab_id

    def bye(self) -> None:
        self._ask(Bye(OpId(next(self._ops))))

    def _ask(self, message: LocalRequest) -> bytes:
        """The answer, once the Acks that nobody has waited for are out of the way."""
        self.sock.send(encode(message))
        while self._acks_due:
            self.sock.recv(MAX_MESSAGE_BYTES)
            self._acks_due -= 1
        return self.sock.recv(MAX_MESSAGE_BYTES)


class Engine(Visitor):
    """What an engine says to its NodeStore, without what it does with the answers."""

    def __init__(self, path: str, nonce: int) -> None:
        super().__init__(path, nonce)
        self._rng = random.Random(nonce)
        self._reserved: bytes | None = None
        self.keys = new_keys(self._rng)
        self.reserve(self.keys)
        self.commit()
        self.hit_bytes = self.lookup()  # of a reply in which all keys are hits

    def lookup(self) -> int:
        """And its unpin. How long the answer was."""
        op = OpId(next(self._ops))
        message = Lookup(
            op, pack_keys(self.keys), [KEYS], [True], [BLOCK_BYTES], 1_000, fetch=False
        )
        reply_bytes = len(self._ask(message))
        self.sock.send(encode(Unpin(OpId(next(self._ops)), op)))
        self._acks_due += 1
        return reply_bytes

    def reserve(self, keys: list[BlockKey]) -> None:
        message = Reserve(OpId(next(self._ops)), pack_keys(keys), [KEYS], [BLOCK_BYTES])
        reply = decode(self._ask(message), max_bytes=MAX_MESSAGE_BYTES, expect=ReserveReply)
        assert not any(reply.grants), "something was not granted"
        self._reserved = reply.slots

    def commit(self) -> None:
        assert self._reserved is not None
        self._ask(Commit(OpId(next(self._ops)), self.slab_id, self._reserved))
        self._reserved = None

    def finish(self) -> None:
        """Leave nothing reserved."""
        if self._reserved is not None:
            self.commit()

    def turn(self, dice: float) -> None:
        if dice < LOOKUP_SHARE:
            assert self.lookup() == self.hit_bytes, "not all keys were hits"
        elif self._reserved is None:
            self.reserve(new_keys(self._rng))
        else:
            self.commit()


class Echoed(Caller):
    """The same messages to an echo server: as long as those that an Engine sends and gets."""

    def __init__(self, path: str, engine: Engine) -> None:
        super().__init__(path)
        op = OpId(FIRST_OP)
        keys, slots = pack_keys(engine.keys), bytes(KEYS * 20)
        ack_bytes = len(encode(Ack(op)))
        slots_reply_bytes = engine.hit_bytes
        self._lookup = padded(
            encode(Lookup(op, keys, [KEYS], [True], [BLOCK_BYTES], 1_000, fetch=False)),
            slots_reply_bytes,
        )
        self._unpin = padded(encode(Unpin(op, op)), ack_bytes)
        self._reserve = padded(encode(Reserve(op, keys, [KEYS], [BLOCK_BYTES])), slots_reply_bytes)
        self._commit = padded(encode(Commit(op, engine.slab_id, slots)), ack_bytes)
        self._has_reserved = False
        self._acks_due = 0

    def turn(self, dice: float) -> None:
        if dice < LOOKUP_SHARE:
            self._ask(self._lookup)
            self.sock.send(self._unpin)
            self._acks_due += 1
        else:
            self._ask(self._commit if self._has_reserved else self._reserve)
            self._has_reserved = not self._has_reserved

    def _ask(self, data: bytes) -> None:
        self.sock.send(data)
        while self._acks_due:
            self.sock.recv(MAX_MESSAGE_BYTES)
            self._acks_due -= 1
        self.sock.recv(MAX_MESSAGE_BYTES)


def new_keys(rng: random.Random) -> list[BlockKey]:
    return [BlockKey(rng.randbytes(16)) for _ in range(KEYS)]


def padded(message: bytes, reply_bytes: int) -> bytes:
    """message with the length of its answer in its first bytes."""
    return reply_bytes.to_bytes(REPLY_LENGTH_BYTES, "little") + message[REPLY_LENGTH_BYTES:]


def run_client(commands: Connection, store_path: str, echo_path: str, seed: int) -> None:
    """In a process of its own: for each (name, seconds, per_s) the times of its operations, in ms.
    per_s: 0, one after another; else so many a second, and one that begins late is timed from when
    it was due.
    """
    engine = Engine(store_path, nonce=seed)
    callers: dict[str, Engine | Echoed] = {"store": engine, "echo": Echoed(echo_path, engine)}
    rng = random.Random(seed)
    commands.send("ready")
    while (command := commands.recv()) is not None:
        name, seconds, per_s = command
        turn = callers[name].turn
        taken_ms: list[float] = []
        begun_s = now_s = time.perf_counter()
        due_s = begun_s + rng.random() / per_s if per_s else begun_s
        while now_s < begun_s + seconds:
            if not per_s:
                due_s = now_s
            elif now_s < due_s:
                time.sleep(due_s - now_s)
                due_s = time.perf_counter()
            turn(rng.random())
            now_s = time.perf_counter()
            taken_ms.append((now_s - due_s) * 1_000)
            if per_s:
                due_s += 1 / per_s
        commands.send(taken_ms)
    engine.finish()
    engine.bye()


# ---- the echo server


def serve_echo(path: str) -> None:
    """In a process of its own, until it is ended."""
    listener = wire.make_socket()
    listener.bind(path)
    listener.listen(CLIENTS)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    buffer = wire.make_buffer()
    zeros = bytes(MAX_MESSAGE_BYTES)
    while True:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if sock is listener:
                accepted, _ = listener.accept()
                wire.prepare(accepted)
                selector.register(accepted, selectors.EVENT_READ)
                continue
            try:
                count = sock.recv_into(buffer)
            except ConnectionResetError:  # it went away before it had read everything
                count = 0
            if count:
                sock.send(zeros[: int.from_bytes(buffer[:REPLY_LENGTH_BYTES], "little")])
            else:
                selector.unregister(sock)
                sock.close()


@contextmanager
def running_echo() -> Iterator[str]:
    """Where it listens."""
    with tempfile.TemporaryDirectory(prefix="kvray-echo-") as folder:
        path = str(Path(folder) / "socket")
        context = multiprocessing.get_context("spawn")
        echo = context.Process(target=serve_echo, args=(path,), daemon=True)
        echo.start()
        try:
            while not Path(path).exists():
                assert echo.is_alive(), "the echo server has ended"
                time.sleep(0.01)
            yield path
        finally:
            echo.kill()
            echo.join()


# ---- all of them


@contextmanager
def running_clients(store_path: str) -> Iterator[list["Connection[Any, Any]"]]:
    context = multiprocessing.get_context("spawn")
    with running_echo() as echo_path:
        pipes, processes = [], []
        try:
            for seed in range(1, CLIENTS + 1):
                ours, theirs = context.Pipe()
                arguments = (theirs, store_path, echo_path, 1_000 * seed)
                client = context.Process(target=run_client, args=arguments, daemon=True)
                client.start()
                pipes.append(ours)
                processes.append(client)
            for pipe in pipes:
                assert pipe.recv() == "ready"
            yield pipes
            for pipe in pipes:
                pipe.send(None)
            for client in processes:
                client.join(ANSWER_LIMIT_S)
        finally:
            for child in processes:
                child.kill()
                child.join()


def one_round(
    pipes: Sequence["Connection[Any, Any]"], name: str, seconds: float, *, per_s: float = 0
) -> list[float]:
    """The times of all clients' operations. per_s: of all of them; 0, as many as they can."""
    for pipe in pipes:
        pipe.send((name, seconds, per_s / len(pipes)))
    return [taken_ms for pipe in pipes for taken_ms in pipe.recv()]


def hello_bye_ms(path: str, count: int) -> list[float]:
    """`count` engines come and go, one after another; two times each."""
    taken_ms: list[float] = []
    for n in range(count):
        begun_s = time.perf_counter()
        visitor = Visitor(path, nonce=2**40 + n)
        taken_ms.append((time.perf_counter() - begun_s) * 1_000)
        begun_s = time.perf_counter()
        visitor.bye()
        taken_ms.append((time.perf_counter() - begun_s) * 1_000)
        visitor.sock.close()
    return taken_ms


def measure_load(store_path: str, *, smoke: bool) -> dict[str, Any]:
    rounds, seconds = (SMOKE_ROUNDS, SMOKE_ROUND_S) if smoke else (ROUNDS, ROUND_S)
    hellos = SMOKE_HELLOS if smoke else HELLOS
    quiet_ms = hello_bye_ms(store_path, hellos)
    loaded_ms: list[float] = []
    times: dict[str, list[list[float]]] = {"store": [], "echo": []}
    paced: dict[str, list[list[float]]] = {"store": [], "echo": []}
    with running_clients(store_path) as pipes:
        for name in times:
            one_round(pipes, name, SMOKE_ROUND_S)  # warm
        for _ in track(range(rounds), f"{CLIENTS} clients", console=console):
            for name, found in times.items():
                found.append(one_round(pipes, name, seconds))
            for name, found in paced.items():
                found.append(one_round(pipes, name, seconds, per_s=PACED_PER_S))
            for pipe in pipes:
                pipe.send(("store", seconds / 2, 0))
            loaded_ms += hello_bye_ms(store_path, hellos // (4 * rounds))
            for pipe in pipes:
                pipe.recv()
    return {
        "local_client_operations": summary(times["store"], seconds),
        "echo": summary(times["echo"], seconds),
        "p99_over_echo": p99_ratio(times),
        "local_client_operations_paced": summary(paced["store"], seconds),
        "echo_paced": summary(paced["echo"], seconds),
        "p99_over_echo_paced": p99_ratio(paced),
        "engine_hello_bye_ms": spread(quiet_ms, digits=3),
        "engine_hello_bye_loaded_ms": spread(loaded_ms, digits=3),
    }


def p99_ratio(times: dict[str, list[list[float]]]) -> float:
    ratios = [
        percentile(ours, 99) / percentile(echo, 99)
        for ours, echo in zip(times["store"], times["echo"], strict=True)
    ]
    return round(statistics.median(ratios), 2)


def summary(rounds: list[list[float]], seconds: float) -> dict[str, Any]:
    """Medians over the rounds."""
    return {
        "clients": CLIENTS,
        "keys": KEYS,
        "operations_per_s": round(statistics.median(len(times) / seconds for times in rounds)),
        "p50_ms": round(statistics.median(percentile(times, 50) for times in rounds), 3),
        "p99_ms": round(statistics.median(percentile(times, 99) for times in rounds), 3),
    }
