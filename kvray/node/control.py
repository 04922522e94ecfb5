"""The NodeStore's calls to other actors: to the directory, and a knock at a peer's door.

    loop ──call, wake──▶ queue ──▶ this thread ──Ray──▶ directory, peers
    loop ◀──deliver──── Ray's callback thread ◀── answer or failure

A thread of its own, because finding an actor may block for seconds while Ray's control store is
away, and the loop answers engines. No call is waited for here; deadlines are the loop's.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import ray
from ray.exceptions import RayError

from kvray.actors import RAY_NAMESPACE, directory_name, node_store_name
from kvray.core.codec import encode
from kvray.core.messages import Announce, Locate, NodeHello
from kvray.errors import KVRayError

logger = logging.getLogger("kvray.node")

# Calls that have not ended. The core makes one announce at a time, again after half a second, and
# as many locates as it may wait for: more means that Ray is stuck, and each is a miss anyway.
MAX_CALLS = 128
BYE_DEADLINE_S = 1.0  # a directory that does not hear it buries us a moment later
JOIN_DEADLINE_S = 5.0  # at the end; a thread that Ray holds up any longer is left behind

DirectoryCall = NodeHello | Announce | Locate
_METHODS: dict[type[DirectoryCall], str] = {
    NodeHello: "hello",
    Announce: "announce",
    Locate: "locate",
}


@dataclass(frozen=True, slots=True)
class DirectoryAnswered:
    """data is what came back, not decoded yet."""

    call_id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class DirectoryFailed:
    call_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Call:
    call_id: int
    message: DirectoryCall


@dataclass(frozen=True, slots=True)
class _Wake:
    node_id: str


Deliver = Callable[[DirectoryAnswered | DirectoryFailed], None]  # from any thread, must not block


class Control(threading.Thread):
    """One per NodeStore. call, wake and close may be called from any thread and do not block."""

    def __init__(self, cluster_name: str, deliver: Deliver) -> None:
        super().__init__(name="kvray-control", daemon=True)
        self._cluster_name = cluster_name
        self._deliver = deliver
        self._queue: SimpleQueue[_Call | _Wake | None] = SimpleQueue()
        self._directory: Any = None  # a handle; None after a failure: look for it again
        self._peers: dict[str, Any] = {}
        self._refusal = ""  # the last one, so that it is said once
        self._unended: set[int] = set()  # single operations on a set are atomic under the GIL

    def call(self, call_id: int, message: DirectoryCall) -> None:
        """Ends in one DirectoryAnswered or DirectoryFailed, unless Ray never says anything."""
        if len(self._unended) >= MAX_CALLS:
            self._deliver(DirectoryFailed(call_id, f"{MAX_CALLS} calls have not ended"))
            return
        self._unended.add(call_id)
        self._queue.put(_Call(call_id, message))

    def wake(self, node_id: str) -> None:
        """Tell a peer's NodeStore that it is about to be read from. Nothing comes back."""
        self._queue.put(_Wake(node_id))

    def forget(self, node_id: str) -> None:
        """A peer is gone."""
        self._peers.pop(node_id, None)

    def say_bye(self, node_id: str, epoch: int) -> None:
        """At the end, on the caller's thread: the directory forgets this node at once."""
        with suppress(ValueError, RayError):
            name = directory_name(self._cluster_name)
            directory = ray.get_actor(name, namespace=RAY_NAMESPACE)
            ray.get(directory.bye.remote(node_id, epoch), timeout=BYE_DEADLINE_S)

    def close(self) -> None:
        self._queue.put(None)
        self.join(JOIN_DEADLINE_S)

    def run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, _Call):
                self._call(item)
            else:
                self._wake(item)

    def _call(self, call: _Call) -> None:
        try:
            if self._directory is None:
                self._directory = ray.get_actor(
                    directory_name(self._cluster_name), namespace=RAY_NAMESPACE
                )
            method = getattr(self._directory, _METHODS[type(call.message)])
            answer = method.remote(encode(call.message))
        except (ValueError, RayError) as exc:  # ValueError: there is no actor of that name
            self._fail(call.call_id, exc)
            return
        answer.future().add_done_callback(partial(self._ended, call.call_id))

    def _ended(self, call_id: int, future: "Future[bytes]") -> None:
        """On Ray's own thread."""
        self._unended.discard(call_id)
        error = future.exception()
        if error is None:
            self._deliver(DirectoryAnswered(call_id, future.result()))
        else:
            self._fail(call_id, error)

    def _fail(self, call_id: int, error: BaseException) -> None:
        self._directory = None
        self._unended.discard(call_id)
        # Ray's error for something that was raised over there is of the same type, too.
        reason = str(getattr(error, "cause", error))
        if isinstance(error, KVRayError) and reason != self._refusal:
            self._refusal = reason
            logger.warning("the directory refuses this node: %s", reason)
        self._deliver(DirectoryFailed(call_id, f"{type(error).__name__}: {reason}"))

    def _wake(self, wake: _Wake) -> None:
        try:
            peer = self._peers.get(wake.node_id)
            if peer is None:
                name = node_store_name(self._cluster_name, wake.node_id)
                peer = self._peers[wake.node_id] = ray.get_actor(name, namespace=RAY_NAMESPACE)
            peer.wake.remote()
        except (ValueError, RayError):
            # The read that this knock was for finds out by itself, at its deadline.
            self.forget(wake.node_id)
