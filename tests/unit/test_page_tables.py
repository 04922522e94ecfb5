"""Goal: a large slab can be used before its page tables are filled.

Method: a real client of a real socket; the kernel's filling waits until the test lets it go on.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvray.engine.copier import CpuExecutor
from kvray.engine.workplace import Copies
from kvray.node.client import WorkerClient
from kvray.node.mapped import populate_pages
from tests.scripted_node import GEOMETRY, PATIENCE_S, ScriptedNode
from tests.unit.test_node_client import until

STEP_BYTES = 1 << 20  # GEOMETRY's slab has four


class Kernel:
    """Fills a step of page tables when `goes_on` is set, and notes which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.goes_on = threading.Event()
        self.filled_bytes = 0
        monkeypatch.setattr("kvray.engine.page_tables.POPULATE_STEP_BYTES", STEP_BYTES)
        monkeypatch.setattr("kvray.node.mapped.populate_pages", self._populate)

    def _populate(self, address: int, length_bytes: int) -> bool:
        assert self.goes_on.wait(PATIENCE_S)
        assert populate_pages(address, length_bytes)
        self.filled_bytes += length_bytes
        return True


def filling() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvray-pages"]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel = Kernel(monkeypatch)
    yield kernel
    kernel.goes_on.set()
    until(lambda: not filling())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def copies() -> Iterator[Copies]:
    copies = Copies(CpuExecutor(1))
    yield copies
    copies.close()


def worker_of(path: Path, copies: Copies) -> WorkerClient:
    return WorkerClient(
        find_socket=lambda: str(path),
        engine_nonce=1,
        label="rank 0",
        on_session=copies.meet,
        retry_first_s=0.01,
        retry_last_s=0.05,
    )


def test_a_job_finds_its_slab_while_the_page_tables_are_being_filled(
    path: Path, kernel: Kernel, copies: Copies
) -> None:
    with ScriptedNode(path) as node:
        worker = worker_of(path, copies)
        worker.start()
        session = worker.wait_session(PATIENCE_S)
        assert session is not None, "hundreds of GiB, and every load fails for so long"
        assert worker.session_for(node.slab_id) is session
        assert kernel.filled_bytes == 0
        kernel.goes_on.set()
        until(lambda: kernel.filled_bytes == GEOMETRY.slab_bytes)
        node.hang_up()
        until(lambda: len(node.sessions) == 2)
        assert kernel.filled_bytes == GEOMETRY.slab_bytes, "the same slab once"
        worker.close()


def test_the_slab_of_another_node_store_is_not_waited_for(
    path: Path, kernel: Kernel, copies: Copies
) -> None:
    worker = worker_of(path, copies)
    with ScriptedNode(path, slab_id=b"A" * 16):
        worker.start()
        assert worker.wait_session(PATIENCE_S) is not None
    with ScriptedNode(path, slab_id=b"B" * 16) as node:
        until(lambda: worker.session_for(node.slab_id) is not None)
        kernel.goes_on.set()  # the step of A that is under way ends, and no other begins
        until(lambda: kernel.filled_bytes == GEOMETRY.slab_bytes + STEP_BYTES)
        worker.close()


def test_a_worker_that_ends_fills_no_more(path: Path, kernel: Kernel, copies: Copies) -> None:
    worker = worker_of(path, copies)
    with ScriptedNode(path):
        worker.start()
        assert worker.wait_session(PATIENCE_S) is not None
        copies.close()
        kernel.goes_on.set()
        until(lambda: kernel.filled_bytes > 0)
        worker.close()
    until(lambda: not filling())
    assert kernel.filled_bytes == STEP_BYTES
