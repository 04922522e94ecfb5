"""Where a canary lies: in the slab of this engine's node, under its maker's name, and pinned there.

    PROVEN ──introduced──▶ slots reserved ──each rank writes its part──▶ committed ──▶ pinned

Other nodes fetch it from there as they fetch any block, to compare it with their own engines'
(kvray.core.trust). Nobody loads it. It is put there again for another session, which may be about
another slab, and under another name when the namespace or the maker is another one.
"""

from typing import Any

from kvray.core.canary import Proof
from kvray.core.ids import BlockKey, Namespace, SlabId
from kvray.core.keys import CANARY_CHUNKS, canary_keys
from kvray.core.messages import ChunkShape, Grant, KeyState
from kvray.engine.canary_rank import rank_write
from kvray.engine.jobs import SlotSpec
from kvray.node.client import NodeClient, Reservation, Session, Ticket

RETRY_S = 0.02  # after a try that found no answer within a step's budget
FULL_RETRY_S = 1.0  # after one that found no room: a slab that is full of pins empties no sooner
PIN_DEADLINE_MS = 1_000  # not waited for: what is not READY is asked for again


class CanaryStore:
    """One per engine, on its thread and between two steps."""

    def __init__(self, client: NodeClient) -> None:
        self._client = client
        self._put: tuple[Namespace, int] | None = None  # what is there, by namespace and maker
        self._session: Session | None = None  # of it; another one knows nothing of our pins
        self._ticket: Ticket | None = None
        self._next_try_s = 0.0

    def keep(
        self,
        engine_core: Any,
        proof: Proof,
        *,
        namespace: Namespace,
        shapes: list[ChunkShape],
        now_s: float,
    ) -> None:
        """See to it that the canary is in the slab of the session of now; one try a call, and none
        too soon after another. shapes: of each cache group. Cheap where it is there already.
        """
        session, wanted = self._client.session, (namespace, proof.maker)
        if session is None or (self._put == wanted and self._session is session):
            return
        if not self._client.is_introduced or now_s < self._next_try_s:
            return
        self._next_try_s = now_s + RETRY_S
        self._client.begin_step()
        if self._store(engine_core, proof, namespace, shapes, now_s):
            self._put, self._session = wanted, session

    @property
    def is_put(self) -> bool:
        """Whether nothing is left to do for the session of now."""
        return self._put is not None and self._session is self._client.session

    def forget(self) -> None:
        """The weights change: what is stored is of a maker that is no more, and may be evicted."""
        self._put = self._session = None
        self._next_try_s = 0.0
        self._unpin()

    def _store(
        self,
        engine_core: Any,
        proof: Proof,
        namespace: Namespace,
        shapes: list[ChunkShape],
        now_s: float,
    ) -> bool:
        """Whether all chunks are there, and pinned. It takes two tries where they are not."""
        keys = [
            key
            for group in range(len(shapes))
            for key in canary_keys(namespace, proof.maker, group, CANARY_CHUNKS)
        ]
        runs = [CANARY_CHUNKS] * len(shapes)
        sizes = [shape.slot_bytes for shape in shapes]
        reservation = self._client.reserve(keys, run_lengths=runs, run_slot_bytes=sizes)
        if reservation is None:
            return False
        if Grant.FULL in reservation.grants:
            self._next_try_s = now_s + FULL_RETRY_S
        if any(grant != Grant.PRESENT for grant in reservation.grants):
            # The next try finds them present, and pins them.
            self._write(engine_core, keys, sizes, reservation)
            return False
        self._unpin()
        self._ticket = self._client.lookup(
            keys,
            run_lengths=runs,
            run_is_prefix=[False] * len(shapes),
            run_slot_bytes=sizes,
            deadline_ms=PIN_DEADLINE_MS,
            fetch=False,
        )
        return self._ticket is not None and set(self._ticket.states) == {KeyState.HIT}

    def _write(
        self,
        engine_core: Any,
        keys: list[BlockKey],
        sizes: list[int],
        reservation: Reservation,
    ) -> None:
        """Into the slots that were granted."""
        granted = [i for i, grant in enumerate(reservation.grants) if grant == Grant.GRANTED]
        if not granted:
            return
        spec = SlotSpec.of(
            reservation.slab_id,
            [keys[i] for i in granted],
            [reservation.places[i] for i in granted],
            [sizes[i // CANARY_CHUNKS] for i in granted],
        )
        written = engine_core.model_executor.collective_rpc(rank_write, args=(spec, granted))
        end = self._client.commit if all(written) else self._client.abandon
        end(SlabId(spec.slab_id), spec.places())

    def _unpin(self) -> None:
        if self._ticket is not None:
            self._client.unpin(self._ticket)
            self._ticket = None
