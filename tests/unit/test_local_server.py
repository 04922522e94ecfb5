"""The NodeStore's end of the local socket, driven turn by turn on the test's own thread.

The clients are plain sockets that say exactly what the test writes; the process behind them is this
one, so a Hello with our own pid is true.
"""

import array
import logging
import os
import resource
import selectors
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvray.core.codec import decode, encode
from kvray.core.ids import ClientId, Namespace, OpId, Role, SlabId
from kvray.core.layout import FORMAT_VERSION
from kvray.core.messages import (
    MAX_MESSAGE_BYTES,
    Ack,
    Bye,
    Hello,
    LocalAnswer,
    LocalRequest,
    LookupReply,
    Refused,
    Report,
)
from kvray.errors import ConfigError, SlabBusyError
from kvray.node import process, server, wire
from kvray.node.server import (
    LocalServer,
    MessageReceived,
    ServerEvent,
    SessionClosed,
    SessionOpened,
)

START_TICKS = process.start_ticks(os.getpid()) or 0
BYE = Bye(OpId(9))
BIG_ANSWER = LookupReply(OpId(1), bytes(1_024), b"")


def hello(
    *, pid: int | None = None, start_ticks: int = START_TICKS, op: int = 1, nonce: int = 5
) -> Hello:
    return Hello(
        op=OpId(op),
        client=ClientId(os.getpid() if pid is None else pid, start_ticks, nonce),
        role=Role.ENGINE,
        engine_nonce=nonce,
        namespace=Namespace(b""),
        label="test",
        slab_id=SlabId(b""),
    )


class Client:
    """A socket that says what it is told to."""

    def __init__(self, path: Path) -> None:
        self.sock = wire.make_socket()
        self.sock.connect(str(path))
        self._buffer = wire.make_buffer()

    def say(self, message: LocalRequest) -> None:
        wire.send(self.sock, encode(message))

    def hear(self) -> LocalAnswer | None:
        """The next answer that is there; None at the end of the connection."""
        packet = wire.receive(self.sock, self._buffer)
        if packet is None:
            return None
        return decode(packet.data, max_bytes=MAX_MESSAGE_BYTES, expect=LocalAnswer)

    def hear_op(self) -> int:
        answer = self.hear()
        assert answer is not None
        return answer.op

    def hear_refusal(self) -> str:
        """The last thing said to us, which is why."""
        refused = self.hear()
        assert isinstance(refused, Refused)
        assert refused.fatal
        assert self.hear() is None
        return refused.reason


class Loop:
    """A NodeStore's loop, one turn at a time, and the server in it."""

    def __init__(
        self, path: Path, *, uid: int | None = None, max_sessions: int = server.MAX_SESSIONS
    ) -> None:
        self.path = path
        self.server = LocalServer(str(path), uid=uid, max_sessions=max_sessions)
        self.selector = selectors.DefaultSelector()
        self.server.register(self.selector)
        self._clients: list[Client] = []

    def turn(self) -> list[ServerEvent]:
        """Everything that can be done without waiting."""
        events: list[ServerEvent] = []
        while ready := self.selector.select(0):
            for key, mask in ready:
                assert key.data is self.server
                events += self.server.on_ready(key, mask)
                self.server.check()
        return events + self.server.take_events()

    def client(self) -> Client:
        client = Client(self.path)
        self._clients.append(client)
        return client

    def greeted(self) -> tuple[Client, server.SessionId]:
        client = self.client()
        client.say(hello())
        opened, received = self.turn()
        assert isinstance(opened, SessionOpened)
        assert isinstance(received, MessageReceived)
        return client, opened.session_id

    def close(self) -> None:
        self.server.close()
        self.selector.close()
        for client in self._clients:
            client.sock.close()


LoopFactory = Callable[..., Loop]


@pytest.fixture
def make_loop(tmp_path: Path) -> Iterator[LoopFactory]:
    loops: list[Loop] = []

    def make(*, uid: int | None = None, max_sessions: int = server.MAX_SESSIONS) -> Loop:
        loops.append(Loop(tmp_path / "s", uid=uid, max_sessions=max_sessions))
        return loops[-1]

    yield make
    for loop in loops:
        loop.close()


@pytest.fixture
def loop(make_loop: LoopFactory) -> Loop:
    return make_loop()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# -- a client's life -----------------------------------------------------------------------------


