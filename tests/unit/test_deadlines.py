"""What is due when, in an order that can be repeated."""

import random

from kvray.core.deadlines import Deadlines


def test_what_is_due_comes_out_once_in_order_of_time_and_then_of_setting() -> None:
    deadlines: Deadlines[str] = Deadlines()
    for item, at_ms in (("late", 30), ("b", 20), ("a", 20), ("early", 10)):
        deadlines.set(item, at_ms)
    assert deadlines.next_ms() == 10

    assert deadlines.take_due(20) == ["early", "b", "a"]
    assert deadlines.take_due(20) == []
    assert deadlines.next_ms() == 30


def test_a_deadline_can_be_moved_and_taken_back() -> None:
    deadlines: Deadlines[str] = Deadlines()
    deadlines.set("moved", 10)
    deadlines.set("moved", 40)
    deadlines.set("gone", 10)
    deadlines.discard("gone")
    deadlines.discard("never there")

    assert deadlines.take_due(39) == []
    assert deadlines.next_ms() == 40
    assert "gone" not in deadlines


def test_it_agrees_with_a_plain_dict_and_does_not_grow_with_what_was_taken_back() -> None:
    deadlines: Deadlines[int] = Deadlines()
    model: dict[int, int] = {}
    chance = random.Random(1)
    for now_ms in range(3_000):
        item = chance.randrange(50)
        if chance.random() < 0.7:
            model[item] = now_ms + chance.randrange(1, 2_000)
            deadlines.set(item, model[item])
        else:
            model.pop(item, None)
            deadlines.discard(item)
        due = {i for i, at_ms in model.items() if at_ms <= now_ms}
        assert set(deadlines.take_due(now_ms)) == due
        model = {i: at_ms for i, at_ms in model.items() if i not in due}
        assert deadlines.next_ms() == min(model.values(), default=None)
        assert len(deadlines) == len(model)
        deadlines.check()
