"""What a fuzzer has done, and bytes that are near what is right."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

MAX_FAILURES = 10  # kept of one target: more say nothing new


@dataclass
class Outcome:
    """failures: what went wrong, each with what repeats it."""

    cases: int = 0
    methods: int = 0  # that were called, where that is what is counted
    failures: list[str] = field(default_factory=list)

    def fail(self, text: str) -> None:
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(text)


def rounds(outcome: Outcome, seconds: float) -> Iterator[int]:
    """Numbers of cases, until the time is over; one at least."""
    end_s = time.monotonic() + seconds
    while True:
        yield outcome.cases
        outcome.cases += 1
        if time.monotonic() >= end_s:
            return


def mutant(random: Random, examples: Sequence[bytes]) -> bytes:
    """One of these with a few bytes changed, left out, put in, or taken from another one."""
    data = bytearray(random.choice(examples))
    for _ in range(random.randrange(1, 6)):
        at = random.randrange(len(data) + 1)
        match random.randrange(4):
            case 0 if at < len(data):
                data[at] = random.randrange(256)
            case 1:
                del data[at : at + random.randrange(1, 9)]
            case 2:
                data[at:at] = random.randbytes(random.randrange(1, 9))
            case _:
                other = random.choice(examples)
                begin = random.randrange(len(other) + 1)
                data[at:at] = other[begin : begin + random.randrange(1, 40)]
    return bytes(data)
