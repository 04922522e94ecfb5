"""The seam to vLLM: what a request waits for and holds, and what ends that."""

from tests.mutants.mutant import Mutant, tested

LIFECYCLE = tested("tests/seam/test_lifecycle.py")
STATES = tested("tests/unit/test_request_states.py")
HELD = tested("tests/unit/test_held_requests.py")
TICKETS = tested("tests/unit/test_tickets.py")
CLIENT = tested("tests/unit/test_node_client.py")
SEAM_LIFECYCLE: tuple[Mutant, ...] = (
    # -- detach ----------------------------------------------------------------------------------
    Mutant(
        "seam: a detach keeps the answers that were given before it",
        "kvray.engine.lookups",
        (
            (
                "        self.draining = True\n        self._bar_all()\n",
                "        self.draining = True\n",
            ),
        ),
        LIFECYCLE,
    ),
    Mutant(
        "seam: a detach takes the connector out of a load",
        "kvray.engine.attach",
        (("    if left and not at_any_rate:\n        return left\n", ""),),
        LIFECYCLE,
    ),
    Mutant(
        "seam: a detach at its deadline forgets who was loading",
        "kvray.engine.attach",
        (("        versions.fail_loads(self)\n", ""),),
        LIFECYCLE,
    ),
    Mutant(
        "seam: a load that was reported is left to a scheduler without a connector",
        "kvray.engine.attach",
        (("    versions.promote_loaded(self.scheduler)\n", ""),),
        LIFECYCLE,
    ),
    Mutant(
        "seam: a detach forgets who was aborted under a load",
        "kvray.engine.versions",
        (
            (
                "            scheduler._free_blocks(request)  # noqa: SLF001\n",
                "            continue\n",
            ),
        ),
        LIFECYCLE,
    ),
    Mutant(
        "seam: reports of steps under way reach a scheduler without a connector",
        "kvray.engine.versions",
        (("            output.kv_connector_output = None\n", "            pass\n"),),
        LIFECYCLE,
    ),
    # -- switch-off ------------------------------------------------------------------------------
    Mutant(
        "seam: nobody is told of a switch-off",
        "kvray.engine.lookups",
        (("        self.switch.when_off(self.drain)\n", ""),),
        LIFECYCLE,
    ),
    Mutant(
        "seam: each half of EngineCore has a switch of its own",
        "kvray.engine.connector",
        (("self.lookups.switch if is_scheduler else Switch()", "Switch()"),),
        LIFECYCLE,
    ),
    Mutant(
        "seam: a worker that is off keeps it to itself",
        "kvray.engine.connector",
        (("        if meta.fault is not None:\n", "        if False:\n"),),
        LIFECYCLE,
    ),
    Mutant(
        "seam: a kvray that is off hears no report",
        "kvray.engine.connector",
        (
            (
                "    @guarded(lambda *_: [], also_off=True)\n    def _take_reports(",
                "    @guarded(lambda *_: [])\n    def _take_reports(",
            ),
        ),
        LIFECYCLE,
    ),
    Mutant(
        "seam: a kvray that is off commits what it has stored",
        "kvray.engine.connector",
        (
            (
                "job.outcome is Outcome.GOOD and self.switch.off is None",
                "job.outcome is Outcome.GOOD",
            ),
        ),
        LIFECYCLE,
    ),
    Mutant(
        "seam: a kvray that is off keeps what it has reserved",
        "kvray.engine.connector",
        (("        self._leave_if_off()\n", ""),),
        LIFECYCLE,
    ),
    # -- new weights -----------------------------------------------------------------------------
    Mutant(
        "seam: only what is cached taints, not what a request holds",
        "kvray.engine.versions",
        (("(held_blocks or not is_empty)", "(not is_empty)"),),
        LIFECYCLE,
    ),
    Mutant(
        "seam: every reset of the device's cache takes the taint away",
        "kvray.engine.connector",
        (("self.lookups.tainted and self.is_tainted()", "False"),),
        LIFECYCLE,
    ),
    Mutant(
        "seam: what was loaded under new weights counts",
        "kvray.engine.ledger",
        (("            job.void = True\n", ""),),
        tested("tests/unit/test_ledger.py"),
    ),
    # -- states, holds ---------------------------------------------------------------------------
    Mutant(
        "seam: what was barred under a load may store after it",
        "kvray.engine.requests",
        (
            (
                "s.LOADING_BARRED: {e.LOAD_ENDED: s.BARRED,",
                "s.LOADING_BARRED: {e.LOAD_ENDED: s.OPEN,",
            ),
        ),
        STATES,
    ),
    Mutant(
        "seam: after a failed load it asks again",
        "kvray.engine.requests",
        (("e.LOAD_FAILED: s.MISSING}", "e.LOAD_FAILED: s.OPEN}"),),
        STATES,
    ),
    Mutant(
        "seam: what could not be asked about waits without a deadline",
        "kvray.engine.holds",
        (
            (
                "return not view.held_s or time.monotonic() - view.held_s < self._deadline_s",
                "return True",
            ),
        ),
        HELD,
    ),
    Mutant(
        "seam: a look-up has no deadline",
        "kvray.engine.holds",
        (("return view.asked_s + self._deadline_s - time.monotonic()", "return 1.0"),),
        HELD,
    ),
    Mutant(
        "seam: a preempted request that is loaded again is told of as before",
        "kvray.engine.connector",
        (("self._without_loading(scheduler_output)", "scheduler_output"),),
        LIFECYCLE,
    ),
    # -- tickets, the outbox -----------------------------------------------------------------------
    Mutant(
        "seam: an update for what is being given back ends the session",
        "kvray.node.tickets",
        (("                if self.ticket.released:\n", "                if False:\n"),),
        TICKETS,
    ),
    Mutant(
        "seam: a commit that could not be said is forgotten",
        "kvray.node.telling",
        (("isinstance(dropped, Abandon | Commit) and", "False and"),),
        CLIENT,
    ),
    Mutant(
        "seam: a reservation is undone by its op alone",
        "kvray.node.telling",
        (
            (
                (
                    "        for rows in _pages(places):\n"
                    "            self._put(Abandon(self._next_op(), slab_id, rows))\n\n"
                    "    def unpin"
                ),
                "\n    def unpin",
            ),
        ),
        CLIENT,
    ),
    Mutant(
        "seam: a hello in the same epoch frees nothing",
        "kvray.core.storing",
        (
            (
                "                if (place.slot, place.generation) not in listed:\n",
                "                if False:\n",
            ),
        ),
        tested("tests/unit/test_node_core.py"),
    ),
)
