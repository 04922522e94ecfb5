"""An engine's audits cost at most half a percent of what it computes, however its look-ups lie.

Method: prompts are computed and looked up in any order and of any size, several look-ups side by
side, any of them told a miss for an audit. What that costs is at most what was lent.
"""

import hypothesis.strategies as st
from hypothesis import given

from kvray.core.audit import MAX_PREFILL_SHARE, AuditBudget

Event = tuple[str, int]

events = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), st.integers(0, 200_000)),
        st.tuples(st.just("ask"), st.sampled_from([16, 128, 4_096, 100_000])),
        st.tuples(st.sampled_from(["hit", "audited"]), st.integers(0, 100)),
    ),
    max_size=60,
)


@given(events)
def test_audits_never_cost_more_than_their_share_of_what_was_computed(story: list[Event]) -> None:
    budget, computed, audited = AuditBudget(), 0, 0
    asked: list[int] = []
    for what, size in story:
        if what == "compute":
            computed += size
        elif what == "ask":
            asked.append(budget.lend(size, computed_tokens=computed))
            assert asked[-1] in (0, size)
        elif asked:
            lent = asked.pop(size % len(asked))
            # A look-up that nothing was lent to says so, and is not audited.
            is_audited = what == "audited" and lent > 0
            audited += lent if is_audited else 0
            budget.settle(lent, is_audited=is_audited)
        assert audited <= MAX_PREFILL_SHARE * computed
    assert budget.spent_tokens == audited


def test_what_no_audit_came_of_is_there_for_the_next_look_up() -> None:
    budget = AuditBudget()
    for _ in range(100):
        lent = budget.lend(128, computed_tokens=25_600)
        assert lent == 128
        assert budget.lend(128, computed_tokens=25_600) == 0, "one at a time"
        budget.settle(lent, is_audited=False)
    budget.settle(budget.lend(128, computed_tokens=25_600), is_audited=True)
    assert budget.lend(128, computed_tokens=51_199) == 0
    assert budget.lend(128, computed_tokens=51_200) == 128
