"""The life of a NodeStore, in a thread of its own.

    OPENING ──slab──▶ LINKING ──link──▶ SERVING ──stop──▶ STOPPED
       ▲ │               ▲──new epoch──┘
       │ └─the slab does not fit, or is another's
       │         ▼
       └──RETRY_S── FAILED

From LINKING on engines are served, from SERVING on peers too. A link that can not be opened keeps a
NodeStore in LINKING, which tries again (node.link_opening): slab and lock are given back at the end
only, since a read that has not ended may still write into the slab.

What can not be now may be possible later (memory that comes free, a predecessor that ends), and an
actor that dies of it would only be started again by Ray, without end: so a NodeStore that can not
serve says why, and tries again. A bug ends the process, and Ray starts the actor anew, in a new
epoch and with every READY block.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from enum import StrEnum
from typing import Any

from ray.exceptions import RayError

from kvray import __version__
from kvray.actors import alive_nodes, die, ending_on_bug, keep_what_is_loaded
from kvray.config import Config, default_runtime_dir
from kvray.core.eviction import policy_named
from kvray.core.ids import BlockKey, Epoch, NodeId
from kvray.core.layout import FORMAT_VERSION
from kvray.core.messages import NodeInfo
from kvray.core.store import StoreCore
from kvray.errors import KVRayError, LinkError, NodeLostError, SlabError
from kvray.link.base import Link
from kvray.network import ucx_devices
from kvray.node.control import Control
from kvray.node.host import host_facts
from kvray.node.inbox import Inbox, Question
from kvray.node.measuring import DEADLINE_MS, Measured
from kvray.node.opening import left_behind, open_slab, sweep_dead_nodes
from kvray.node.peers import LinkThread
from kvray.node.server import LocalServer
from kvray.node.serving import Serving, clock_ms
from kvray.node.slab import SlabOwner
from kvray.node.slab_file import runtime_directory
from kvray.node.spans import open_spans

logger = logging.getLogger("kvray.node")

RETRY_S = 5.0  # between attempts to start
QUESTION_DEADLINE_S = 5.0  # the loop's longest step is far below; a longer silence is worth saying


class Phase(StrEnum):
    """See the picture in the module's docstring."""

    OPENING = "opening"
    LINKING = "linking"
    SERVING = "serving"
    FAILED = "failed"
    STOPPED = "stopped"


