"""The twelve bugs with which a reviewer tried the tests. Each has the check that finds it soonest;
with --simulator-only the simulator alone has to.

Two of them no schedule of real cores can show. A: where a block lies follows from its slot and its
bytes, which are compared, so the offset is there for a peer that has another geometry than it says.
E: a NodeCore tells no change between two parts of its set.
"""

from tests.mutants.mutant import Mutant, simulated, tested

BUGS: tuple[Mutant, ...] = (
    Mutant(
        "review A: the offset of a proof is not compared",
        "kvray.core.reads",
        (('    proven &= headers["offset"] == read.payload_offsets\n', ""),),
        tested("tests/unit/test_fetch.py"),
    ),
    Mutant(
        "review B: the extent generation is not compared at a restart",
        "kvray.core.adoption",
        (('        & (rows["extent_generation"] == extent_generation)\n', ""),),
        tested("tests/unit/test_store_restart.py"),
    ),
    Mutant(
        "review C: a worker without a session is no writer",
        "kvray.core.clients",
        (
            (
                "(not client.is_engine and client.engine_nonce == engine.engine_nonce)",
                (
                    "(not client.is_engine and client.engine_nonce == engine.engine_nonce"
                    " and client.session_id is not None)"
                ),
            ),
        ),
        tested("tests/unit/test_node_core.py"),
    ),
    Mutant(
        "review D: an epoch equal to the last is admitted",
        "kvray.core.roster",
        (
            (
                "wall_clock_ms, highest + 1 if asked <= highest else 0)",
                "wall_clock_ms, highest + 1 if asked < highest else 0)",
            ),
            (
                "            if granted != asked or asked <= highest:\n",
                "            if granted != asked or asked < highest:\n",
            ),
        ),
        tested("tests/unit/test_directory.py"),
    ),
    Mutant(
        "review E: a removal that could not be remembered is forgotten",
        "kvray.core.mirror",
        (("        if forgotten:\n", "        if False:\n"),),
        tested("tests/unit/test_directory.py", "tests/property/test_directory_machine.py"),
    ),
    Mutant(
        "review F: the header of a vacated slot is not written",
        "kvray.core.slots",
        (
            (
                (
                    "        del self.blocks[block.place.slot]\n"
                    "        self._write_header(block, ABSENT)\n"
                    "        self.extents.give_back"
                ),
                "        del self.blocks[block.place.slot]\n        self.extents.give_back",
            ),
        ),
        simulated(5),
    ),
    Mutant(
        "review G: the term of an announce is not compared",
        "kvray.core.directory",
        (("        if announce.term != self._term:\n", "        if False:\n"),),
        tested("tests/unit/test_directory.py"),
    ),
    Mutant(
        "review H: an announce is lost on error",
        "kvray.core.announcing",
        (
            (
                "            self._again_ms = min(self._again_ms, now_ms + self._retry_ms)\n",
                "            self._said = None\n            self._said_ids.clear()\n",
            ),
        ),
        tested("tests/unit/test_announcing.py"),
    ),
    Mutant(
        "review I: what an abandoned read had is never free again",
        "kvray.core.reads",
        (
            (
                "return [ReleaseTargets(abandoned.places)] if abandoned.places else []",
                "return []",
            ),
        ),
        tested("tests/unit/test_fetch.py"),
    ),
    Mutant(
        "review J: a late commit does not free its quarantined slot",
        "kvray.core.storing",
        (
            (
                (
                    "                keys.append(occupant.key)\n"
                    "            else:\n"
                    "                self._release_own(client, slot, generation)\n"
                    "        if keys:\n"
                ),
                "                keys.append(occupant.key)\n        if keys:\n",
            ),
        ),
        tested("tests/unit/test_node_core.py"),
    ),
    Mutant(
        "review K: a hello about another slab frees slots of this one",
        "kvray.core.storing",
        (
            (
                "if not client.is_engine or hello.slab_id != self._slab_id:",
                "if not client.is_engine:",
            ),
        ),
        tested("tests/unit/test_node_core.py"),
    ),
    Mutant(
        "review L: what has arrived is a hit whatever its size",
        "kvray.core.lookups",
        (("keys, slot_bytes=sizes, now_ms", "keys, slot_bytes=None, now_ms"),),
        tested("tests/unit/test_node_core.py"),
    ),
)
