"""Goal: whatever happens to blocks in whatever order, a policy names each evictable block once, no
other, and remembers nothing of those that are gone.

Method: any sequence of verbs against a model that knows which slots are READY and which are held.
"""

import hypothesis.strategies as st
from hypothesis import given

from kvray.core.eviction import Lru, Policy, Segmented
from kvray.core.ids import Origin, SlotIndex

SIZE = 4_096
SLOTS = [SlotIndex(number) for number in range(3)]

fractions = st.sampled_from([0.0, 0.2, 0.5, 1.0])
policies = st.one_of(st.builds(Lru), st.builds(Segmented, fractions, fractions))
verbs = st.sampled_from(["admit", "copy", "hold", "free", "hit", "keep", "read", "spare", "evict"])
steps = st.lists(st.tuples(verbs, st.sampled_from(SLOTS)), min_size=30, max_size=60)


def act(policy: Policy, verb: str, slot: SlotIndex, held: dict[SlotIndex, bool]) -> None:
    """What the store may do with this slot as it is; held: of each READY one."""
    if verb in ("admit", "copy"):
        if slot not in held:
            policy.admit(SIZE, slot, Origin.COPY if verb == "copy" else Origin.ORIGINAL)
            held[slot] = False
    elif slot not in held:
        pass
    elif verb == "hold" and not held[slot]:
        policy.hold(SIZE, slot)
        held[slot] = True
    elif verb == "free" and held[slot]:
        policy.free(SIZE, slot)
        held[slot] = False
    elif verb == "evict":
        victim = next(policy.coldest(SIZE, slot_count=len(SLOTS)), None)
        assert (victim is None) == all(held.values())
        if victim is not None:
            policy.forget(SIZE, victim)
            del held[victim]
    elif verb in ("hit", "keep", "read", "spare"):
        getattr(policy, verb)(SIZE, slot)


@given(policies, steps)
def test_the_order_of_eviction_is_what_may_go(
    policy: Policy, steps: list[tuple[str, SlotIndex]]
) -> None:
    held: dict[SlotIndex, bool] = {}
    for verb, slot in steps:
        act(policy, verb, slot, held)
        evictable = sorted(slot for slot in held if not held[slot])
        order = list(policy.coldest(SIZE, slot_count=len(SLOTS)))
        assert sorted(order) == evictable
        assert set(policy.doubtful(SIZE)) <= set(evictable)
        assert policy.snapshot()["evictable"] == len(evictable)
        policy.check(held)


@given(policies, steps, st.sampled_from(SLOTS))
def test_what_a_peer_has_just_read_is_the_last_original_to_go(
    policy: Policy, steps: list[tuple[str, SlotIndex]], slot: SlotIndex
) -> None:
    held: dict[SlotIndex, bool] = {}
    for verb, other in (*steps, ("admit", slot), ("free", slot)):
        act(policy, "admit" if verb == "copy" else verb, other, held)
    policy.read(SIZE, slot)
    assert list(policy.coldest(SIZE, slot_count=len(SLOTS)))[-1] == slot
