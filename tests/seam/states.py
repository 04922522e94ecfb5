"""Each state of a request's life at the seam, and how it is brought about: STATES.

What a request of prompt() finds in the slab are two chunks; another engine is at work on the two
that follow them in longer(). Every request here is called NAME; others are beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm.v1.request import RequestStatus

from kvray.engine.requests import RequestState
from tests.seam.engine import CHUNK_TOKENS, PART_BYTES, RANKS, SeamEngine

NAME = "request"
STORED = list(range(1_000, 1_000 + 2 * CHUNK_TOKENS))


def prompt() -> list[int]:
    return [*STORED, *[5] * 50]


def longer() -> list[int]:
    return [*STORED, *range(5_000, 5_000 + 2 * CHUNK_TOKENS), *[5] * 50]


def unknown(tokens: int) -> list[int]:
    return list(range(9_000, 9_000 + tokens))


@dataclass
class World:
    engine: SeamEngine
    waits_for_others: bool = field(default=False)  # for room, which is not for kvray to give

    def fill_slab(self) -> None:
        """The chunks of STORED are READY, and the device has forgotten them."""
        self.engine.add("before", [*STORED, 1])
        self.settle()
        assert self.engine.scheduler.reset_prefix_cache()

    def settle(self) -> None:
        while self.engine.unfinished():
            self.engine.step()
        for _ in range(3):  # what has just finished is stored, and that reported
            self.engine.step()
        self.engine.wait_heard()

    def add_longer(self) -> None:
        request = self.engine.add("its keys", longer())
        keys = self.engine.chunk_keys(request)[2:]
        self.engine.abort("its keys")
        other = self.engine.store.other(self.engine.connector.lookups.namespace)
        self.engine.store.begin_writing(other, keys, PART_BYTES * RANKS)
        self.engine.add(NAME, longer())

    def add_loading(self) -> None:
        self.engine.add(NAME, prompt())
        self.engine.step(ends=False)
        assert self.status() is RequestStatus.WAITING_FOR_REMOTE_KVS

    def status(self) -> RequestStatus:
        status = self.engine.scheduler.requests[NAME].status
        assert isinstance(status, RequestStatus)
        return status

    def is_in(self, state: RequestState) -> bool:
        view = self.engine.connector.lookups.view_of(NAME)
        return view is not None and view.state is state


def answered_early(world: World) -> None:
    world.engine.add(NAME, prompt())
    assert world.is_in(RequestState.EARLY)


def missed_early(world: World) -> None:
    world.engine.add(NAME, unknown(300))
    assert world.is_in(RequestState.EARLY)


def early_and_waited_for(world: World) -> None:
    world.add_longer()
    assert world.is_in(RequestState.EARLY)


def not_asked(world: World) -> None:
    """The NodeStore waits for a core: an answer is late, and the next question is put off."""
    store = world.engine.store
    store.freeze()
    world.engine.add("late", unknown(300))
    world.engine.add(NAME, prompt())
    world.engine.step()
    assert world.is_in(RequestState.UNASKED)
    store.thaw()


def waited_for(world: World) -> None:
    world.add_longer()
    world.engine.step()
    assert world.is_in(RequestState.ASKED)
    assert world.status() is RequestStatus.WAITING


def answered_without_room(world: World) -> None:
    """The device has no blocks for what was found."""
    world.engine.add("large", unknown(1_700), answer_tokens=40)
    for _ in range(5):
        world.engine.step()
    world.engine.add(NAME, prompt())
    world.engine.step()
    assert world.is_in(RequestState.ASKED)
    assert world.status() is RequestStatus.WAITING
    world.waits_for_others = True


def loading(world: World) -> None:
    world.add_loading()
    assert world.is_in(RequestState.LOADING)


def loaded_by_one_rank(world: World) -> None:
    world.add_loading()
    world.engine.report(ranks=1)
    assert world.is_in(RequestState.LOADING)


def load_reported(world: World) -> None:
    """The scheduler has not come to it again."""
    world.add_loading()
    world.engine.report()
    assert world.is_in(RequestState.OPEN)
    assert world.status() is RequestStatus.WAITING_FOR_REMOTE_KVS


def failed_load_reported(world: World) -> None:
    world.add_loading()
    world.engine.fail_loads()
    world.engine.report()
    assert world.is_in(RequestState.MISSING)


def loading_under_new_weights(world: World) -> None:
    world.add_loading()
    world.engine.change_weights()
    assert world.is_in(RequestState.LOADING_BARRED)


def aborted_while_loading(world: World) -> None:
    world.add_loading()
    world.engine.abort(NAME)
    world.engine.step(ends=False)
    assert world.is_in(RequestState.LEFT)


def overdue_and_loading(world: World) -> None:
    """What had come by the deadline is loaded."""
    world.add_longer()
    while world.status() is RequestStatus.WAITING:
        world.engine.step(ends=False)
    assert world.is_in(RequestState.LOADING)


def in_prefill(world: World) -> None:
    """Some chunks computed, stores under way."""
    world.engine.add(NAME, unknown(1_200))
    world.engine.step(ends=False)
    world.engine.step(ends=False)
    assert world.status() is RequestStatus.RUNNING
    assert world.engine.copies


def decoding(world: World) -> None:
    world.engine.add(NAME, unknown(500), answer_tokens=20)
    for _ in range(4):
        world.engine.step(ends=False)
    assert world.status() is RequestStatus.RUNNING
    assert world.engine.copies


def preempted(world: World) -> None:
    """Its stores are still under way."""
    decoding(world)
    world.engine.preempt()
    assert world.status() is RequestStatus.PREEMPTED


def loading_after_preemption(world: World) -> None:
    """What it had stored itself comes back."""
    decoding(world)
    world.engine.step()
    world.engine.wait_heard()
    world.engine.preempt()
    assert world.engine.scheduler.reset_prefix_cache()
    for _ in range(10):
        world.engine.step(ends=False)
        if world.status() is RequestStatus.WAITING_FOR_REMOTE_KVS:
            break
    assert world.is_in(RequestState.LOADING)


def finished_while_storing(world: World) -> None:
    world.engine.add(NAME, unknown(500))
    for _ in range(3):
        world.engine.step(ends=False)
    assert not world.engine.unfinished()
    assert world.engine.copies


STATES: tuple[Callable[[World], None], ...] = (
    answered_early,
    missed_early,
    early_and_waited_for,
    not_asked,
    waited_for,
    answered_without_room,
    loading,
    loaded_by_one_rank,
    load_reported,
    failed_load_reported,
    loading_under_new_weights,
    aborted_while_loading,
    overdue_and_loading,
    in_prefill,
    decoding,
    preempted,
    loading_after_preemption,
    finished_while_storing,
)
