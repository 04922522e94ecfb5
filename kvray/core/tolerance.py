"""By how much the blocks of two makers may differ and still be the same.

Two engines of one class that do not differ from themselves (the canary, computed again, came out
bit for bit the same) must agree to the bit. Everywhere else numbers round differently: in another
order of additions, in other units of other processors. What is told apart is rounding, of which an
engine's own noise says how large it is here, and another arrangement or other weights, where whole
layers are unlike each other and the error is about 1.

Pieces are layers: the first depends on no attention, so it is as exact as one multiplication, and
what it shows is no growth of small errors.

The figures below are those of tests/data/kv_noise.json: real engines on a CPU, whose blocks were
computed with other schedules, threads and instruction sets. Nothing of it is from a GPU yet.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvray.core.ids import Maker, maker_class
from kvray.core.messages import NoiseLevels

# Another batch changes the order of additions; another processor changes it in more places: blocks
# of two classes differ by three times what an engine sees of itself, where it sees anything.
NOISE_FACTOR = 8.0
# Most engines see no noise at all, and still round otherwise than another class: in bfloat16 the
# first layer by 0.3 %, which is one rounding, and each other one by up to 1 %, since they all read
# what the ones before them have rounded. Seven and ten times that, for processors not yet seen.
FIRST_FLOOR, FLOOR = 0.02, 0.1
# However noisy an engine is: one layer whose tokens have moved by one differs by 0.94, layers, keys
# or values that have changed places by 1.4, as vectors do that have nothing to do with each other.
CEILING = 0.4


@dataclass(frozen=True, slots=True)
class Tolerance:
    """is_exact: not a bit may differ. Else the largest relative errors: of the first piece of a
    block, and of each other one.
    """

    is_exact: bool
    first: float
    others: float

    def exceeded(self, errors: npt.NDArray[np.float64]) -> list[int]:
        """The pieces whose relative error is too large. One that is no number is."""
        if self.is_exact:
            too_large = errors != 0.0
        else:
            limits = np.full(len(errors), self.others)
            limits[:1] = self.first
            too_large = ~(errors <= limits)
        found: list[int] = too_large.nonzero()[0].tolist()
        return found


def tolerance_of(
    mine: Maker, other: Maker, noise: NoiseLevels, *, is_canary: bool = True
) -> Tolerance:
    """For engines of `mine`, whose own noise this is, that look at blocks of `other`. is_canary:
    both have computed them alone.
    """
    is_exact = is_canary and maker_class(mine) == maker_class(other) and noise.alone == 0.0
    level = NOISE_FACTOR * max(noise.alone, noise.batched)
    return Tolerance(
        is_exact,
        first=min(CEILING, max(FIRST_FLOOR, level)),
        others=min(CEILING, max(FLOOR, level)),
    )
