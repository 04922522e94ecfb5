"""Which block goes, what is worth a fetch, and what a leaving node leaves behind."""

from tests.mutants.mutant import Mutant, simulated, tested

BUGS: tuple[Mutant, ...] = (
    # -- which block goes --------------------------------------------------------------------------
    Mutant(
        "what peers read is not used",
        "kvray.core.announcing",
        (("        self._store.read(read, now_ms)\n", ""),),
        tested("tests/unit/test_hints.py"),
    ),
    Mutant(
        "what another node keeps is not spared",
        "kvray.core.announcing",
        (("        self._store.spare(spare)\n", ""),),
        tested("tests/unit/test_hints.py"),
    ),
    Mutant(
        "the home of a block spares it too",
        "kvray.core.directory",
        (("if listing != own and self", "if self"),),
        simulated(5),
    ),
    Mutant(
        "every holder of a block is its home",
        "kvray.core.uses",
        (("is_last = np.append(at[1:] != at[:-1], True)[: len(at)]", "is_last = at >= 0"),),
        tested("tests/unit/test_directory.py"),
    ),
    Mutant(
        "a suspect keeps blocks for others",
        "kvray.core.directory",
        ((" and self._shown[Listing(listing)].state is NodeState.ALIVE", ""),),
        tested("tests/unit/test_directory.py"),
    ),
    Mutant(
        "a scan takes what was used again",
        "kvray.core.eviction",
        (("        parts.proven.add(slot)\n", ""),),
        tested("tests/unit/test_eviction.py"),
    ),
    Mutant(
        "spares go last",
        "kvray.core.eviction",
        (
            (
                "            parts.spares,\n            parts.once,\n            parts.reused,\n",
                "            parts.once,\n            parts.reused,\n            parts.spares,\n",
            ),
        ),
        tested("tests/unit/test_eviction.py"),
    ),
    Mutant(
        "a block that is used stays a spare",
        "kvray.core.eviction",
        (
            (
                "            del parts.spares[slot]\n        else:\n            del parts.g",
                "            pass\n        else:\n            del parts.g",
            ),
        ),
        tested("tests/unit/test_eviction.py"),
    ),
    # -- break-even --------------------------------------------------------------------------------
    Mutant(
        "one bad moment of a link is believed for half a minute",
        "kvray.core.break_even",
        (("        elif not is_alike:\n            self._fresh_ms = FIRST_FRESH_MS\n", ""),),
        tested("tests/unit/test_break_even.py"),
    ),
    Mutant(
        "a slow step once keeps short chains from being asked for, for good",
        "kvray.core.break_even",
        (("return now_ms - self._last_ms < OVERHEAD_FRESH_MS", "return True"),),
        tested("tests/unit/test_break_even.py"),
    ),
    # -- leaving -----------------------------------------------------------------------------------
    Mutant(
        "what is taken over evicts what others need",
        "kvray.core.fetching",
        (
            (
                "evicts = not any(self._takeovers.wants(key) for key, _ in wants)",
                "evicts = True",
            ),
        ),
        tested("tests/unit/test_takeover.py"),
    ),
    Mutant(
        "a block that did not come counts as taken over",
        "kvray.core.takeover",
        (("        if not self._store.keep(key):\n            return False\n", ""),),
        tested("tests/unit/test_takeover.py"),
    ),
    Mutant(
        "a leaving node goes on storing",
        "kvray.core.node",
        (("        self._storing.is_draining = True\n", ""),),
        tested("tests/unit/test_takeover.py"),
    ),
)
