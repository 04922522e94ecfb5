"""An engine allows an audit only while its audits have cost half a percent of its prefill.

Method: an OffloadingManager and a client that notes what it was asked, and whose tickets the test
settles.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import ReqContext, make_offload_key

from kvray.config import EngineConfig
from kvray.core.ids import SlabId
from kvray.core.messages import KeyState
from kvray.core.reasons import COMPUTED, MissReason
from kvray.engine.lookups import Lookups
from kvray.engine.requests import Run
from kvray.node.client import Ticket

pytestmark = [pytest.mark.engine]

FULL, WINDOW = 0, 1  # cache groups
CHUNKS = 4


@dataclass
class NotingClient:
    """Of NodeClient only what a look-up needs. allowed: of each look-up, whether it was."""

    allowed: list[bool] = field(default_factory=list)
    session: None = None  # nothing is reported
    may_answer_soon: bool = False
    is_mute: bool = False

    def lookup(self, keys: Any, *, may_audit: bool, **_settings: Any) -> Ticket | None:
        self.allowed.append(may_audit)
        return None if self.is_mute else Ticket(keys, SlabId(bytes(16)))

    def unpin(self, ticket: Ticket) -> None:
        ticket.release()


class Engine:
    def __init__(self, *, groups: int = 1) -> None:
        self.client = NotingClient()
        self.groups = groups
        tokens = dict.fromkeys(range(groups), 128)
        self.lookups = Lookups(config=EngineConfig(), tokens_per_chunk=tokens)
        client: Any = self.client
        self.lookups.open(client, {})
        self.lookups.slot_bytes = dict.fromkeys(range(groups), 4_096)

    def computes(self, tokens: int) -> None:
        self.lookups.counters[COMPUTED] += tokens

    def asks(self, name: str, *, costs_a_chunk: bool = True) -> bool:
        """Whether its look-up may be audited."""
        self.lookups.on_new_request(ReqContext(req_id=name))
        self.lookups.begin(
            name,
            [
                Run(group, _keys(group), is_prefix=group == FULL)
                for group in (FULL, WINDOW)[: self.groups]
            ],
            may_audit=costs_a_chunk,
        )
        return self.client.allowed[-1]

    def ends(self, name: str, *, is_audited: bool = False) -> None:
        view = self.lookups.view_of(name)
        assert view is not None
        if is_audited:
            assert view.ticket is not None
            view.ticket.states[-1] = KeyState.MISS
            view.ticket.causes[CHUNKS - 1] = MissReason.AUDITED
        self.lookups.on_request_finished(ReqContext(req_id=name))


def _keys(group: int) -> list[Any]:
    return [make_offload_key(bytes([n]) * 32, group) for n in range(CHUNKS)]


def test_two_hundred_chunks_must_be_computed_for_one_that_is_computed_again() -> None:
    engine = Engine()
    engine.computes(200 * 128 - 1)
    assert not engine.asks("early")
    engine.computes(1)
    assert engine.asks("a")
    engine.ends("a", is_audited=True)
    engine.computes(200 * 128 - 1)
    assert not engine.asks("b")
    engine.computes(1)
    assert engine.asks("c")


def test_a_look_up_that_was_not_audited_gives_back_what_it_might_have_cost() -> None:
    engine = Engine()
    engine.computes(200 * 128)
    assert engine.asks("a")
    assert not engine.asks("beside it"), "both might be audited"
    engine.ends("a")
    assert engine.asks("b")
    engine.ends("b")
    assert not engine.asks("behind half a chunk", costs_a_chunk=False)
    engine.ends("behind half a chunk")
    engine.client.is_mute = True
    assert engine.asks("nobody hears it")
    engine.client.is_mute = False
    assert engine.asks("c")


def test_in_a_hybrid_model_the_whole_hit_may_be_lost() -> None:
    engine = Engine(groups=2)
    engine.computes(CHUNKS * 200 * 128 - 1)
    assert not engine.asks("a")
    engine.computes(1)
    assert engine.asks("b")
