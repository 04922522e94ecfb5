"""Goal: what a detach, a switch-off and new weights leave behind, one story each. Method: see
tests.seam; that nothing waits and nothing is lost is looked at by test_seam.
"""

from concurrent.futures import Future

import pytest

pytest.importorskip("vllm")

from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from kvray.core.ids import SlotState
from kvray.engine.ledger import JobKind
from tests.seam.events import switch_off, worker_switches_off
from tests.seam.pairs import finish
from tests.seam.states import (
    NAME,
    STORED,
    World,
    aborted_while_loading,
    answered_early,
    in_prefill,
    load_reported,
    loading,
    not_asked,
    prompt,
    unknown,
    waited_for,
)

pytestmark = [pytest.mark.engine]


def stored_chunks(world: World) -> int:
    return world.engine.connector.lookups.counters["stored_chunks"]


def lookups(world: World) -> int:
    return world.engine.connector.lookups.counters["lookups"]


# -- detach ----------------------------------------------------------------------------------------


def test_nothing_begins_to_load_between_the_two_calls_of_a_detach(world: World) -> None:
    answered_early(world)
    assert world.engine.drain() == 0
    assert world.engine.step(ends=False) == len(prompt())
    assert not world.engine.copies


def test_a_detach_does_nothing_while_a_load_is_under_way(world: World) -> None:
    loading(world)
    assert world.engine.drain() == 1
    assert world.engine.detach() == 1
    assert world.engine.attached() is not None
    world.engine.step()
    assert world.engine.detach() == 0
    assert finish(world.engine) == 0


def test_a_load_that_was_reported_is_over_before_the_connector_goes(world: World) -> None:
    """vLLM's scheduler comes to it in a later step, and asserts that there is a connector then."""
    load_reported(world)
    assert world.engine.detach() == 0
    assert world.status() is RequestStatus.WAITING
    world.engine.step()
    assert not world.engine.unfinished()


def test_a_detach_that_waits_no_longer_lets_a_load_be_computed(world: World) -> None:
    loading(world)
    assert world.engine.detach(at_any_rate=True) == 0
    assert world.status() is RequestStatus.WAITING
    assert world.engine.lost_device_blocks() == 0
    assert world.engine.step() == len(prompt())


def test_a_detach_frees_the_blocks_of_what_was_aborted_under_a_load(world: World) -> None:
    aborted_while_loading(world)
    assert world.engine.lost_device_blocks() > 0
    assert world.engine.detach(at_any_rate=True) == 0
    assert world.engine.lost_device_blocks() == 0
    assert not world.engine.scheduler.requests


def test_reports_of_steps_under_way_reach_no_scheduler_without_a_connector(world: World) -> None:
    """Goal: with steps in a queue (async scheduling) the report of a load that a detach has given
    up comes later.
    """
    loading(world)
    step: Future[ModelRunnerOutput] = Future()
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    output.kv_connector_output = KVConnectorOutput(finished_recving={NAME})
    step.set_result(output)
    world.engine.core.batch_queue = [(step, None, None)]
    world.engine.detach(at_any_rate=True)
    assert output.kv_connector_output is None
    assert finish(world.engine) == 0


def test_slots_that_were_being_written_are_given_back_by_a_detach(world: World) -> None:
    in_prefill(world)
    assert world.engine.detach(at_any_rate=True) == 0
    assert world.engine.store.lost_slots() == 0


# -- switch-off ------------------------------------------------------------------------------------


def test_what_is_held_when_kvray_switches_itself_off_is_computed(world: World) -> None:
    not_asked(world)
    switch_off(world)
    world.engine.step()
    world.engine.step()  # two prompts are more than a step takes
    assert not world.engine.unfinished()


def test_what_waits_for_others_when_kvray_switches_itself_off_gives_its_pins_back(
    world: World,
) -> None:
    waited_for(world)
    assert world.engine.store.pins() > 0
    switch_off(world)
    world.engine.wait_heard()
    assert world.engine.store.pins() == 0


def test_a_kvray_that_is_off_stores_nothing_and_gives_its_slots_back(world: World) -> None:
    in_prefill(world)
    before = stored_chunks(world)
    switch_off(world)
    finish(world.engine)
    for _ in range(3):
        world.engine.step()
    assert stored_chunks(world) == before
    assert world.engine.connector.pending() == 0
    assert not world.engine.connector.has_pending_push_work()
    world.engine.wait_left()
    states = world.engine.store.slab.headers["state"]
    assert set(states.tolist()) <= {SlotState.ABSENT, SlotState.READY}


def test_a_reservation_that_a_bug_has_lost_does_not_hold_up_others(world: World) -> None:
    """Goal: a key that is being written is waited for. If nobody will ever commit it, whoever asks
    for it would wait for its whole deadline each time.
    """
    in_prefill(world)
    ledger = world.engine.connector._ledger  # noqa: SLF001
    assert ledger.subjects(JobKind.STORE)
    ledger._open.clear()  # noqa: SLF001 (as if the bug had come before it was noted)
    switch_off(world)
    finish(world.engine)
    world.engine.wait_left()
    states = world.engine.store.slab.headers["state"]
    assert SlotState.WRITING not in states.tolist()


def test_a_worker_that_is_off_ends_the_look_ups_of_its_engine(world: World) -> None:
    loading(world)
    worker_switches_off(world)
    world.engine.step()
    assert world.engine.connector.switch.off == "in a worker: a bug"
    assert finish(world.engine) == 0
    before = lookups(world)
    world.engine.add("next", prompt())
    assert world.engine.step() == 0 or not world.engine.copies
    assert finish(world.engine) == 0
    assert lookups(world) == before


# -- new weights -----------------------------------------------------------------------------------


def test_what_is_held_at_a_change_and_cached_after_it_is_stored_under_no_name(
    world: World,
) -> None:
    """Goal: the device caches nothing when the weights change, but a load that has ended is on its
    way into its cache.
    """
    load_reported(world)
    world.engine.change_weights()
    assert finish(world.engine) == 0
    before = stored_chunks(world)
    world.engine.add("new", [*STORED, *[6] * 200])
    world.settle()
    assert stored_chunks(world) == before, "KV of old weights under the name of the new ones"

    assert world.engine.reset_device_cache()
    world.engine.add("newer", [*STORED, *[7] * 200])
    world.settle()
    assert stored_chunks(world) > before


def test_a_reset_that_a_request_has_kept_from_succeeding_proves_nothing(world: World) -> None:
    load_reported(world)
    world.engine.change_weights()
    assert not world.engine.reset_device_cache()
    assert world.engine.connector.lookups.tainted


def test_what_waits_without_blocks_at_a_change_taints_nothing(world: World) -> None:
    answered_early(world)
    world.engine.change_weights()
    assert not world.engine.connector.lookups.tainted
    before = stored_chunks(world)
    world.engine.add("new", unknown(300))
    world.settle()
    assert stored_chunks(world) == before + 2


# -- preemption ------------------------------------------------------------------------------------


def test_what_was_preempted_between_two_steps_may_be_loaded_in_the_next(world: World) -> None:
    """vLLM tells its connector of the preemption in the very step in which the load has begun."""
    world.engine.add(NAME, unknown(500), answer_tokens=20)
    for _ in range(4):
        world.engine.step()
    world.engine.wait_heard()
    world.engine.preempt()
    assert world.engine.scheduler.reset_prefix_cache()
    world.engine.step(ends=False)
    assert world.status() is RequestStatus.WAITING_FOR_REMOTE_KVS
    assert finish(world.engine) == 0
