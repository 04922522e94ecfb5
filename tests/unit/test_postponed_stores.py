"""A NodeStore that is late with a reservation costs no store: the chunks are offered again.

Method: an OffloadingManager whose client answers as the test says; each offer is one step of vLLM.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import OffloadKey, ReqContext, make_offload_key

from kvray.config import EngineConfig
from kvray.core.ids import OpId, SlabId
from kvray.core.messages import Grant
from kvray.engine.lookups import MAX_POSTPONED_STEPS, Lookups
from kvray.node.client import Reservation

pytestmark = [pytest.mark.engine]

KEYS = [make_offload_key(bytes([n]) * 32, 0) for n in range(3)]
CONTEXT = ReqContext(req_id="a")


@dataclass
class ReservingClient:
    """Of NodeClient only what a store needs."""

    answers_in_time: bool = True
    session: object = field(default_factory=object)

    def reserve(self, keys: Any, **_settings: Any) -> Reservation | None:
        if not self.answers_in_time:
            return None
        places = {i: (i, 1, i * 4_096) for i in range(len(keys))}
        return Reservation(OpId(1), SlabId(bytes(16)), bytes([Grant.GRANTED] * len(keys)), places)


@dataclass
class Engine:
    client: ReservingClient
    lookups: Lookups

    def offer(self, *keys: OffloadKey) -> int | None:
        """How many of these are stored; None if vLLM is to offer them again."""
        output = self.lookups.prepare_store(keys, CONTEXT)
        return None if output is None else len(list(output.keys_to_store))

    @property
    def dropped(self) -> int:
        return self.lookups.counters["dropped_chunks"]


@pytest.fixture
def engine() -> Engine:
    client = ReservingClient()
    lookups = Lookups(config=EngineConfig(), tokens_per_chunk={0: 128})
    client_for_it: Any = client
    lookups.open(client_for_it, {})
    lookups.slot_bytes = {0: 4_096}
    lookups.on_new_request(CONTEXT)
    return Engine(client, lookups)


def test_chunks_that_got_no_answer_are_stored_in_the_next_step(engine: Engine) -> None:
    engine.client.answers_in_time = False
    assert engine.offer(*KEYS[:2]) is None
    engine.client.answers_in_time = True
    assert engine.offer(*KEYS) == 3
    engine.lookups.on_request_finished(CONTEXT)
    assert engine.dropped == 0


def test_after_a_few_steps_they_are_dropped_and_counted_once(engine: Engine) -> None:
    engine.client.answers_in_time = False
    for _ in range(MAX_POSTPONED_STEPS):
        assert engine.offer(*KEYS) is None
    assert engine.offer(*KEYS) == 0
    engine.lookups.on_request_finished(CONTEXT)
    assert engine.dropped == 3


def test_a_request_that_ends_meanwhile_has_dropped_them(engine: Engine) -> None:
    engine.client.answers_in_time = False
    assert engine.offer(*KEYS) is None
    engine.lookups.on_request_finished(CONTEXT)
    assert engine.dropped == 3
