"""Slots: who writes into them, who has pinned them, who waits for them."""

from tests.mutants.mutant import Mutant, simulated, tested

BUGS: tuple[Mutant, ...] = (
    # -- slots and writers -------------------------------------------------------------------------
    Mutant(
        "a hello lists what is written, and nobody listens",
        "kvray.core.storing",
        (
            (
                (
                    "listed = {(slot, generation) for slot, generation, _ in"
                    " unpack_slots(hello.writing)}"
                ),
                "listed: set[object] = set()",
            ),
        ),
        simulated(20),
    ),
    Mutant(
        "slots of a dead engine are free though its workers live",
        "kvray.core.storing",
        (
            (
                "if not engine.is_engine or not self._clients.writers_of(engine):",
                "if True:",
            ),
        ),
        tested("tests/unit/test_node_core.py"),
    ),
    Mutant(
        "a closed session frees what its client writes",
        "kvray.core.node",
        (
            (
                (
                    "            self._lookups.end_session(client.client_id)\n"
                    "        return self._finish(now_ms)"
                ),
                (
                    "            self._give_up(client, 'closed', now_ms)\n"
                    "            self._storing._release_by(client.row)\n"
                    "        return self._finish(now_ms)"
                ),
            ),
        ),
        simulated(20),
    ),
    Mutant(
        "a restart frees what engines write",
        "kvray.core.storing",
        (("range(MAX_CLIENTS) if row not in taken)", "range(MAX_CLIENTS))"),),
        simulated(20),
    ),
    Mutant(
        "a restart forgets WRITING slots",
        "kvray.core.adoption",
        (
            (
                "        kept.append(row)\n",
                (
                    "        if row.state is SlotState.WRITING:\n            continue\n"
                    "        kept.append(row)\n"
                ),
            ),
        ),
        simulated(20),
    ),
    Mutant(
        "a restart uses generations again",
        "kvray.core.slots",
        (
            (
                "max(1, generation_mark)\n        self",
                "max(1, generation_mark - 4_000)\n        self",
            ),
        ),
        simulated(20),
    ),
    Mutant(
        "a commit counts for another generation",
        "kvray.core.store",
        (
            (
                "if mine is None or block is None or block.place.generation != generation:",
                "if mine is None or block is None:",
            ),
            (
                "block.place if block is not None and block.place.generation == generation else",
                "block.place if block is not None else",
            ),
        ),
        simulated(20),
    ),
    Mutant(
        "an eviction is not written down",
        "kvray.core.slots",
        (
            (
                "        self.evicted_count += 1\n        self._write_header(block, ABSENT)\n",
                "        self.evicted_count += 1\n",
            ),
        ),
        simulated(5),
    ),
    Mutant(
        "answers leave before the slab says so",
        "kvray.core.node",
        (
            (
                "[*self._storing.drain_effects(), *self._out]",
                "[*self._out, *self._storing.drain_effects()]",
            ),
        ),
        simulated(5),
    ),
    # -- pins and waits ----------------------------------------------------------------------------
    Mutant(
        "unpin forgets a block",
        "kvray.core.store",
        (("self._slots.unpin(reversed(held), ", "self._slots.unpin(list(held)[1:], "),),
        simulated(5),
    ),
    Mutant(
        "a pinned block may be evicted",
        "kvray.core.store",
        (
            ("        self._slots.pin(new, now_ms)\n", ""),
            ("            self._slots.pin(held, now_ms)\n", ""),
            ("        self._slots.unpin(reversed(held), is_hit=True)\n", ""),
            ('            assert block.pins == pins.get(slot, 0), "a pin has leaked"\n', ""),
            ('                assert blocks.get(slot) is block, "pinned, but gone"\n', ""),
        ),
        simulated(5),
    ),
    Mutant(
        "pins of a client that is gone stay",
        "kvray.core.store",
        (
            (
                (
                    "[holder for holder in self._pins if holder[0] == client]:\n"
                    "            self.unpin(holder)"
                ),
                "[holder for holder in self._pins if holder[0] == client]:\n            pass",
            ),
        ),
        simulated(20),
    ),
    Mutant(
        "a fetch has no deadline",
        "kvray.core.waits",
        (("self._deadlines.set(waiter, deadline_ms)", "self._deadlines.set(waiter, 2**62)"),),
        simulated(20),
    ),
    Mutant(
        "the simulator's engines wait for an answer for as long as it takes",
        "tests.sim.requests",
        (
            (
                (
                    '            self.engine.world.count("answer_overdue")\n'
                    "            self.lose()\n"
                ),
                "            pass\n",
            ),
        ),
        simulated(20),
    ),
    Mutant(
        "a wait goes on when its session has ended",
        "kvray.core.node",
        (
            (
                (
                    "            self._lookups.end_session(client.client_id)\n"
                    "        return self._finish(now_ms)"
                ),
                "            pass\n        return self._finish(now_ms)",
            ),
        ),
        simulated(20, first=15),
    ),
)
