"""One-sided reads between two slabs: base says what a link is, nixl is the real one, loopback
serves tests and a single node.
"""
