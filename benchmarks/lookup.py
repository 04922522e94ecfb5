"""What the control path costs: look-ups at the NodeStore and at the directory, and registering.

lookup_us, bare_lookup_us, paused_..., held, local_client_operations, echo, p99_over_echo,
engine_hello_bye_ms
                                               at the NodeStore: lookup_local, lookup_load
register_p50_ms, register_p99_ms               of a node at the directory: lookup_registering
locate_us ... one_actor                        at the directory: lookup_directory

python benchmarks/lookup.py [--json] [--smoke]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.bars import Bar, at_least, at_most
from benchmarks.measure import finish

MAX_LOOKUP_US = {1: 60.0, 64: 100.0, 512: 300.0}
MAX_HELD_RATIO = 2.0  # a slot that is held must not slow down what does not need it
MIN_OPERATIONS_PER_S, MAX_OPERATION_P99_MS, MAX_P99_OVER_ECHO = 5_000.0, 10.0, 3.0
MAX_HELLO_BYE_P99_MS = 5.0
MAX_REGISTER_P99_MS = 10.0

console = Console(stderr=True)


def bars(result: dict[str, Any]) -> list[Bar]:
    operations = result["local_client_operations"]
    clients = f"{operations['clients']} clients"
    most = {
        f"look-up of {count} keys, p50 us": (result["lookup_us"][str(count)]["p50"], bound)
        for count, bound in MAX_LOOKUP_US.items()
    }
    for name, held in result["held"].items():
        if name != "nothing":
            most[f"64 keys, one slot {name}: p99 ratio"] = (held["ratio"], MAX_HELD_RATIO)
    most |= {
        f"{clients}, p99 ms": (operations["p99_ms"], MAX_OPERATION_P99_MS),
        f"{clients}, p99 over echo's": (result["p99_over_echo"], MAX_P99_OVER_ECHO),
        f"{clients} at an equal rate, p99 over echo's": (
            result["p99_over_echo_paced"],
            MAX_P99_OVER_ECHO,
        ),
        "hello, bye of an engine, p99 ms": (
            result["engine_hello_bye_ms"]["p99"],
            MAX_HELLO_BYE_P99_MS,
        ),
        "register a node, p99 ms": (result["register_p99_ms"], MAX_REGISTER_P99_MS),
    }
    rate = operations["operations_per_s"]
    return [
        at_least(MIN_OPERATIONS_PER_S, f"{clients}, operations/s", rate),
        *(at_most(bound, what, found) for what, (found, bound) in most.items()),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table("what", "p50", "p99")
    for count, times in result["lookup_us"].items():
        table.add_row(f"look-up of {count} keys", f"{times['p50']} us", f"{times['p99']} us")
    for key, name in (("paused_lookup_us", "NodeStore"), ("paused_bare_lookup_us", "echo")):
        times = result[key]["1"]
        table.add_row(f"1 key after a pause: {name}", f"{times['p50']} us", f"{times['p99']} us")
    for name, times in result["held"].items():
        table.add_row(f"64 keys, one slot held: {name}", "", f"{times['p99_us']} us")
    for key, name in (
        ("local_client_operations", "NodeStore"),
        ("echo", "echo server"),
        ("local_client_operations_paced", "NodeStore, paced"),
        ("echo_paced", "echo server, paced"),
    ):
        rate = f"{result[key]['operations_per_s']:,} operations/s"
        times = result[key]
        table.add_row(f"{name}, {rate}", f"{times['p50_ms']} ms", f"{times['p99_ms']} ms")
    for key, name in (
        ("engine_hello_bye_ms", "hello, bye of an engine"),
        ("engine_hello_bye_loaded_ms", "the same beside the clients"),
    ):
        table.add_row(name, f"{result[key]['p50']} ms", f"{result[key]['p99']} ms")
    registering = (f"{result['register_p50_ms']} ms", f"{result['register_p99_ms']} ms")
    table.add_row("register or deregister a node", *registering)
    Console().print(table)


def show_all(result: dict[str, Any]) -> None:
    from benchmarks import lookup_directory

    show(result)
    lookup_directory.show(result)


def main() -> int:
    parser = argparse.ArgumentParser(description="what look-ups and registering cost")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="a short run that is held to nothing")
    arguments = parser.parse_args()
    smoke: bool = arguments.smoke
    # Not above: the clients of lookup_load are processes that load this file again, and shall not
    # load Ray with it.
    from benchmarks import lookup_directory
    from benchmarks.lookup_local import measure_local
    from benchmarks.lookup_registering import measure_registering

    result = {
        **measure_local(smoke=smoke),
        **measure_registering(smoke=smoke),
        **lookup_directory.measure_directory(smoke=smoke),
    }
    promises = [*bars(result), *lookup_directory.bars(result)]
    return finish(
        "lookup",
        result,
        promises,
        n=result["lookup_us"]["1"]["n"],
        as_json=arguments.json,
        is_smoke=smoke,
        show=lambda: show_all(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
