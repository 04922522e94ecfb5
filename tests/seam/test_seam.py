"""Goal: no request waits for ever, and no device block is lost, whatever happens to a request at
whatever moment of its life. Method: each event in each state, see tests.seam.
"""

from collections.abc import Callable

import pytest

pytest.importorskip("vllm")

from tests.seam.events import EVENTS
from tests.seam.pairs import Seam, judge
from tests.seam.states import STATES, World

pytestmark = [pytest.mark.engine]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_whatever_happens_a_request_ends_and_nothing_is_lost(
    made: Seam, state: Callable[[World], None]
) -> None:
    outcomes = {event.__name__: judge(made, state, event) for event in EVENTS}
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.is_good} == {}
