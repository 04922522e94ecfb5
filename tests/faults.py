"""What a test asks of a fault of benchmarks/faults.py.

What is late once may be the fault of a busy machine, so it is tried again; what is wrong once is
wrong."""

from collections.abc import Callable

from benchmarks.fault_report import Report

ATTEMPTS = 2


def require(fault: Callable[[], Report]) -> Report:
    late: list[Report] = []
    while len(late) < ATTEMPTS:
        report = fault()
        print(report)  # noqa: T201 (what pytest shows of a test that fails)
        assert not report.broken, report
        if not report.late:
            return report
        late.append(report)
    raise AssertionError(late)
