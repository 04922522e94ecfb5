"""Two processes with a slab each: the whole way of a block, peer's slab ──▶ own slab ──▶ device.

    peer   a slab full of READY blocks of random bytes, and a NIXL agent that lets others read it
    here   NIXL reads batches into reserved slots, then the peer's headers (rule 2), commits what
           they prove; the load was submitted before, and copies each slot once its header is READY

`python -m tests.gpu.pair` is the peer; it is told what to do, and ends with its standard input.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvray.core.effects import Place
from kvray.core.ids import ReadId
from kvray.core.layout import HEADER_BYTES, SLOT_HEADER_DTYPE, Geometry
from kvray.engine.cuda_driver import the_driver
from kvray.link.base import ReadOutcome, Segments
from kvray.link.nixl import NixlLink
from tests.gpu.rig import LIMIT_S, ORDINAL, Blocks, NodeSlab, Rig

ROOT = Path(__file__).resolve().parent.parent.parent
BATCH_BYTES = 8 * 1024**2  # as a NodeStore reads: engine.arrivals looks at them one by one
POLL_S = 0.000_1


class Peer:
    """The other process, as this one sees it."""

    def __init__(self, said: dict[str, Any]) -> None:
        self.name: str = said["name"]
        self.metadata = bytes.fromhex(said["metadata"])
        self.address: int = said["address"]
        self.has_context: bool = said["has_context"]
        self.offsets: list[int] = said["offsets"]
        self.generations: list[int] = said["generations"]
        self.header_offsets: list[int] = said["header_offsets"]


@contextmanager
def running_peer(geometry: Geometry, slot_bytes: int, count: int, *, seed: int) -> Iterator[Peer]:
    words = {
        "slab_bytes": geometry.slab_bytes,
        "extent_bytes": geometry.extent_bytes,
        "slot_bytes": slot_bytes,
        "count": count,
        "seed": seed,
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.pair", json.dumps(words)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            lines = (line for line in process.stdout if line.startswith("{"))  # NIXL prints too
            said = next(lines, None)
            assert said is not None, "the peer has ended before it said anything"
            yield Peer(json.loads(said))
        finally:
            process.stdin.close()
            process.wait(LIMIT_S)


def block_bytes(seed: int, index: int, slot_bytes: int) -> bytes:
    return np.random.default_rng((seed, index)).bytes(slot_bytes)


class Reader:
    """This side's link, on the slab of a rig."""

    def __init__(self, rig: Rig, peer: Peer) -> None:
        slab = rig.slab.owner
        self._rig, self._peer = rig, peer
        self._link = NixlLink(f"reader-{id(self)}@1")
        self._link.register(slab.address, slab.geometry.slab_bytes)
        self._headers = np.zeros(len(peer.offsets), SLOT_HEADER_DTYPE)
        self._link.register(self._headers.ctypes.data, self._headers.nbytes)
        self._link.connect(peer.name, peer.metadata)
        self._next_read = 0

    def fetch(self, places: Sequence[Place]) -> float:
        """Read the peer's first blocks into these slots, batch by batch, and commit what its
        headers prove. Seconds.
        """
        begun_s = time.perf_counter()
        size = places[0].bytes
        batch = max(1, BATCH_BYTES // size)
        for begin in range(0, len(places), batch):
            self._fetch_batch(places[begin : begin + batch], begin)
        return time.perf_counter() - begun_s

    def _fetch_batch(self, places: Sequence[Place], begin: int) -> None:
        peer, rig = self._peer, self._rig
        indices = range(begin, begin + len(places))
        self._read(
            [rig.slab.owner.address + place.offset for place in places],
            [peer.address + peer.offsets[i] for i in indices],
            [place.bytes for place in places],
        )
        rows = self._headers[begin : begin + len(places)]
        self._read(
            [rows.ctypes.data + HEADER_BYTES * i for i in range(len(places))],
            [peer.address + peer.header_offsets[i] for i in indices],
            [HEADER_BYTES] * len(places),
        )
        assert rows["generation"].tolist() == [peer.generations[i] for i in indices]
        rig.slab.commit(places)

    def _read(self, local: list[int], remote: list[int], sizes: list[int]) -> None:
        self._next_read += 1
        columns = (np.array(column, np.uint64) for column in (local, remote, sizes))
        self._link.post_read(ReadId(self._next_read), self._peer.name, Segments(*columns))
        end_s = time.monotonic() + LIMIT_S
        while not (ends := self._link.poll()):
            assert time.monotonic() < end_s, "a read does not end"
            time.sleep(POLL_S)
        assert [end.outcome for end in ends] == [ReadOutcome.DONE], ends

    def close(self) -> None:
        self._link.close()


def fetch_and_load(rig: Rig, reader: Reader, blocks: Blocks, places: Sequence[Place]) -> float:
    """The load is submitted first, as for a request whose blocks are coming. Seconds."""
    begun_s = time.perf_counter()
    jobs = rig.begin_load(blocks, places, until_s=time.monotonic() + LIMIT_S)
    reader.fetch(places)
    assert all(end.ok for end in rig.ends(jobs))
    return time.perf_counter() - begun_s


def main(words: dict[str, Any]) -> None:
    slab = NodeSlab(Geometry(words["slab_bytes"], words["extent_bytes"]))
    places = slab.reserve([words["slot_bytes"]] * words["count"])
    for index, place in enumerate(places):
        content = block_bytes(words["seed"], index, place.bytes)
        slab.owner.memory[place.offset : place.offset + place.bytes] = content
    slab.commit(places)
    link = NixlLink(f"peer-{words['seed']}@1")
    link.register(slab.owner.address, slab.owner.geometry.slab_bytes)
    driver = the_driver()
    said = {
        "name": link.name,
        "metadata": link.metadata.hex(),
        "address": slab.owner.address,
        "has_context": driver is not None and driver.has_context(ORDINAL),
        "offsets": [place.offset for place in places],
        "generations": [place.generation for place in places],
        "header_offsets": [slab.owner.geometry.header_offset(place.slot) for place in places],
    }
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    wait_for_end(link)
    link.close()
    slab.close()


def wait_for_end(link: NixlLink) -> None:
    """A peer over TCP gets on only while this side polls."""
    import select

    while True:
        link.poll()
        if select.select([sys.stdin], [], [], POLL_S)[0] and not sys.stdin.readline():
            return


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
