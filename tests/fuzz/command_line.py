"""What is typed, most of it wrong: a message and an exit code, never a traceback, never
what the terminal would take for a command, and the same processes afterwards.

Method: a real cluster of one node, each command called in this process, with the options and
arguments that it has. `bench` is left out, which measures for minutes; a command that would end or
begin something by its default gets the name of a cluster that cannot be.
"""

from collections.abc import Sequence
from random import Random
from typing import Any

import click
import typer
from typer.testing import CliRunner

from kvray.watch.cli import app
from tests.fuzz.arguments import pids
from tests.fuzz.outcome import Outcome, rounds
from tests.ray_nodes import running_nodes

LEFT_OUT = {"bench"}
ACTS = {"start", "stop", "drain", "top"}
ESCAPE = "\x1b"
NO_CLUSTER = (
    "",
    "-",
    "A",
    "a/b",
    "..",
    "a" * 33,
    "\x1b[2J",
    "[red]a",
    "e\u0301",
    "a\nb",
    "default ",
)
TYPED = (
    *NO_CLUSTER,
    *("-1", "0", "1e9", "nan", "9" * 40, "0x10", "1,2,x", "[1, 2", "@", "@/dev/null", "@/nowhere"),
    *("=", "a=b", "slab_bytes=", "slab_bytes=-1", "200 GiB", "f" * 56, "--", "--no-such", "%s"),
    *("\u202etxt", "\udcff", "{}", "null", "a" * 100_000, "*", "$(id)", "; id"),
)
EXIT_CODES = {0, 1, 2}


def run(random: Random, seconds: float) -> Outcome:
    outcome = Outcome()
    group: Any = typer.main.get_command(app)
    commands: dict[str, click.Command] = {
        name: command for name, command in group.commands.items() if name not in LEFT_OUT
    }
    outcome.methods = len(commands)
    with running_nodes(1) as nodes:
        before = pids(nodes)
        for _ in rounds(outcome, seconds):
            name = random.choice(sorted(commands))
            words = [name, *_words(random, name, commands[name].params)]
            _type(words, outcome)
        if pids(nodes) != before:
            outcome.fail(f"other processes: {before} before, {pids(nodes)} now")
    return outcome


def _words(random: Random, name: str, parameters: Sequence[click.Parameter]) -> list[str]:
    """Some of the options, in any order, most with a wrong value, and now and then one too many."""
    words: list[list[str]] = []
    for parameter in parameters:
        if parameter.name == "cluster_name" or random.random() < 0.5:
            continue
        value = random.choice(TYPED)
        if isinstance(parameter, click.Option):
            option = random.choice(parameter.opts)
            words.append([option] if parameter.is_flag else [option, value])
        else:
            words.append([value])
    if name in ACTS or random.random() < 0.5:
        words.append(["--cluster", random.choice(NO_CLUSTER)])
    if random.random() < 0.2 or not words:
        words.append([random.choice(TYPED)])
    random.shuffle(words)
    return [word for group in words for word in group]


def _type(words: list[str], outcome: Outcome) -> None:
    shown = f"{[f'{word:.40}' for word in words]!r}"
    done = CliRunner().invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        outcome.fail(f"{shown}: {type(done.exception).__name__}: {done.exception}"[:400])
    elif done.exit_code not in EXIT_CODES:
        outcome.fail(f"{shown}: exit code {done.exit_code}")
    elif ESCAPE in done.output:
        outcome.fail(f"{shown}: what was typed goes to the terminal as it is")