def test_a_client_says_hello_is_answered_and_says_bye(loop: Loop) -> None:
    client = loop.client()
    client.say(hello())
    opened, received = loop.turn()
    assert opened == SessionOpened(server.SessionId(1), os.getpid(), os.getuid())
    assert received == MessageReceived(server.SessionId(1), hello())
    loop.server.send(server.SessionId(1), Ack(OpId(1)))
    assert client.hear() == Ack(OpId(1))
    client.say(BYE)
    assert loop.turn() == [MessageReceived(server.SessionId(1), BYE)]
    client.sock.close()
    assert loop.turn() == [SessionClosed(server.SessionId(1), "the client closed the connection")]


def test_messages_come_in_order_and_the_end_comes_after_them(loop: Loop) -> None:
    client, session_id = loop.greeted()
    said = [Report(OpId(op), {"tokens": op}) for op in range(2, 12)]
    for message in said:
        client.say(message)
    client.sock.close()
    *received, closed = loop.turn()
    assert received == [MessageReceived(session_id, message) for message in said]
    assert isinstance(closed, SessionClosed)


def test_the_slab_goes_to_the_client_as_a_descriptor(loop: Loop) -> None:
    client, session_id = loop.greeted()
    before = open_fds()
    with tempfile.TemporaryFile() as slab:
        slab.write(b"of the slab")
        slab.flush()
        loop.server.send(session_id, Ack(OpId(1)), fd=slab.fileno())
    packet = wire.receive(client.sock, wire.make_buffer(), takes_fd=True)
    assert packet is not None
    assert packet.fd is not None
    assert os.pread(packet.fd, 11, 0) == b"of the slab"
    os.close(packet.fd)
    assert open_fds() == before


def test_nothing_is_said_to_a_session_that_is_gone(loop: Loop) -> None:
    client, session_id = loop.greeted()
    client.sock.close()
    loop.turn()
    loop.server.send(session_id, Ack(OpId(1)))
    loop.server.drop(session_id, "late")
    assert loop.turn() == []


def test_fifty_clients_come_and_go_and_leave_no_descriptor(loop: Loop) -> None:
    loop.greeted()[0].sock.close()
    loop.turn()
    before = open_fds()
    for _ in range(50):
        client, _ = loop.greeted()
        client.sock.close()
        assert isinstance(loop.turn()[-1], SessionClosed)
    assert open_fds() == before


# -- who may speak -------------------------------------------------------------------------------


def refusal_of(loop: Loop, first: LocalRequest) -> str:
    client = loop.client()
    client.say(first)
    assert loop.turn() == [], "a client that is refused was never there"
    return client.hear_refusal()


def test_a_hello_for_another_process_is_refused(loop: Loop) -> None:
    reason = refusal_of(loop, hello(pid=os.getppid()))
    assert f"says pid {os.getppid()}, the socket says {os.getpid()}" in reason
    assert "runs uncached" in reason


def test_a_hello_with_the_start_of_an_older_process_of_that_pid_is_refused(loop: Loop) -> None:
    reason = refusal_of(loop, hello(start_ticks=START_TICKS - 1))
    assert f"started at tick {START_TICKS - 1}, its kernel says {START_TICKS}" in reason
    assert "runs uncached" in reason


def test_whoever_does_not_begin_with_hello_is_refused(loop: Loop) -> None:
    assert refusal_of(loop, BYE) == "Bye came before Hello"


def test_a_refusal_names_the_hello_that_it_answers(loop: Loop) -> None:
    client = loop.client()
    client.say(hello(pid=1, op=77))
    loop.turn()
    refused = client.hear()
    assert isinstance(refused, Refused)
    assert refused.op == 77


def test_another_users_process_is_refused_before_it_says_anything(make_loop: LoopFactory) -> None:
    loop = make_loop(uid=os.getuid() + 1)  # to this server we are a stranger
    client = loop.client()
    assert loop.turn() == []
    assert "may not use the NodeStore" in client.hear_refusal()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_can_not_even_connect() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        loop = Loop(Path(folder, "s"))
        try:
            script = "import os,socket,sys; os.setuid(65534); " + CONNECT_OR_SAY
            tried = subprocess.run(
                [sys.executable, "-c", script, loop.path],
                capture_output=True,
                text=True,
                check=True,
            )
            assert tried.stdout.strip() == "Permission denied"
            assert loop.turn() == []
        finally:
            loop.close()


CONNECT_OR_SAY = """
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    sock.connect(sys.argv[1])
    print("connected")
except OSError as exc:
    print(exc.strerror)
"""

SERVE_ONE_HELLO = """
import selectors, sys
from kvray.node.server import LocalServer
selector = selectors.DefaultSelector()
server = LocalServer(sys.argv[1])
server.register(selector)
print("listening", flush=True)
while not sys.stdin.closed and (ready := selector.select(10)):
    for key, mask in ready:
        if server.on_ready(key, mask):
            print("let in", flush=True)
    if not server.snapshot()["sessions"]:
        break
server.close()
"""


