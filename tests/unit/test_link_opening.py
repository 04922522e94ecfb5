"""Goal: a NodeStore without a link tries again, soon and not too often, and never keeps its lock
from the one that comes after it.

Method: LinkOpening in virtual time; the end of a NodeStore in a process of its own.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from kvray.actors import BUG_EXIT_CODE
from kvray.core.ids import Epoch
from kvray.errors import LinkError
from kvray.link.base import Link
from kvray.link.loopback import LoopbackLink, LoopbackNetwork
from kvray.node import link_opening
from kvray.node.link_loop import LinkFailed, LinkLoop, OpenLink
from kvray.node.link_opening import DEADLINE_MS, FIRST_PAUSE_MS, LAST_PAUSE_MS, LinkOpening
from kvray.node.scratch import HeaderScratch
from tests.contract.link_contract import Memory
from tests.slabs import NODE, Host

TEN_SECONDS_MS = 10_000


class Asked:
    """When a link was asked for, in virtual time."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.at_ms: list[int] = []
        self.opening = LinkOpening(self._ask)

    def _ask(self, epoch: Epoch) -> None:
        assert epoch == 7
        self.at_ms.append(self.now_ms)

    def fail_until(self, until_ms: int) -> None:
        """Each attempt fails at once."""
        while self.now_ms < until_ms:
            self.opening.on_failed("no agent", self.now_ms)
            next_ms = self.opening.next_ms()
            assert next_ms is not None
            self.now_ms = next_ms
            self.opening.on_tick(self.now_ms)


def test_it_is_tried_again_more_and_more_seldom_but_at_least_each_second() -> None:
    asked = Asked()
    asked.opening.begin(Epoch(7), 0)
    asked.fail_until(TEN_SECONDS_MS)
    pauses_ms = [b - a for a, b in zip(asked.at_ms, asked.at_ms[1:], strict=False)]
    assert pauses_ms[0] == FIRST_PAUSE_MS
    assert pauses_ms == sorted(pauses_ms)
    assert max(pauses_ms) == LAST_PAUSE_MS
    assert len(asked.at_ms) < 2 * TEN_SECONDS_MS / LAST_PAUSE_MS
    assert str(asked.opening.problem) == "no agent"
    assert asked.opening.on_opened() == 7
    assert asked.opening.problem is None
    assert asked.opening.next_ms() is None


def test_an_answer_that_does_not_come_is_the_end_of_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(link_opening, "die", reasons.append)
    asked = Asked()
    asked.opening.begin(Epoch(7), 0)
    asked.opening.on_tick(DEADLINE_MS - 1)
    assert not reasons
    asked.opening.on_tick(DEADLINE_MS)
    assert len(reasons) == 1


def test_a_link_that_can_not_be_used_is_given_back() -> None:
    network, events = LoopbackNetwork(), list[object]()
    memory = Memory(1 << 16)
    scratch = HeaderScratch(1)
    loop = LinkLoop(
        slab_address=memory.address,
        slab_bytes=memory.length_bytes,
        on_event=events.append,
        scratch=scratch,
    )

    def make() -> Link:
        return _Refusing("me@1", network=network)

    loop.do(OpenLink(make), 0)
    (failed,) = events
    assert isinstance(failed, LinkFailed)
    assert not network.links, "an agent is left behind, one more with each attempt"


class _Refusing(LoopbackLink):
    """Takes no memory."""

    def register(self, address: int, length_bytes: int) -> None:
        raise LinkError(f"planted: {length_bytes} bytes at {address:#x} can not be registered")


GIVES_BACK = """
import sys
from pathlib import Path
from kvray.config import Config
from kvray.node.loop import NodeLoop
from kvray.node.slab import SlabOwner
from tests.slabs import GEOMETRY, NODE

cluster, runtime = sys.argv[1:]
slab = SlabOwner.open(cluster, NODE, GEOMETRY, lock_mode="off", runtime=Path(runtime))
loop = NodeLoop(Config(cluster_name=cluster, runtime_dir=runtime), NODE)
loop._give_back(slab, unmap=False)
print("the process lives on, and its lock with it")
"""


def test_a_node_whose_reads_have_not_ended_gives_its_lock_back_by_ending(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    host = Host(tmp_path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", GIVES_BACK, host.cluster, str(tmp_path)],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == BUG_EXIT_CODE, done.stdout + done.stderr
        assert host.open(NODE).adopted, "the next one finds the slab, and may have it"
    finally:
        host.close()
