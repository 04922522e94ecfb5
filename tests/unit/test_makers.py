"""Makers as small numbers: they come back as they were, and one too many is nobody."""

import numpy as np
import pytest

from kvray.core import makers as module
from kvray.core.ids import UNKNOWN_MAKER
from kvray.core.makers import MakerNumbers


def test_makers_come_back_as_they_were_whatever_came_before() -> None:
    numbers = MakerNumbers()
    rows = [
        np.array([2**64 - 1] * 5, np.uint64),
        np.array([7, 0, 2**64 - 1, 7], np.uint64),
        np.zeros(0, np.uint64),
        np.arange(1_000, dtype=np.uint64),
    ]
    packed = [numbers.number(row) for row in rows]
    for row, small in zip(rows, packed, strict=True):
        assert numbers.makers(small).tolist() == row.tolist()
    assert len(numbers) == 1_000, "7 and the largest, and the other 998 that are not 0"
    numbers.check()


def test_one_maker_too_many_is_listed_as_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MAKERS", 2)
    numbers = MakerNumbers()
    small = numbers.number(np.array([5, 6, 7, 5], np.uint64))
    assert numbers.makers(small).tolist() == [5, 6, UNKNOWN_MAKER, 5]
    numbers.check()
