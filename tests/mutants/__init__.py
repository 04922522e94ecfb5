"""Bugs planted on purpose, one at a time, in the real cores: the test of the tests.

__main__ ── each Mutant of `bugs` ──▶ a fresh process (plant) ──▶ its check ──▶ caught, or not
"""
