"""A copy job is over when every rank has reported it, and good only if no rank failed."""

import pytest

from kvray.engine.ledger import JobKind, JobLedger, Outcome


def test_a_store_is_good_only_when_every_rank_has_copied_its_part() -> None:
    ledger: JobLedger[str] = JobLedger(rank_count=2)
    ledger.begin(7, JobKind.STORE, "slots")

    assert ledger.report({7: 1}, failed=()) == []
    (finished,) = ledger.report({7: 1}, failed=())

    assert (finished.subject, finished.outcome) == ("slots", Outcome.GOOD)
    assert len(ledger) == 0


def test_one_failed_rank_fails_the_store_even_if_the_others_report_later() -> None:
    ledger: JobLedger[str] = JobLedger(rank_count=2)
    ledger.begin(1, JobKind.STORE, "slots")

    assert ledger.report({1: 1}, failed={1}) == []
    (finished,) = ledger.report({1: 1}, failed=())

    assert finished.outcome is Outcome.FAILED


def test_what_was_under_way_when_the_weights_changed_is_void_and_still_waits_for_each_rank() -> (
    None
):
    ledger: JobLedger[str] = JobLedger(rank_count=2)
    ledger.begin(1, JobKind.STORE, "old")
    ledger.report({1: 1}, failed=())
    ledger.renew()
    ledger.begin(2, JobKind.STORE, "new")

    assert ledger.void_before == 2
    outcomes = [f.outcome for f in ledger.report({1: 1, 2: 2}, failed=())]

    assert outcomes == [Outcome.VOID, Outcome.GOOD]
    ledger.check()


def test_a_job_of_a_connector_before_this_one_is_skipped() -> None:
    ledger: JobLedger[str] = JobLedger(rank_count=1)

    assert ledger.report({99: 1}, failed={99}) == []


def test_a_rank_that_reports_twice_is_a_bug() -> None:
    ledger: JobLedger[str] = JobLedger(rank_count=1)
    ledger.begin(1, JobKind.LOAD, "request")

    with pytest.raises(AssertionError, match="twice"):
        ledger.report({1: 2}, failed=())


def test_open_jobs_of_a_kind_are_listed_for_a_hello() -> None:
    ledger: JobLedger[str] = JobLedger(rank_count=1)
    ledger.begin(1, JobKind.STORE, "a")
    ledger.begin(2, JobKind.LOAD, "b")
    ledger.begin(3, JobKind.STORE, "c")

    assert ledger.subjects(JobKind.STORE) == ["a", "c"]
