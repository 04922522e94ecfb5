"""Seeded fuzzers: what anybody can send, from the wire to the command line.

python -m tests.fuzz [--seconds S] [--seed N] [--only TARGET ...] [--json]
"""
