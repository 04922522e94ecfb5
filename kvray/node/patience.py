"""How long an engine waits for its NodeStore: a budget a step, and nothing while that is silent.

LISTENED TO ──an answer is overdue──▶ SILENT, a hiccup ──HICCUP_S──▶ SILENT
     ▲                                    │                            │
     └───────────── anything heard ───────┴────────────────────────────┘
"""

import time

BUDGET_S = 0.002  # per scheduler step; a lookup of 512 keys takes 0.1 to 0.3 ms
MIN_BUDGET_S = 0.000_2  # with less left nothing is asked: no answer would be nobody's fault
# A NodeStore that waits for a core of a busy host gets one within some ten milliseconds. One that
# is silent for longer is frozen or worse, and no request is held for it.
HICCUP_S = 0.1


class Patience:
    """heard() may be called from any thread, the others belong to the engine's."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s = self.left_s = budget_s
        self._silent_since_s: float | None = None

    def begin_step(self) -> None:
        """A new scheduler step: the whole budget is there again."""
        self.left_s = self._budget_s

    @property
    def is_spent(self) -> bool:
        return self.left_s < MIN_BUDGET_S

    def overdue(self) -> None:
        """An answer did not come in time."""
        self._silent_since_s = time.monotonic()

    def heard(self) -> None:
        self._silent_since_s = None

    @property
    def is_silent(self) -> bool:
        return self._silent_since_s is not None

    @property
    def may_hear_soon(self) -> bool:
        """It is not silent, or has been for no longer than a hiccup."""
        since_s = self._silent_since_s
        return since_s is None or time.monotonic() - since_s < HICCUP_S
