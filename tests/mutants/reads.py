"""How blocks come from peers: the proof of a read, peers, what is coming."""

from tests.mutants.mutant import Mutant, simulated, tested

BUGS: tuple[Mutant, ...] = (
    # -- the proof of a read -----------------------------------------------------------------------
    Mutant(
        "headers are not looked at",
        "kvray.core.reads",
        (
            (
                "    return proven\n",
                "    return np.ones_like(proven)\n",
            ),
        ),
        simulated(20),
    ),
    Mutant(
        "what an abandoned payload had is lost when its headers come with it",
        "kvray.core.fetch",
        (
            (
                (
                    "extend(freed)\n            return self._take()\n"
                    "        read = self._reads.end(read_id, came=True"
                ),
                (
                    "extend(())\n            return self._take()\n"
                    "        read = self._reads.end(read_id, came=True"
                ),
            ),
        ),
        tested("tests/unit/test_fetch.py"),
    ),
    Mutant(
        "any generation is proof",
        "kvray.core.reads",
        (('    proven &= headers["generation"] == generations\n', ""),),
        tested("tests/unit/test_fetch.py"),
    ),
    Mutant(
        "any state is proof",
        "kvray.core.reads",
        (('    proven &= headers["state"] == _READY\n', ""),),
        tested("tests/unit/test_fetch.py"),
    ),
    Mutant(
        "an abandoned read frees its targets at once",
        "kvray.core.reads",
        (
            (
                (
                    "_Abandoned(read.peer, read.targets)\n"
                    "            yield QuarantineTargets(read.read_id, read.targets)"
                ),
                "_Abandoned(read.peer, ())\n            yield ReleaseTargets(read.targets)",
            ),
        ),
        simulated(20),
    ),
    # -- peers -------------------------------------------------------------------------------------
    Mutant(
        "a peer that failed is never asked again",
        "kvray.core.peers",
        (
            (
                "self.avoid_until_ms = now_ms + self._avoid_ms",
                "self.avoid_until_ms = now_ms + 3_600_000",
            ),
        ),
        simulated(20),
    ),
    Mutant(
        "a peer that failed is not avoided",
        "kvray.core.peers",
        (("self.avoid_until_ms = now_ms + self._avoid_ms", "self.avoid_until_ms = now_ms"),),
        tested("tests/unit/test_fetch.py"),
    ),
    # -- what is coming ----------------------------------------------------------------------------
    Mutant(
        "a load copies what has not come yet",
        "kvray.node.mapped",
        (
            (
                "        ready = fits & (states == SlotState.READY)\n        if not",
                "        ready = fits\n        if not",
            ),
        ),
        tested("tests/unit/test_early_load.py"),
    ),
    Mutant(
        "the simulator's workers copy what has not come yet",
        "tests.sim.copies",
        ((" if self._keeps(self._blocks[n])}", "}"),),
        simulated(40),
    ),
    Mutant(
        "a slot reserved ahead is kept when nobody wants the block any more",
        "kvray.core.fetch",
        (
            (
                "            self._commands.append(ReleaseTargets((fetch.target,)))\n",
                "            pass\n",
            ),
        ),
        tested("tests/unit/test_fetch.py"),
    ),
    Mutant(
        "a block that was dropped is read when its turn comes",
        "kvray.core.turns",
        (
            (
                "        return [fetch for fetch in batch if fetch.state is FetchState.RESERVED]\n",
                "        return batch\n",
            ),
        ),
        tested("tests/unit/test_fetch.py"),
    ),
)
