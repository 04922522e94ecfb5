"""What was recorded of real engines' rounding is no alarm, and what is not rounding is found.

Method: tests.noise replays the record through the cores; with tolerances that are too small or too
large it must say so. `python -m tests.noise` does the same with 100,000 audits.
"""

import numpy as np
import pytest

from kvray.core import tolerance
from kvray.core.ids import Maker
from kvray.core.messages import NoiseLevels
from tests.noise.record import load
from tests.noise.replay import Outcome, replay

AUDITS = 5_000


def replayed() -> Outcome:
    return replay(load(), audits=AUDITS)


def test_honest_engines_raise_no_alarm_and_what_differs_is_found() -> None:
    outcome = replayed()
    assert (outcome.audits, outcome.alarms) == (AUDITS, 0)
    assert outcome.found > 0
    assert outcome.missed == 0, outcome.names


def test_what_an_audit_lets_pass_the_canaries_of_like_machines_tell() -> None:
    like = Maker(7 << 32 | 1), Maker(7 << 32 | 2)
    exact = tolerance.tolerance_of(*like, NoiseLevels())
    samples = [s for f in load().families for rows in f.different.values() for s in rows]
    assert samples
    assert all(exact.exceeded(np.array(sample.errors)) for sample in samples)


def test_a_tolerance_below_the_noise_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_FLOOR", "FLOOR"):
        monkeypatch.setattr(tolerance, name, 1e-9)
    monkeypatch.setattr(tolerance, "NOISE_FACTOR", 0.0)
    assert replayed().alarms > 0


def test_a_tolerance_that_takes_anything_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_FLOOR", "FLOOR", "CEILING"):
        monkeypatch.setattr(tolerance, name, 2.0)
    assert replayed().missed > 0
