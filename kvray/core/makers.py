"""Makers as small numbers, for tables of millions of rows: two bytes a row in place of eight."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvray.core.ids import UNKNOWN_MAKER

# Kinds of engines, and one more with each change of weights; none is ever forgotten. One beyond it
# is listed as unknown, and its blocks are nobody's: misses.
MAX_MAKERS: Final = 65_535

Numbers = npt.NDArray[np.uint16]
Makers = npt.NDArray[np.uint64]


class MakerNumbers:
    """0 is UNKNOWN_MAKER."""

    def __init__(self) -> None:
        self._number_of = {int(UNKNOWN_MAKER): 0}
        self._makers: Makers = np.zeros(256, np.uint64)

    def __len__(self) -> int:
        """Makers that are known."""
        return len(self._number_of) - 1

    def number(self, makers: npt.NDArray[Any]) -> Numbers:
        """Of each of these. Mostly they are all one, since a node's engines are alike."""
        if len(makers) and (makers == makers[0]).all():
            return np.full(len(makers), self._number(int(makers[0])), np.uint16)
        different, places = np.unique(makers, return_inverse=True)
        numbers = np.array([self._number(maker) for maker in different.tolist()], np.uint16)
        return numbers[places]

    def makers(self, numbers: Numbers) -> Makers:
        """Back again."""
        return self._makers[numbers]

    def _number(self, maker: int) -> int:
        number = self._number_of.get(maker)
        if number is None:
            number = len(self._number_of)
            if number > MAX_MAKERS:
                return 0
            self._number_of[maker] = number
            if number >= len(self._makers):
                self._makers = np.concatenate([self._makers, np.zeros_like(self._makers)])
            self._makers[number] = maker
        return number

    def check(self) -> None:
        assert len(self) <= MAX_MAKERS
        for maker, number in self._number_of.items():
            assert self._makers[number] == maker
