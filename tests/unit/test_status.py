"""How a node is, out of what Ray, the directory and its NodeStore say of it."""

from typing import Any

import pytest

from kvray.cluster import NodeState, NodeStatus
from kvray.cluster.status import node_status

SERVING = {"phase": "serving", "roster_version": 3, "peers_connecting": 0}
HOST = "host"


def status_of(
    host: str | None, listed: str | None, answer: dict[str, Any] | None, *, is_retired: bool = False
) -> NodeStatus:
    known = {"state": listed, "epoch": 7} if listed else None
    return node_status("a" * 56, host, known, answer, is_retired=is_retired)


@pytest.mark.parametrize(
    ("host", "listed", "answer", "state"),
    [
        (HOST, None, None, NodeState.STARTING),
        (HOST, None, {"phase": "linking"}, NodeState.STARTING),
        (HOST, "alive", {"phase": "linking"}, NodeState.STARTING),
        (HOST, "alive", SERVING, NodeState.READY),
        (HOST, "suspect", SERVING, NodeState.SUSPECT),
        (HOST, "alive", {"phase": "failed", "problem": {"text": "no room"}}, NodeState.FAILED),
        (HOST, None, {"phase": "linking", "problem": {"text": "no agent"}}, NodeState.FAILED),
        (None, None, None, NodeState.LOST),
        (None, "buried", None, NodeState.LOST),
    ],
)
def test_a_node_is_what_is_said_of_it(
    host: str | None, listed: str | None, answer: dict[str, Any] | None, state: NodeState
) -> None:
    assert status_of(host, listed, answer).state is state


def test_who_does_not_answer_is_ill_at_once_and_not_only_when_its_heartbeats_are_missed() -> None:
    killed = [status_of(HOST, said, None) for said in ("alive", "suspect", "buried")]
    assert [node.state for node in killed] == [
        NodeState.SUSPECT,
        NodeState.SUSPECT,
        NodeState.LOST,
    ]
    assert all(node.is_ill for node in killed)


def test_a_buried_node_that_speaks_again_is_starting() -> None:
    assert status_of(HOST, "buried", {"phase": "linking"}).state is NodeState.STARTING


def test_a_drained_node_is_not_ill() -> None:
    drained = status_of(HOST, "buried", None, is_retired=True)
    assert drained.state is NodeState.DRAINED
    assert not drained.is_ill


def test_start_waits_for_what_ray_may_bring_back_and_for_nothing_else() -> None:
    assert status_of(HOST, "buried", None).may_settle(3), "its NodeStore is being restarted"
    assert not status_of(None, "buried", None).may_settle(3), "its host is gone"
    assert not status_of(HOST, "alive", None).may_settle(3), "it is frozen"
    assert status_of(HOST, "alive", SERVING).is_settled(3)
    assert status_of(HOST, "alive", SERVING).may_settle(4), "it does not know the roster yet"
