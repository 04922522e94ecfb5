"""Rule 2 under attack: an owner that rewrites its slots all the time never gets a block accepted
that is torn or is another one than was asked for. Real headers, LinkThread and NIXL, two processes.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.onesided import GEOMETRY, Counts, owner, reader

READING_S = 3.0
ENOUGH = 100  # blocks that were proven
MAX_ROUNDS = 8  # of READING_S and a reader's start each
PROCESS_LIMIT_S = 60.0  # a start with the first agent (1.3.2 loads torch), and READING_S
END_LIMIT_S = 10.0


@pytest.fixture
def slab_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvray-test-") as folder:
        path = Path(folder) / "slab"
        for each in (path, path.with_suffix(".reader")):
            with each.open("wb") as file:
                file.truncate(GEOMETRY.slab_bytes)
        yield path


@pytest.mark.parametrize("transports", ["", "tcp"])
def test_a_block_that_is_rewritten_while_it_is_read_is_never_accepted(
    slab_path: Path, transports: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if transports:
        monkeypatch.delenv("UCX_TLS", raising=False)
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []

    def start(function: Any, **arguments: Any) -> Connection:
        ours, theirs = context.Pipe()
        name = f"{function.__name__}-{os.getpid()}-{transports or 'any'}@{len(processes) + 1}"
        process = context.Process(
            target=function,
            args=(theirs, slab_path, name, transports),
            kwargs=arguments,
            daemon=True,
        )
        process.start()
        theirs.close()
        processes.append(process)
        return ours

    try:
        # A read over TCP takes milliseconds: an owner that never rests leaves nothing to prove.
        to_owner = start(owner, pause_s=0.000_2 if transports else 0.0)
        info = received(to_owner)
        rounds: list[Counts] = []
        # On a busy machine the owner is the faster one, and few blocks survive a read: go on.
        while sum(counts.accepted for counts in rounds) <= ENOUGH and len(rounds) < MAX_ROUNDS:
            rounds.append(received(start(reader, duration_s=READING_S, info=info)))
        to_owner.send("enough")
        rewrites: int = received(to_owner)
    finally:
        for process in processes:
            process.kill()
            process.join(END_LIMIT_S)

    story = f"{rounds}; rewritten {rewrites} times"
    assert [reason for counts in rounds for reason in counts.failed] == [], story
    assert sum(counts.wrong_accepted for counts in rounds) == 0, story
    # and the attack was one: blocks were proven, others were caught, and whoever reads the header
    # before the payload would have believed some of those
    assert sum(counts.accepted for counts in rounds) > ENOUGH, story
    assert sum(counts.stale for counts in rounds) > 0, story
    assert sum(counts.wrong for counts in rounds) > 0, story
    assert sum(counts.wrong_if_header_came_first for counts in rounds) > 0, story


def received(pipe: Connection) -> Any:
    assert pipe.poll(PROCESS_LIMIT_S), "no answer"
    return pipe.recv()