class NodeLoop(threading.Thread):
    """One per NodeStore. Its public methods are for other threads."""

    def __init__(self, config: Config, node_id: NodeId) -> None:
        super().__init__(name="kvray-node", daemon=True)
        self._config = config
        self._node_address = ""  # by which Ray knows this node; asked when it begins
        self._node_id = node_id
        self._born_s = time.monotonic()
        self._served_after_ms: int | None = None
        self._stopping = threading.Event()
        self._inbox = Inbox()
        self._spans = open_spans(node_id)
        self._stage = Phase.OPENING  # but for what `phase` says while there is a Serving
        self._problem: KVRayError | None = None
        self._cleared_bytes = self._slab_bytes = 0  # while a new slab is being cleared
        self._left: list[str] = []
        self._link: LinkThread | None = None
        self._serving: Serving | None = None
        self._began = threading.Event()  # to serve, or to fail

    @property
    def phase(self) -> Phase:
        serving = self._serving
        if serving is None:
            return self._stage
        return Phase.SERVING if serving.is_linked else Phase.LINKING

    def describe(self, limit_s: float) -> str:
        """In a few words, for Ray's list of actors: what became of the start within limit_s."""
        self._began.wait(limit_s)
        serving = self._serving
        if serving is None:
            return self.phase.value
        return f"epoch={serving.epoch}, slab={self._slab_bytes >> 20:,} MiB"

    def wake(self) -> None:
        """A peer is about to read from us."""
        link = self._link
        if link is not None:
            link.wake()

    def ask(self, question: Callable[[Serving], Any]) -> Any:  # noqa: ANN401 (its answer)
        """Work something out on the loop's thread. Raises NodeLostError if it does not serve."""
        serving = self._serving
        if serving is None:
            raise NodeLostError(f"the NodeStore of node {self._node_id} is {self.phase}")
        answer: Future[Any] = Future()
        self._inbox.append(Question(lambda: question(serving), answer))
        try:
            return answer.result(QUESTION_DEADLINE_S)
        except TimeoutError as exc:
            raise NodeLostError(
                f"the NodeStore of node {self._node_id} is busy or has stopped: no answer in "
                f"{QUESTION_DEADLINE_S:.0f} s"
            ) from exc

    def take_over(self, wants: Sequence[tuple[BlockKey, int]], *, deadline_s: float) -> list[bytes]:
        """Those of these (key, payload bytes) that are READY here by the deadline. Raises
        NodeLostError as `ask` does.
        """
        done: Future[list[bytes]] = Future()
        deadline_ms = clock_ms() + int(deadline_s * 1_000)
        self.ask(lambda serving: serving.take_over(wants, deadline_ms, done))
        try:
            return done.result(deadline_s + QUESTION_DEADLINE_S)
        except TimeoutError as exc:
            raise NodeLostError(f"the NodeStore of node {self._node_id} has stopped") from exc

    def measure(self, peer_id: NodeId) -> Measured:
        """How good the link to this node is. Raises NodeLostError as `ask` does."""
        done: Future[Measured] = Future()
        self.ask(lambda serving: serving.measure(peer_id, done))
        try:
            return done.result(DEADLINE_MS / 1_000 + QUESTION_DEADLINE_S)
        except TimeoutError as exc:
            raise NodeLostError(
                f"the link thread of node {self._node_id} has not come back from NIXL for "
                f"{DEADLINE_MS / 1_000 + QUESTION_DEADLINE_S:.0f} s: until it does, every fetch "
                f"of this node is a miss; a connection that is cut may do that for some seconds"
            ) from exc

    def status(self) -> dict[str, Any]:
        """Plain data; from the core, too, while it serves."""
        phase = self.phase
        problem = self._problem_in(phase)
        known: dict[str, Any] = {
            "node_id": self._node_id,
            "pid": os.getpid(),
            "phase": phase.value,
            "problem": problem and {"kind": type(problem).__name__, "text": str(problem)},
            "slab_bytes": self._slab_bytes,
            "cleared_bytes": self._cleared_bytes,
            "served_after_ms": self._served_after_ms,  # engines, since the actor's start
            "runtime_dir": self._config.runtime_dir or default_runtime_dir(),
            "host_facts": host_facts(self._node_address),
        }
        if self._serving is not None:
            known |= self.ask(Serving.status)
        return known

    def _problem_in(self, phase: Phase) -> KVRayError | None:
        serving = self._serving
        if phase is Phase.SERVING:
            return None
        return self._problem if serving is None else serving.link_problem

    def stop(self, deadline_s: float) -> list[str]:
        """Say bye, give everything back, and end. Returns the files that are left."""
        self._stopping.set()
        self._inbox.ring()
        self.join(deadline_s)
        if self.is_alive():
            return [f"the NodeStore of node {self._node_id}, which does not end"]
        return self._left

    # ---- the thread

    def run(self) -> None:
        with ending_on_bug("a NodeStore"):
            while not self._stopping.is_set():
                try:
                    self._stage = Phase.OPENING
                    self._live()
                except KVRayError as exc:
                    if not self._stopping.is_set():
                        self._fail(exc)
                        self._stopping.wait(RETRY_S)
            if self._spans is not None:
                self._spans.close()
            self._stage = Phase.STOPPED

    def _fail(self, error: KVRayError) -> None:
        if str(error) != str(self._problem):
            logger.error("this NodeStore can not start, and tries again: %s", error)
        self._problem = error
        self._stage = Phase.FAILED
        self._began.set()

    def _live(self) -> None:
        """From nothing to the end. Raises KVRayError if it can not serve."""
        runtime = runtime_directory(self._config.runtime_dir)
        node = alive_nodes().get(self._node_id, {})
        self._node_address = node.get("NodeManagerAddress", "")
        slab = open_slab(self._config, self._node_id, runtime=runtime, on_progress=self._on_cleared)
        self._cleared_bytes = self._slab_bytes = slab.geometry.slab_bytes
        self._stage = Phase.LINKING
        self._link = LinkThread(
            slab_address=slab.address,
            slab_bytes=slab.geometry.slab_bytes,
            on_event=self._inbox.append,
        )
        try:
            self._serve(slab, self._link)
        finally:
            reads_in_flight = self._link.close()
            self._link = None
            self._left = self._give_back(slab, unmap=reads_in_flight == 0)

    def _serve(self, slab: SlabOwner, link: LinkThread) -> None:
        born_ms, born_wall_clock_ms = clock_ms(), int(time.time() * 1000)
        epoch = slab.next_epoch(wall_clock_ms=born_wall_clock_ms)
        store = StoreCore(
            slab.geometry,
            generation_mark=slab.generation_mark,
            policy=policy_named(
                self._config.replacement,
                probation_fraction=self._config.probation_fraction,
                reused_fraction=self._config.reused_fraction,
            ),
        )
        store.adopt(slab.extents, slab.headers, now_ms=clock_ms())
        info = NodeInfo(
            node_id=self._node_id,
            epoch=epoch,
            link_name="",  # until it is open
            link_metadata=b"",
            slab_id=slab.slab_id,
            slab_address=slab.address,
            slab_bytes=slab.geometry.slab_bytes,
            extent_bytes=slab.geometry.extent_bytes,
            host=socket.gethostname(),
            kvray_version=__version__,
            format_version=FORMAT_VERSION,
        )
        control = Control(self._config.cluster_name, self._inbox.append)
        server = LocalServer(str(slab.paths.socket))
        control.start()
        serving = Serving(
            info=info,
            slab=slab,
            store=store,
            link=link,
            control=control,
            server=server,
            inbox=self._inbox,
            open_link=lambda new_epoch: link.open(self._link_maker(new_epoch)),
            born_ms=born_ms,
            wall_clock_offset_ms=born_wall_clock_ms - born_ms,
            spans=self._spans,
            audit_rate=self._config.audit_rate,
        )
        self._serving = serving
        self._began.set()
        self._served_after_ms = int((time.monotonic() - self._born_s) * 1_000)
        logger.info(
            "node %s serves engines as epoch %d, %d ms after its start: %s",
            self._node_id,
            epoch,
            self._served_after_ms,
            slab.paths.slab,
        )
        try:
            serving.run(self._stopping.is_set)
        finally:
            self._serving = self._problem = None
            serving.close()
            control.say_bye(self._node_id, serving.epoch)
            control.close()

    def _link_maker(self, epoch: Epoch) -> Callable[[], Link]:
        name = f"kvray:{self._config.cluster_name}:{self._node_id}:{epoch}"

        def make() -> Link:
            # On the link thread, which is the first and only one to load NIXL.
            try:
                from kvray.link.nixl import NixlLink
            except ImportError as exc:
                raise LinkError(f"NIXL can not be loaded: {exc}") from exc
            link = NixlLink(name, devices=ucx_devices(self._node_address))
            keep_what_is_loaded()
            return link

        return make

    def _on_cleared(self, done_bytes: int, all_bytes: int) -> None:
        self._cleared_bytes, self._slab_bytes = done_bytes, all_bytes
        if self._stopping.is_set():
            raise SlabError("stopped while the slab was being cleared")

    def _give_back(self, slab: SlabOwner, *, unmap: bool) -> list[str]:
        """The files that are left, if this is the end. A read that has not ended may still write
        into the mapping: then only the name goes, and the memory with this process. Its lock, too:
        so if this is not the end, the process has to be.
        """
        paths, is_end = slab.paths, self._stopping.is_set()
        if not unmap and not is_end:
            die("a read has not ended, and this NodeStore gives its slab back by starting anew")
        if unmap:
            slab.close(unlink=is_end)
        elif is_end:
            paths.slab.unlink(missing_ok=True)
        if not is_end:
            return []
        with suppress(RayError):  # Ray may be ending, too
            sweep_dead_nodes(self._config)
        return left_behind(paths)
