"""What may happen to a request at any moment of its life: EVENTS."""

import socket
import time
from collections.abc import Callable
from typing import Any

from tests.seam.engine import LOOKUP_DEADLINE_MS
from tests.seam.states import NAME, World

DETACH_ROUNDS = 20  # of an engine whose ranks report; the front end waits for longer


def nothing(world: World) -> None:
    """The control."""


def detach(world: World) -> None:
    """As the front end does: a step is taken between its calls, in which something may begin."""
    world.engine.drain()
    world.engine.step(ends=False)
    for _ in range(DETACH_ROUNDS):
        if world.engine.detach() == 0:
            return
        world.engine.step()
    raise AssertionError("what is under way does not end")


def detach_while_ranks_are_silent(world: World) -> None:
    world.engine.drain()
    world.engine.step(ends=False)
    world.engine.detach()
    if world.engine.attached() is not None:
        world.engine.detach(at_any_rate=True)
    assert world.engine.attached() is None


def switch_off(world: World) -> None:
    """A bug in kvray's half of EngineCore."""
    world.engine.connector._count(None, 0)  # noqa: SLF001
    assert world.engine.connector.switch.off


def worker_switches_off(world: World) -> None:
    world.engine.fail_loads()
    world.engine.fault = "a bug"


def abort(world: World) -> None:
    world.engine.abort(NAME)


def preempt(world: World) -> None:
    world.engine.preempt()


def kill_node_store(world: World) -> None:
    world.engine.store.kill()


def restart_node_store(world: World) -> None:
    world.engine.store.kill()
    world.engine.store.start()


def freeze_node_store(world: World) -> None:
    world.engine.store.freeze()


def lose_session(world: World) -> None:
    def hang_up(serving: Any) -> None:
        for session in serving._server._sessions.values():  # noqa: SLF001
            session.sock.shutdown(socket.SHUT_RDWR)

    world.engine.store.ask(hang_up)


def change_weights(world: World) -> None:
    world.engine.change_weights()


def reset_device_cache(world: World) -> None:
    """It fails while a request holds blocks, and that is an answer."""
    world.engine.scheduler.reset_prefix_cache()


def reset_both_caches(world: World) -> None:
    world.engine.scheduler.reset_prefix_cache(reset_connector=True)


def fail_loads(world: World) -> None:
    world.engine.fail_loads()


def deadline(world: World) -> None:
    time.sleep(LOOKUP_DEADLINE_MS / 1_000)


EVENTS: tuple[Callable[[World], None], ...] = (
    nothing,
    detach,
    detach_while_ranks_are_silent,
    switch_off,
    worker_switches_off,
    abort,
    preempt,
    kill_node_store,
    restart_node_store,
    freeze_node_store,
    lose_session,
    change_weights,
    reset_device_cache,
    reset_both_caches,
    fail_loads,
    deadline,
)
