"""Makers and trust: whose blocks count. Their names begin with "seam"."""

from typing import Final

from tests.mutants.mutant import Mutant, simulated, tested

_TRUST: Final = "tests/unit/test_trust.py"
_AUDIT: Final = "tests/unit/test_audit.py"
_BUDGET: Final = "tests/property/test_audit_budget.py"
_COMPARING: Final = "tests/unit/test_comparing.py"

SEAM_TRUST: tuple[Mutant, ...] = (
    Mutant(
        "seam: a block that is here counts whoever made it",
        "kvray.core.look",
        (
            (
                "return None if self._trusted.accepts(block.place.maker) else MissReason.UNTRUSTED",
                "return None",
            ),
        ),
        simulated(12),
    ),
    Mutant(
        "seam: a source counts whoever made it",
        "kvray.core.fetch",
        (("elif not fetch.may_come_from(source):", "elif not fetch.sources and False:"),),
        tested(f"{_TRUST}::test_blocks_of_a_maker_that_computes_something_else_are_never_fetched"),
    ),
    Mutant(
        "seam: what arrives counts for each waiter whoever made it",
        "kvray.core.lookups",
        (
            (
                "if place is not None and not lookup.accepts(place):",
                "if place is not None and not lookup.waiting:",
            ),
        ),
        simulated(60),
    ),
    Mutant(
        "seam: a slot that is coming is told to a waiter who does not trust its maker",
        "kvray.core.lookups",
        (
            (
                "if index is not None and lookup.accepts(place):",
                "if index is not None:",
            ),
        ),
        tested(_TRUST),
    ),
    Mutant(
        "seam: a copy loses its maker",
        "kvray.core.fetching",
        (
            (
                "reserve_targets(wants, makers, now_ms, evicts=evicts)",
                "reserve_targets(wants, [Maker(1 << 32 | 1)] * len(makers), now_ms, evicts=evicts)",
            ),
        ),
        simulated(12),
    ),
    Mutant(
        "seam: a header that names another maker than the location proves a fetch",
        "kvray.core.reads",
        (('    proven &= headers["maker"] == makers\n', ""),),
        tested("tests/unit/test_fetch.py"),
    ),
    Mutant(
        "seam: a verdict without a proof of the headers",
        "kvray.node.comparing",
        (("errors is None or not (", "errors is None or False and ("),),
        tested(_TRUST, _COMPARING),
    ),
    Mutant(
        "seam: the generation is read before the state",
        "kvray.node.comparing",
        (
            (
                (
                    '    if int(row["state"][0]) != SlotState.READY:\n'
                    "        return False\n"
                    "    memory_barrier()\n"
                    "    return (\n"
                    '        int(row["generation"][0]) == place.generation\n'
                ),
                (
                    "    return (\n"
                    '        int(row["generation"][0]) == place.generation\n'
                    '        and int(row["state"][0]) == SlotState.READY\n'
                ),
            ),
        ),
        tested(_COMPARING),
    ),
    Mutant(
        "seam: who has just come trusts every maker",
        "kvray.core.trusted",
        (
            (
                "        self._met = met\n",
                "        self._met = met\n        self.makers |= {1 << 32 | 1, 2 << 32 | 1}\n",
            ),
        ),
        simulated(12),
    ),
    Mutant(
        "seam: the two sides of a pair are swapped when one is trusted",
        "kvray.core.trust",
        (
            (
                "self._remember(namespace, mine).makers.add(other)",
                "self._remember(namespace, other).makers.add(mine)",
            ),
        ),
        simulated(12),
    ),
    Mutant(
        "seam: a maker is compared with itself",
        "kvray.core.trust",
        (
            (
                "return canary_keys(namespace, mine, group), canary_keys(namespace, other, group)",
                "return canary_keys(namespace, mine, group), canary_keys(namespace, mine, group)",
            ),
            (
                "mark_of(shape.slot_bytes, mine), mark_of(shape.slot_bytes, other)",
                "mark_of(shape.slot_bytes, mine), mark_of(shape.slot_bytes, mine)",
            ),
        ),
        simulated(12),
    ),
    Mutant(
        "seam: one chunk that is alike is enough",
        "kvray.core.trust",
        (
            (
                "if found and all(verdict is Verdict.EQUAL for verdict in found):",
                "if found and any(verdict is Verdict.EQUAL for verdict in found):",
            ),
        ),
        tested(_TRUST),
    ),
    Mutant(
        "seam: a verdict that comes after its deadline counts",
        "kvray.core.trust",
        (
            (
                (
                    "        if contact is None or contact.state is not TrustState.COMPARING:\n"
                    "            return\n"
                ),
                (
                    "        if contact is None:\n"
                    "            contact = next(iter(self._contacts.values()))\n"
                    "            contact.state = TrustState.COMPARING\n"
                    "            contact.op = OpId(comparison_id)\n"
                    "            self._by_op[contact.op] = contact\n"
                ),
            ),
        ),
        tested(_TRUST),
    ),
    Mutant(
        "seam: a canary is not pinned while it is compared",
        "kvray.core.trust",
        (
            (
                "places = self._store.pin(holder, keys, slot_bytes=None, now_ms=now_ms)",
                "places = [self._store.find(key) for key in keys]",
            ),
        ),
        tested(_TRUST),
    ),
    Mutant(
        "seam: what was forgotten is trusted on",
        "kvray.core.trust",
        (("            trusted.makers.discard(other)\n", ""),),
        tested(_TRUST),
    ),
    Mutant(
        "seam: an engine without a maker is served",
        "kvray.core.trust",
        (("if maker == UNKNOWN_MAKER and self._requires_proof:", "if maker < 0:"),),
        tested(_TRUST),
    ),
    Mutant(
        "seam: like machines are held to their noise only",
        "kvray.core.tolerance",
        (("maker_class(mine) == maker_class(other)", "mine == other"),),
        tested(_TRUST),
    ),
    Mutant(
        "seam: what was stored for an audit takes the place of the block",
        "kvray.core.copies_compared",
        (
            (
                "        self._store.unpin((TRUST, op))\n        self._store.evict(name)\n",
                "        self._store.unpin((TRUST, op))\n",
            ),
        ),
        tested(_AUDIT),
    ),
    Mutant(
        "seam: an audit that differs is no alarm, however often",
        "kvray.core.trust",
        (("contact.mismatches += 1", "contact.mismatches = 1"),),
        tested(_AUDIT),
    ),
    Mutant(
        "seam: the credit of audits is saved up without end",
        "kvray.core.audit",
        (
            (
                "self._credit = min(1.0, self._credit + self._rate * count)",
                "self._credit = self._credit + self._rate * count",
            ),
        ),
        tested(_AUDIT),
    ),
    Mutant(
        "seam: an engine allows audits whatever they have cost",
        "kvray.core.audit",
        (("after_tokens > MAX_PREFILL_SHARE * computed_tokens", "cost_tokens < 0"),),
        tested(_BUDGET),
    ),
    Mutant(
        "seam: two look-ups side by side are lent the same tokens for an audit",
        "kvray.core.audit",
        (
            (
                "self.spent_tokens + self._lent_tokens + cost_tokens",
                "self.spent_tokens + cost_tokens",
            ),
        ),
        tested(_BUDGET),
    ),
    Mutant(
        "seam: each page of a long chain may end in an audit",
        "kvray.node.client",
        (("may_audit=may_audit and cut.stop == len(ticket.keys)", "may_audit=may_audit"),),
        tested("tests/unit/test_node_client.py"),
    ),
    Mutant(
        "seam: the slots of audits that were given up are counted for ever",
        "kvray.core.node",
        (
            (
                (
                    "                keys = self._storing.abandon(client, message)\n"
                    "                self._audits.end(keys)\n"
                ),
                "                keys = self._storing.abandon(client, message)\n",
            ),
        ),
        tested(_AUDIT),
    ),
    Mutant(
        "seam: an audit compares with the maker that has taken the key since",
        "kvray.core.copies_compared",
        (("if block is not None and block.place.maker in trusted:", "if block is not None:"),),
        tested(_AUDIT),
    ),
    Mutant(
        "seam: an audit's mismatch is news of a maker that is known to be different",
        "kvray.core.trust",
        ((" or contact.state is not TrustState.EQUAL:\n", ":\n"),),
        tested(_AUDIT),
    ),
)
