"""Goal: an engine that gives its tickets back keeps its NodeStore, whatever is under way. The whole
count is a command: python -m tests.seam.give_backs.
"""

import tempfile
from pathlib import Path

from tests.seam.give_backs import race

COUNT = 10_000  # without the mending, a few thousand were too many


def test_updates_for_tickets_that_are_given_back_do_not_end_the_session() -> None:
    with tempfile.TemporaryDirectory(prefix="kvray-") as folder:  # a socket's path must be short
        races = race(Path(folder), COUNT)
    assert races.raced > 0
    assert races.refusals == 0
    assert races.give_backs >= COUNT
