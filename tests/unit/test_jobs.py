"""What the ranks of an engine report is added up, and nothing of it is lost on its way."""

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)

from kvray.core.durations import copy_counter
from kvray.engine.jobs import KVRayWorkerMetadata

pytestmark = [pytest.mark.engine]

FAST, SLOW = copy_counter("load", 2), copy_counter("load", 90)


def report(job_id: int, copies: dict[str, int], *, failed: bool = False) -> KVRayWorkerMetadata:
    meta = OffloadingWorkerMetadata()
    meta.mark_completed(job_id)
    meta.transfer_stats.load.record(1_000, 0.002)
    return KVRayWorkerMetadata.wrap(meta, failed_jobs={job_id} if failed else set(), copies=copies)


def test_reports_of_two_ranks_are_one() -> None:
    both = report(7, {FAST: 1}).aggregate(report(7, {FAST: 2, SLOW: 1}, failed=True))
    assert isinstance(both, KVRayWorkerMetadata)
    assert both.completed_jobs == {7: 2}
    assert both.failed_jobs == {7}
    assert both.copies == {FAST: 3, SLOW: 1}
    assert both.transfer_stats.load.bytes == 2_000
