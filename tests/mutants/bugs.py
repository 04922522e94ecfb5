"""The bugs. Each names the cheapest check that finds it: seeds of the simulator, or tests.

A check of the simulator is a range of seeds that ends at the first failure; where a unit test is
named, the simulator can not see the bug (it costs hits and never a byte), or only by rare luck.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """edits: exact text of the module, and what stands there instead. check: a module to run as
    python -m, with its arguments; it must fail.
    """

    name: str
    module: str
    edits: tuple[tuple[str, str], ...]
    check: tuple[str, ...]


def simulated(seeds: int, first: int = 0) -> tuple[str, ...]:
    """Virtual clusters, one process."""
    return ("tests.sim", "--first", str(first), "--seeds", str(seeds), "--jobs", "1")


def tested(*names: str) -> tuple[str, ...]:
    """pytest, of these files or tests."""
    return ("pytest", "-q", "-x", "-p", "no:cacheprovider", *names)


BUGS: tuple[Mutant, ...] = (
    # -- the proof of a read ---------------------------------------------------------------------
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
    # -- slots and writers -----------------------------------------------------------------------
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
        simulated(20, first=20),
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
    # -- pins and waits --------------------------------------------------------------------------
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
    # -- peers -----------------------------------------------------------------------------------
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
    # -- what is coming --------------------------------------------------------------------------
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
    # -- what the directory is told --------------------------------------------------------------
    Mutant(
        "a remove cancels an add that replaces an older place",
        "kvray.core.changes",
        ((" is None or key in self._replacing:", " is None:"),),
        simulated(40),
    ),
    Mutant(
        "a resync lists what is told as a change, too",
        "kvray.core.changes",
        (("        return key in self._adds\n", "        return False\n"),),
        tested("tests/unit/test_node_cluster.py"),
    ),
    Mutant(
        "an answer to an old call counts for the latest",
        "kvray.core.announcing",
        (("if call_id not in self._said_ids or said is None:", "if said is None:"),),
        tested("tests/unit/test_announcing.py"),
    ),
    Mutant(
        "a buried node comes back with its epoch",
        "kvray.core.announcing",
        (("Epoch(max(self.info.epoch + 1, ", "Epoch(max(self.info.epoch, 0 * "),),
        simulated(20),
    ),
    Mutant(
        "an epoch is older than its hello says",
        "kvray.core.announcing",
        (
            (
                "        self._sequence = 0\n",
                "        self._born_ms, self._sequence = now_ms + self._wall_clock_offset_ms, 0\n",
            ),
        ),
        tested("tests/unit/test_node_cluster.py"),
    ),
    Mutant(
        "the heartbeat stays rare when an engine asks",
        "kvray.core.node",
        (("        self._announcing.note_use(now_ms)\n", ""),),
        tested("tests/unit/test_announcing.py"),
    ),
    Mutant(
        "each question of an engine hurries the heartbeat",
        "kvray.core.announcing",
        (("if now_ms - self._used_ms >= self._limits.quiet_after_ms:", "if True:"),),
        tested("tests/unit/test_announcing.py"),
    ),
    Mutant(
        "a node has no more time than its last heartbeat period",
        "kvray.core.roster",
        (
            (
                "max(member.told_ms, member.told_before_ms)\n            if",
                "member.told_ms\n            if",
            ),
        ),
        tested("tests/unit/test_directory.py"),
    ),
    Mutant(
        "who has left the roster is still known to a node",
        "kvray.core.announcing",
        (("            left = set(news.left)\n", "            left = set[NodeId]()\n"),),
        tested("tests/unit/test_announcing.py"),
    ),
    Mutant(
        "news of a roster that a node does not know are believed",
        "kvray.core.announcing",
        (("if news.since not in (0, self._roster_version):", "if False:"),),
        tested("tests/unit/test_announcing.py"),
    ),
    # -- the directory ---------------------------------------------------------------------------
    Mutant(
        "a change of the roster is told to nobody who has missed one before",
        "kvray.core.roster",
        (("            if version <= since:\n", "            if version <= self.version - 1:\n"),),
        tested("tests/unit/test_directory.py"),
    ),
    Mutant(
        "an announce of a lower epoch is believed",
        "kvray.core.directory",
        (
            (
                "if announce.epoch < member.epoch or not member.is_listed:",
                "if not member.is_listed:",
            ),
        ),
        simulated(40),
    ),
    Mutant(
        "what a buried node had can still be located",
        "kvray.core.directory",
        (("            mirror.drop()\n", ""),),
        simulated(20),
    ),
    Mutant(
        "the asker is told of itself",
        "kvray.core.directory",
        (("without=own.listing if own else None", "without=None"),),
        simulated(5),
    ),
    Mutant(
        "a suspect is never buried",
        "kvray.core.roster",
        (("                dead.append(member)\n", "                pass\n"),),
        simulated(20),
    ),
    Mutant(
        "an announce that comes twice counts twice",
        "kvray.core.mirror",
        (("if announce.sequence <= self.sequence:", "if False:"),),
        tested("tests/unit/test_directory.py"),
    ),
    Mutant(
        "what was said before a hello counts after it",
        "kvray.core.mirror",
        (("        self.sequence = sequence\n", "        self.sequence = 0\n"),),
        tested("tests/unit/test_directory.py"),
    ),
    Mutant(
        "a gap in the numbers is not noticed",
        "kvray.core.mirror",
        (
            (
                "            self._counts.gaps += 1\n            self._want()\n",
                "            self._counts.gaps += 1\n",
            ),
        ),
        tested("tests/unit/test_directory.py"),
    ),
    Mutant(
        "a resync adds to what is there",
        "kvray.core.mirror",
        (
            (
                "self._catalogue.add(self.collected, adds, keep=True)",
                "self._catalogue.add(self.listing, adds)",
            ),
            (
                (
                    "        self._catalogue.drop(self.listing)\n"
                    "        self.listing, self.collected = self.collected, None\n"
                ),
                "        self._catalogue.drop(self.collected)\n        self.collected = None\n",
            ),
        ),
        simulated(20, first=10),
    ),
    Mutant(
        "a resync empties first",
        "kvray.core.mirror",
        (
            (
                "            self.collected = self._open()\n",
                (
                    "            self.collected = self._open()\n"
                    "            self._catalogue.remove(\n"
                    "                self.listing, self._catalogue.entries_of(self.listing)[\n"
                    "                    ['low', 'high']\n"
                    "                ].tobytes()\n"
                    "            )\n"
                ),
            ),
        ),
        tested("tests/unit/test_directory.py"),
    ),
    # -- which block goes ------------------------------------------------------------------------
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
    # -- break-even ------------------------------------------------------------------------------
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
    # -- leaving ---------------------------------------------------------------------------------
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
