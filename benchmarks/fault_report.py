"""What came of one fault: the figures, and which of its bounds they break."""

from dataclasses import asdict, dataclass, field
from typing import Any

MIN_REQUESTS = 50  # that a fault must have seen


@dataclass
class Report:
    """One object of `--json`. None: does not apply. broken, late: why holds is False."""

    name: str
    requests: int = 0
    failed: int = 0
    wrong: int = 0
    blocks_before: int | None = None  # READY on the node, just before the fault
    blocks_after: int | None = None  # of those, READY again afterwards
    detect_ms: int | None = None
    local_hits_again_ms: int | None = None
    peer_hits_again_ms: int | None = None
    worst_extra_wait_ms: int | None = None
    skipped: str | None = None
    broken: list[str] = field(default_factory=list)  # what is wrong
    late: list[str] = field(default_factory=list)  # what took longer than it may
    notes: dict[str, Any] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(
        default_factory=list, repr=False
    )  # every request, for --trace

    def require(self, condition: bool, text: str) -> None:  # noqa: FBT001 (reads as a sentence)
        if not condition:
            self.broken.append(text)

    def require_within(self, what: str, found_ms: int | None, bound_ms: int) -> None:
        """found_ms: None if it never came."""
        if found_ms is None:
            self.broken.append(f"{what}: never")
        elif found_ms > bound_ms:
            self.late.append(f"{what}: {found_ms} ms, bound {bound_ms}")

    @property
    def holds(self) -> bool | None:
        """None if it was skipped."""
        return None if self.skipped is not None else not (self.broken or self.late)

    def judge(self) -> None:
        """The figures of requests, which are known last. Once."""
        self.require(not self.failed, f"{self.failed} requests failed")
        self.require(not self.wrong, f"{self.wrong} answers were wrong")
        self.require(
            self.requests >= MIN_REQUESTS, f"{self.requests} requests, wanted {MIN_REQUESTS}"
        )

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self) | {"holds": self.holds}
        del found["trace"]
        if self.skipped is None:
            del found["skipped"]
        return found


def skipped(name: str, reason: str) -> Report:
    return Report(name, skipped=reason)
