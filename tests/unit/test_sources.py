"""Where the tokens of a prompt came from: each is counted once, whatever happens to the request."""

import pytest

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import strategies as st

from kvray.core.ids import BlockKey, SlabId
from kvray.core.reasons import MissReason, tokens_by_reason, tokens_by_source
from kvray.engine.sources import Prompt, TokenCounts, cause_of, failure_of
from kvray.node.client import Ticket

pytestmark = [pytest.mark.engine]

CHUNK = 128


class Counted:
    def __init__(self) -> None:
        self.counters: dict[str, int] = {}
        self.counts = TokenCounts(self.counters, chunk_tokens=CHUNK)

    @property
    def sources(self) -> dict[str, int]:
        return tokens_by_source([self.counters])

    @property
    def reasons(self) -> dict[str, int]:
        return tokens_by_reason([self.counters])

    def admit(self, prompt: Prompt, prompt_tokens: int, external_tokens: int = 0) -> None:
        self.counts.admitted(
            prompt,
            prompt_tokens=prompt_tokens,
            external_tokens=external_tokens,
            reason=MissReason.NEVER_SEEN,
        )


def test_a_prompt_that_nobody_has_is_computed_and_its_tail_could_not_be_had() -> None:
    counted = Counted()
    counted.admit(Prompt(), 1_000)
    assert counted.sources == {"device": 0, "local": 0, "peer": 0, "computed": 1_000}
    assert counted.reasons == {"never_seen": 896, "tail": 104}


def test_device_local_and_peer_are_told_apart() -> None:
    counted = Counted()
    prompt = Prompt(device_tokens=128, peer_chunk_tokens=384)
    counted.admit(prompt, 1_000, external_tokens=512)
    assert counted.sources["peer"] == 0, "not before it is there"
    counted.counts.load_ended(prompt, None)
    assert counted.sources == {"device": 128, "local": 128, "peer": 384, "computed": 360}
    assert counted.reasons == {"never_seen": 256, "tail": 104}


def test_a_load_that_fails_is_computed() -> None:
    counted = Counted()
    prompt = Prompt(peer_chunk_tokens=896)
    counted.admit(prompt, 1_000, external_tokens=896)
    counted.counts.load_ended(prompt, MissReason.PEER_GONE)
    assert counted.sources == {"device": 0, "local": 0, "peer": 0, "computed": 1_000}
    assert counted.reasons == {"peer_gone": 896, "tail": 104}


def test_a_request_that_was_preempted_is_not_counted_again() -> None:
    counted = Counted()
    prompt = Prompt()
    counted.admit(prompt, 256)
    prompt.device_tokens = 256
    counted.admit(prompt, 256)
    counted.counts.load_ended(prompt, None)
    assert counted.sources == {"device": 0, "local": 0, "peer": 0, "computed": 256}


@given(
    st.lists(
        st.tuples(*(st.integers(0, 4_000) for _ in range(4)), st.booleans()), min_size=1, max_size=8
    )
)
def test_every_prompt_token_is_counted_once(
    requests: list[tuple[int, int, int, int, bool]],
) -> None:
    counted = Counted()
    all_tokens = 0
    for prompt_tokens, device_tokens, external_tokens, peer_tokens, fails in requests:
        device = min(device_tokens, prompt_tokens)
        prompt = Prompt(device_tokens=device, peer_chunk_tokens=peer_tokens)
        counted.admit(prompt, prompt_tokens, min(external_tokens, prompt_tokens - device))
        counted.counts.load_ended(prompt, MissReason.LOAD_FAILED if fails else None)
        all_tokens += prompt_tokens
    assert sum(counted.sources.values()) == all_tokens
    assert sum(counted.reasons.values()) == counted.sources["computed"]


def test_a_report_says_what_has_been_added_and_what_can_be_added_up() -> None:
    counted = Counted()
    counted.counters["longest_wait_ms"] = 70
    counted.admit(Prompt(), 256)
    assert counted.counts.take_grown() == {"computed_tokens": 256, "miss_tokens_never_seen": 256}
    assert counted.counts.take_grown() == {}
    counted.admit(Prompt(), 128)
    assert counted.counts.take_grown() == {"computed_tokens": 128, "miss_tokens_never_seen": 128}


def test_what_vllm_is_told_in_each_step_is_what_came_since_the_last() -> None:
    counted = Counted()
    assert counted.counts.take_fresh() == {}
    prompt = Prompt(device_tokens=128, peer_chunk_tokens=128)
    counted.admit(prompt, 300, external_tokens=128)
    assert counted.counts.take_fresh() == {
        "hit_tokens_device": 128,
        "computed_tokens": 44,
        "miss_tokens_tail": 44,
    }
    counted.counts.load_ended(prompt, None)
    assert counted.counts.take_fresh() == {"hit_tokens_peer": 128}
    assert counted.counts.take_fresh() == {}
    assert counted.counts.take_grown()["hit_tokens_device"] == 128, "its node is told by itself"


def ticket() -> Ticket:
    return Ticket([BlockKey(bytes(16))] * 3, SlabId(bytes(16)))


def test_the_cause_is_that_of_the_first_miss() -> None:
    asked = ticket()
    assert cause_of(asked) is MissReason.NODE_STORE_SLOW
    asked.answered = True
    assert cause_of(asked) is MissReason.TAIL, "nothing is missing"
    asked.causes = {2: MissReason.DEADLINE, 1: MissReason.EVICTED}
    assert cause_of(asked) is MissReason.EVICTED
    assert failure_of(asked) is MissReason.EVICTED
    lost = ticket()
    lost.lose()
    assert cause_of(lost) is MissReason.NO_NODE_STORE


def test_a_load_that_failed_though_all_was_there_is_the_copys_fault() -> None:
    assert failure_of(None) is MissReason.LOAD_FAILED
    asked = ticket()
    asked.answered = True
    assert failure_of(asked) is MissReason.LOAD_FAILED
