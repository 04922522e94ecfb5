"""What the directory is told, and what it makes of it."""

from tests.mutants.mutant import Mutant, simulated, tested

BUGS: tuple[Mutant, ...] = (
    # -- what the directory is told ----------------------------------------------------------------
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
    # -- the directory -----------------------------------------------------------------------------
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
)
