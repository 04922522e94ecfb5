"""What proves an engine, and what proving it may cost. Their names begin with "seam"."""

from typing import Final

from tests.mutants.mutant import Mutant, tested

_ROUNDS: Final = tested("tests/unit/test_canary_rounds.py")
_ALLOWED: Final = tested("tests/unit/test_audit_allowed.py")
_BUDGET: Final = tested("tests/property/test_audit_budget.py")

SEAM_PROOF: tuple[Mutant, ...] = (
    Mutant(
        "seam: a batch that rounds otherwise is taken for the engine's noise alone",
        "kvray.core.canary",
        (("elif self.round is Round.BATCHED and distance:", "elif False:"),),
        _ROUNDS,
    ),
    Mutant(
        "seam: a maker is named by what its first rank saw",
        "kvray.core.canary",
        (("rank.digest for rank in self._first)", "rank.digest for rank in self._first[:1])"),),
        _ROUNDS,
    ),
    Mutant(
        "seam: engines of other machines have one maker if their bytes are equal",
        "kvray.core.canary",
        (("*(dict(rank.machine) for rank in self._first)]", "]"),),
        _ROUNDS,
    ),
    Mutant(
        "seam: the noise of the best rank counts",
        "kvray.core.canary",
        (("max(rank.distance for rank in ranks)", "min(rank.distance for rank in ranks)"),),
        _ROUNDS,
    ),
    Mutant(
        "seam: new weights go on with the round that was due",
        "kvray.core.canary",
        (
            (
                "        self._tries = 0\n        self.round = Round.FIRST\n        if",
                "        self._tries = 0\n        if",
            ),
        ),
        _ROUNDS,
    ),
    Mutant(
        "seam: new weights keep the proof of the old ones",
        "kvray.core.canary",
        (
            (
                "        self.proof = None\n        self._blocks.clear()\n",
                "        self._blocks.clear()\n",
            ),
        ),
        _ROUNDS,
    ),
    Mutant(
        "seam: a request of an older round counts",
        "kvray.core.canary",
        (("        if req_id in self._blocks:\n", "        if True:\n"),),
        _ROUNDS,
    ),
    Mutant(
        "seam: a canary that was aborted is read as far as it went",
        "kvray.core.canary",
        (("block_ids if is_whole or req_id != self._canary_id else ()", "block_ids"),),
        _ROUNDS,
    ),
    Mutant(
        "seam: a canary that is aborted is tried for ever",
        "kvray.core.canary",
        (("        if self._tries >= MAX_TRIES:\n", "        if False:\n"),),
        _ROUNDS,
    ),
    Mutant(
        "seam: what audits have cost is forgotten",
        "kvray.core.audit",
        (("lent_tokens if is_audited else 0", "0"),),
        _BUDGET,
    ),
    Mutant(
        "seam: what was lent and not spent is never given back",
        "kvray.core.audit",
        (("        self._lent_tokens -= lent_tokens\n", ""),),
        _BUDGET,
    ),
    Mutant(
        "seam: what a look-up of nobody was lent is never given back",
        "kvray.engine.lookups",
        (("            self._audits.settle(audit_tokens, is_audited=False)\n", ""),),
        _ALLOWED,
    ),
    Mutant(
        "seam: an audit in a hybrid model costs one chunk",
        "kvray.engine.lookups",
        (("        if len(self._tokens_per_chunk) > 1:\n", "        if False:\n"),),
        _ALLOWED,
    ),
    Mutant(
        "seam: an audit is taken for one that cost nothing",
        "kvray.engine.lookups",
        (("is_audited = MissReason.AUDITED in view.ticket.causes.values()", "is_audited = False"),),
        _ALLOWED,
    ),
    Mutant(
        "seam: a node audits whom it is not allowed to",
        "kvray.core.lookups",
        (("message.may_audit and self._audits.is_due", "self._audits.is_due"),),
        tested("tests/unit/test_audit.py"),
    ),
)