def test_a_client_of_another_pid_namespace_is_told_that_it_runs_uncached(tmp_path: Path) -> None:
    """The NodeStore is in a pid namespace of its own (a container), so to it we have no pid."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    with suppress(FileNotFoundError):
        if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0:
            _refused_across_pid_namespaces(tmp_path / "s", unshare)
            return
    pytest.skip("this machine does not let us make a pid namespace")


def _refused_across_pid_namespaces(path: Path, unshare: list[str]) -> None:
    with subprocess.Popen(
        [*unshare, sys.executable, "-c", SERVE_ONE_HELLO, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as node:
        assert node.stdout is not None
        assert node.stdout.readline() == "listening\n"
        client = Client(path)
        client.sock.settimeout(10)
        client.say(hello())
        reason = client.hear_refusal()
        client.sock.close()
        assert node.stdout.read() == "", "it was let in"
    assert "in another pid namespace and can not be watched; it runs uncached" in reason


# -- bad clients ---------------------------------------------------------------------------------


def send_too_much(client: Client) -> None:
    client.sock.send(bytes(MAX_MESSAGE_BYTES + 1))


def send_noise(client: Client) -> None:
    client.sock.send(bytes([FORMAT_VERSION]) + b" no message at all")


def send_other_version(client: Client) -> None:
    client.sock.send(b"\xee" + encode(BYE)[1:])


def send_an_answer(client: Client) -> None:
    client.sock.send(encode(Ack(OpId(1))))


def send_long_tag(client: Client) -> None:
    """Its error quotes what it has sent."""
    tag = b"x" * 100_000
    head = bytes([FORMAT_VERSION]) + b"\x81\xa4type\xdb"
    client.sock.send(head + len(tag).to_bytes(4, "big") + tag)


def send_a_descriptor(client: Client) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
    client.sock.sendmsg([encode(BYE)], rights)


@pytest.mark.parametrize(
    ("misbehave", "why"),
    [
        (send_too_much, "longer than"),
        (send_noise, "not a message"),
        (send_other_version, "format version 238"),
        (send_an_answer, "must not be said here"),
        (send_long_tag, "not a message"),
        (send_a_descriptor, "no descriptor"),
    ],
)
def test_a_client_that_breaks_the_protocol_is_dropped_alone(
    loop: Loop, misbehave: Callable[[Client], None], why: str
) -> None:
    good, good_session = loop.greeted()
    bad, bad_session = loop.greeted()
    before = open_fds()
    misbehave(bad)
    good.say(BYE)
    events = loop.turn()
    (closed,) = (event for event in events if event.session_id == bad_session)
    assert isinstance(closed, SessionClosed)
    assert why in closed.reason
    assert MessageReceived(good_session, BYE) in events
    assert closed.reason == bad.hear_refusal()
    loop.server.send(good_session, Ack(BYE.op))
    assert good.hear() == Ack(BYE.op)
    assert open_fds() == before - 1


def test_a_client_that_keeps_at_it_is_logged_once(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kvray.node"):
        for _ in range(5):
            client, _ = loop.greeted()
            send_noise(client)
            loop.turn()
    (record,) = caplog.records
    assert f"pid {os.getpid()}" in record.getMessage()


def test_the_reason_is_heard_even_if_the_client_has_said_more_meanwhile(loop: Loop) -> None:
    """A close with unread messages resets the connection, which would swallow the reason."""
    client, session_id = loop.greeted()
    for _ in range(20):
        client.say(BYE)
    loop.server.drop(session_id, "enough")
    assert client.hear_refusal() == "enough"
    assert loop.turn() == [SessionClosed(session_id, "enough")], "and nothing after the end"


def test_a_client_that_does_not_read_is_dropped_at_the_limit(loop: Loop) -> None:
    good, good_session = loop.greeted()
    slow, slow_session = loop.greeted()
    said = 0
    while loop.server.snapshot()["sessions"][-1]["session_id"] == slow_session:
        loop.server.send(slow_session, BIG_ANSWER)
        loop.server.check()
        said += 1
        assert said < 10_000
    (closed,) = loop.turn()
    assert closed == SessionClosed(
        slow_session, f"{server.MAX_QUEUED_MESSAGES} answers wait and are not read"
    )
    loop.server.send(good_session, Ack(OpId(1)))
    assert good.hear() == Ack(OpId(1))
    assert slow.hear() == BIG_ANSWER  # what the kernel had is still there


def test_a_client_that_is_behind_gets_everything_in_order_once_it_reads(loop: Loop) -> None:
    client, session_id = loop.greeted()
    before = open_fds()
    count = 0
    while not loop.server.snapshot()["sessions"][0]["queued_messages"]:
        loop.server.send(session_id, LookupReply(OpId(count), bytes(1_024), b""))
        count += 1
    with tempfile.TemporaryFile() as slab:
        loop.server.send(session_id, Ack(OpId(count)), fd=slab.fileno())
    loop.server.check()
    heard = [client.hear_op(), client.hear_op()]
    count += 1
    loop.server.send(session_id, Ack(OpId(count)))  # there is room for it, but it is not its turn
    buffer = wire.make_buffer()
    while len(heard) <= count:
        with suppress(BlockingIOError):
            packet = wire.receive(client.sock, buffer, takes_fd=True)
            assert packet is not None
            heard.append(decode(packet.data, max_bytes=MAX_MESSAGE_BYTES, expect=LocalAnswer).op)
            assert (packet.fd is not None) == (len(heard) == count)
            if packet.fd is not None:
                os.close(packet.fd)
        loop.turn()
    assert heard == list(range(count + 1))
    assert loop.server.snapshot()["sessions"][0]["queued_messages"] == 0
    assert loop.selector.select(0) == [], "an idle server would spin"
    assert open_fds() == before


def test_a_client_that_goes_while_answers_wait_is_closed_once(loop: Loop) -> None:
    client, session_id = loop.greeted()
    while not loop.server.snapshot()["sessions"][0]["queued_messages"]:
        loop.server.send(session_id, BIG_ANSWER)
    client.sock.close()
    (closed,) = loop.turn()
    assert isinstance(closed, SessionClosed)


# -- limits --------------------------------------------------------------------------------------


def test_one_client_too_many_is_told_so(make_loop: LoopFactory) -> None:
    loop = make_loop(max_sessions=2)
    loop.greeted()
    second, _ = loop.greeted()
    third = loop.client()
    assert loop.turn() == []
    assert third.hear_refusal() == "2 clients are connected; more can not be"
    second.sock.close()
    loop.turn()
    loop.greeted()


def test_a_client_that_never_said_hello_makes_room(
    make_loop: LoopFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(max_sessions=2)
    loop.greeted()
    silent = loop.client()
    loop.turn()
    early = loop.client()  # within the silent one's deadline
    loop.turn()
    assert "more can not be" in early.hear_refusal()
    monkeypatch.setattr(server, "HELLO_DEADLINE_S", 0.0)
    loop.greeted()
    assert "no hello" in silent.hear_refusal()


def test_without_descriptors_a_caller_is_turned_away_and_the_loop_does_not_spin(loop: Loop) -> None:
    old, _ = loop.greeted()
    client = loop.client()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        assert loop.turn() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert client.hear() is None
    old.say(BYE)
    (received,) = loop.turn()
    assert isinstance(received, MessageReceived)
    loop.greeted()


# -- the socket's file ---------------------------------------------------------------------------


def test_the_file_is_for_its_owner_only_and_goes_with_the_server(loop: Loop) -> None:
    mode = loop.path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    client, session_id = loop.greeted()
    loop.server.close()
    assert not loop.path.exists()
    assert client.hear() is None
    assert loop.server.take_events() == [SessionClosed(session_id, "the NodeStore stops")]


def test_the_file_of_a_killed_server_is_replaced(loop: Loop, make_loop: LoopFactory) -> None:
    killed = loop.path.with_name("killed")
    with wire.make_socket() as sock:
        sock.bind(str(killed))
        sock.listen()
    killed.rename(loop.path)  # what kill -9 leaves
    second = make_loop()
    assert second.greeted()
    loop.server.close()
    assert second.path.exists(), "the file is the successor's by now"
    second.greeted()


def test_a_server_that_listens_is_not_replaced(loop: Loop, make_loop: LoopFactory) -> None:
    with pytest.raises(SlabBusyError, match="listens on"):
        make_loop()
    loop.turn()
    loop.greeted()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path, make_loop: LoopFactory) -> None:
    before = open_fds()
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        make_loop()
    assert (tmp_path / "s").read_text() == "precious"
    assert open_fds() == before


def test_a_path_that_no_socket_can_have_is_an_error_with_the_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 107"):
        LocalServer(str(tmp_path / ("x" * 200)))
    with pytest.raises(ConfigError, match="No such file"):
        LocalServer("/no/such/folder/s")
