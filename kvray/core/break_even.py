"""Whether fetching pays: measured links against the prefill that an engine has measured.

    to fetch n blocks      a locate and a read of headers, then their bytes at the peer's rate
    to compute n blocks    n times what the engine says that one takes

Asked twice. Of a whole chain before it is located, at the rate of the fastest peer: what is too
short costs no call. Of each source when it is known: a block is not read over a link that is slower
than computing it, nor behind a queue that is longer than computing the chain. What has not been
measured, or not lately, pays, or it would never be measured again.

    a rate is believed for 1 s ──the next one, after that, is like it──▶ 2 s ──▶ ... ──▶ 30 s
              ▲────────── a read that is not like it, or a read that failed ──────────────┘

So a link that is slow for good costs one vain try in half a minute, and one that hiccuped, or was
cut and healed, is used again a second later.

Durations are in whole ms, as all time in the core is: of many reads that start at any moment the
sum is right, though each may be off by one.
"""

from collections.abc import Iterable

import msgspec

RATE_SAMPLE_BYTES = 4 * 1024**2  # a shorter read shows the latency and not the rate
MIN_RATE_MS = 20  # measured for so long, a rate is off by 5 % at most
MAX_RATE_MS = 1_000  # older samples fade: at this length they are halved
FIRST_FRESH_MS = 1_000  # for so long one bad moment is believed: a healed link is used within 3 s
MAX_FRESH_MS = 30_000  # a link that was slow half a minute ago may have been mended
ALIKE = 2  # rates that differ by less than this factor confirm each other
OVERHEAD_FRESH_MS = 2_000  # then MIN_SAMPLES tries say what it is now
MIN_SAMPLES = 8  # of an overhead, before it is believed
MAX_SAMPLES = 256  # at this number they are halved


class Worth(msgspec.Struct, frozen=True, gc=False):
    """What a fetch saves: the time in which the engine would compute one of the blocks, and all
    that are wanted together. 0: not known, so it pays.
    """

    block_us: int = 0
    chain_us: int = 0

    def or_more(self, other: "Worth") -> "Worth":
        """Of a block that two wait for: it is fetched if it pays for one of them."""
        if not self.block_us or not other.block_us:
            return ALWAYS
        return Worth(max(self.block_us, other.block_us), max(self.chain_us, other.chain_us))


ALWAYS = Worth()


class Rate:
    """Bytes a ms of one peer, over about the last second in which it brought something."""

    __slots__ = ("_bytes", "_fresh_ms", "_last_ms", "_ms", "_sample_bytes")

    def __init__(self, sample_bytes: int = RATE_SAMPLE_BYTES) -> None:
        self._sample_bytes = sample_bytes
        self._bytes = 0
        self._ms = 0
        self._last_ms = 0
        self._fresh_ms = FIRST_FRESH_MS

    def add(self, read_bytes: int, duration_ms: int, *, now_ms: int) -> None:
        """A read has come. duration_ms: without the time in which another read of the same peer
        was under way before it, which that one has counted.
        """
        if read_bytes < self._sample_bytes:
            return
        is_alike = self._is_alike(read_bytes, duration_ms)
        if not self._is_fresh(now_ms):
            self._fresh_ms = min(2 * self._fresh_ms, MAX_FRESH_MS) if is_alike else FIRST_FRESH_MS
            self._bytes = self._ms = 0
        elif not is_alike:
            self._fresh_ms = FIRST_FRESH_MS
        self._bytes += read_bytes
        self._ms += duration_ms
        self._last_ms = now_ms
        if self._ms > MAX_RATE_MS:
            self._bytes //= 2
            self._ms //= 2

    def doubt(self) -> None:
        """A read has failed: the link may be another one afterwards."""
        self._fresh_ms = FIRST_FRESH_MS

    def bytes_per_ms(self, now_ms: int) -> float | None:
        """None: not known, or not any more."""
        if self._ms < MIN_RATE_MS or not self._is_fresh(now_ms):
            return None
        return self._bytes / self._ms

    def last_known(self) -> float | None:
        """The same, however old. For people."""
        return round(self._bytes / self._ms) if self._ms else None

    def _is_fresh(self, now_ms: int) -> bool:
        return now_ms - self._last_ms < self._fresh_ms

    def _is_alike(self, read_bytes: int, duration_ms: int) -> bool:
        """As what is known: read_bytes / duration_ms and _bytes / _ms, without a division."""
        here, there = read_bytes * self._ms, self._bytes * max(duration_ms, 1)
        return 0 < here <= there * ALIKE and there <= here * ALIKE


class Overhead:
    """The mean of what one step takes, in ms. 0 until there are enough samples, and when the last
    one is old.
    """

    __slots__ = ("_count", "_last_ms", "_ms")

    def __init__(self) -> None:
        self._count = 0
        self._ms = 0
        self._last_ms = 0

    def add(self, duration_ms: int, *, now_ms: int) -> None:
        if not self._is_fresh(now_ms):
            self._count = self._ms = 0
        self._count += 1
        self._ms += duration_ms
        self._last_ms = now_ms
        if self._count > MAX_SAMPLES:
            self._count //= 2
            self._ms //= 2

    def mean_ms(self, now_ms: int) -> float:
        if self._count < MIN_SAMPLES or not self._is_fresh(now_ms):
            return 0.0
        return self._ms / self._count

    def _is_fresh(self, now_ms: int) -> bool:
        return now_ms - self._last_ms < OVERHEAD_FRESH_MS


def chain_pays(
    chain_bytes: int,
    worth: Worth,
    rates: Iterable[float | None],
    *,
    overhead_ms: float,
) -> bool:
    """Whether a chain whose holders are not known yet is worth asking for. rates: of all peers, in
    bytes a ms.
    """
    if not worth.chain_us:
        return True
    fastest = 0.0
    for rate in rates:
        if rate is None:
            return overhead_ms * 1_000 <= worth.chain_us
        fastest = max(fastest, rate)
    if not fastest:
        return True  # no peers, or none that brings anything: the directory knows more
    return (overhead_ms + chain_bytes / fastest) * 1_000 <= worth.chain_us


def source_pays(block_bytes: int, outstanding_bytes: int, worth: Worth, rate: float | None) -> bool:
    """Whether one block is worth reading from a peer that has so much to bring before it."""
    if rate is None or not worth.block_us:
        return True
    return (
        block_bytes * 1_000 <= worth.block_us * rate
        and (outstanding_bytes + block_bytes) * 1_000 <= worth.chain_us * rate
    )
