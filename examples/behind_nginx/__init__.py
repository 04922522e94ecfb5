"""Two `vllm serve` behind nginx, in turn. What one has read, the other knows.

    client ──HTTP──▶ nginx, round robin ──▶ vllm serve 0 ──▶ NodeStore of node 0 ┐
                                        ──▶ vllm serve 1 ──▶ NodeStore of node 1 ┘ NIXL

    __main__.py    one command: all of it, prompts that prove it, and nothing left over
    scene.py       Ray with two nodes, kvray on it, the engines and the balancer, started and ended
    servers.py     the command line of `vllm serve` with kvray's connector
    vllm_command.py  the program `vllm`, which does not start by itself in vLLM's CPU build
    balancer.py    nginx.conf, filled in and run as a child in a folder of its own
    asking.py      prompts over HTTP, and out of which cache their tokens came
    processes.py   a command in a process group of its own
    errors.py      what is missing, and what to do

Two Ray nodes on one machine stand for two hosts, so that what the second engine reuses has come
from a peer. On hosts of their own the engines need no setting beside the plain JSON.
"""
