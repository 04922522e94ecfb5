"""How fast a block comes from a peer, next to raw NIXL and to memcpy.

    fetch_gb_per_s     payload and headers read by kvray's link thread, every block proven; from
                       the first read's being posted
    nixl_gb_per_s      the same payload by one NIXL transfer, with lists prepared once
    memcpy_gb_per_s    as many bytes inside one process
    ratio_to_nixl      fetch over nixl; median of the ratios of the interleaved rounds
    plan_ms            what FetchCore takes before it: sources and batches for all blocks. It is not
                       in the ratio: raw NIXL is told which slots to read
    ratio_with_plan    the same ratio with it
    stages             where the time of a fetch goes, if it is one read: see transfer_stages

    python benchmarks/transfer.py [--json] [--smoke] [--transports cma,tcp] [--rounds N]

1 to 256 slots of 64 KiB to 4 MiB, drawn anew in each round (seeded) over slabs with 2 GiB of
payload, between two processes of this machine. Each round begins with a read that warms its slots,
in the caches, too; then the ways take turns at being the first. What has come is compared with what
the owner has written, outside of what is timed: a word of each page, and every byte in the first
round of each case, which does not count. GB = 10^9 bytes.

The bar: fetches of 16 MiB and more at 0.9 of raw NIXL, at 0.75 for slots below 256 KiB. Exit code 1
if one is missed.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.bars import Bar, at_least
from benchmarks.measure import finish
from benchmarks.transfer_stages import medians_us
from kvray.core.layout import Geometry

SLOT_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
SLOT_COUNTS = (1, 4, 16, 64, 256)
PAYLOAD_BYTES = 2 << 30  # of each slab
EXTENT_BYTES = 64 << 20
TRANSPORTS = {"cma": None, "tcp": "tcp"}  # UCX_TLS; None: what UCX chooses on one host
ROUNDS = 21
SEED = 4
BAR_BYTES = 16 << 20  # smaller fetches have no bar: their latency is that of two threads
BARS = ((256 << 10, 0.9), (0, 0.75))  # slots of at least so many bytes, ratio
START_LIMIT_S = 120.0
CASE_LIMIT_S = 300.0  # 1 GiB over TCP on a busy machine, each way, for all rounds
WAYS = ("fetch", "nixl", "memcpy")

console = Console(stderr=True)


def geometry_of(payload_bytes: int) -> Geometry:
    """With the tables beside it: they take 1.6 percent of what they describe."""
    geometry = Geometry(payload_bytes + payload_bytes // 32 + (1 << 20), EXTENT_BYTES)
    assert geometry.extent_count * EXTENT_BYTES >= payload_bytes
    return geometry


def cases(payload_bytes: int, *, smoke: bool) -> list[tuple[int, int]]:
    """(slot bytes, slots); those that are more than half of a slab are left out."""
    counts = (1, 256) if smoke else SLOT_COUNTS
    sizes = SLOT_BYTES[:2] if smoke else SLOT_BYTES
    return [
        (size, count) for size in sizes for count in counts if size * count <= payload_bytes // 2
    ]


# ---- in a process for each transport: UCX reads UCX_TLS once


def measure_transport(
    pipe: Connection, transport: str, payload_bytes: int, rounds: int, *, smoke: bool
) -> None:
    """For each case sends a dict of seconds, one list a way and one for the plans, and the stages
    of its fetches.
    """
    ucx_tls = TRANSPORTS[transport]
    if ucx_tls is not None:
        os.environ["UCX_TLS"] = ucx_tls
    from benchmarks.transfer_pair import Reader, own

    geometry = geometry_of(payload_bytes)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs, geometry), daemon=True)
    owner.start()
    theirs.close()
    reader = Reader(ours, geometry, seed=SEED)
    pipe.send(None)
    cut_for = 0
    for slot_bytes, slots in cases(payload_bytes, smoke=smoke):
        if slot_bytes != cut_for:
            reader.cut(slot_bytes)
            cut_for = slot_bytes
        pipe.send(measure_case(reader, slots, rounds))
    reader.close()
    ours.close()
    owner.join(START_LIMIT_S)


def measure_case(
    reader: Any, slots: int, rounds: int
) -> tuple[dict[str, list[float]], list[dict[str, float] | None]]:
    taken_s: dict[str, list[float]] = {way: [] for way in (*WAYS, "plan")}
    stages: list[dict[str, float] | None] = []
    ways = reader.ways()
    for n in range(rounds + 1):
        reader.draw(slots)
        reader.read_raw()
        turned = WAYS if n % 2 else WAYS[::-1]  # none of them is always the first
        for way in turned:
            if way != "memcpy":
                reader.wipe()
            seconds = ways[way]()
            if way != "memcpy":
                reader.assert_arrived(every_word=n == 0)
            if n:
                taken_s[way].append(seconds)
        if n:
            taken_s["plan"].append(reader.plan_s)
            stages.append(reader.stages)
    return taken_s, stages


# ---- all of it


def measure(
    transports: list[str], payload_bytes: int, rounds: int, *, smoke: bool
) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    for transport in transports:
        ours, theirs = context.Pipe()
        # Not a daemon: it has a child of its own.
        process = context.Process(
            target=measure_transport,
            args=(theirs, transport, payload_bytes, rounds),
            kwargs={"smoke": smoke},
        )
        process.start()
        theirs.close()
        try:
            receive(ours, START_LIMIT_S)
            for slot_bytes, slots in track(
                cases(payload_bytes, smoke=smoke), f"over {transport}", console=console
            ):
                taken_s, stages = receive(ours, CASE_LIMIT_S)
                yield row_of(transport, slot_bytes, slots, taken_s) | {"stages": stages}
            process.join(START_LIMIT_S)
        finally:
            if process.is_alive():
                process.terminate()
                process.join()


def receive(pipe: Connection, limit_s: float) -> Any:
    if not pipe.poll(limit_s):
        raise TimeoutError(f"nothing came in {limit_s:.0f} s")
    return pipe.recv()


def row_of(
    transport: str, slot_bytes: int, slots: int, taken_s: dict[str, list[float]]
) -> dict[str, Any]:
    fetched_bytes = slot_bytes * slots
    ratios = [nixl / fetch for fetch, nixl in zip(taken_s["fetch"], taken_s["nixl"], strict=True)]
    rates = {
        f"{way}_gb_per_s": round(fetched_bytes / statistics.median(taken_s[way]) / 1e9, 2)
        for way in WAYS
    }
    with_plan = [
        nixl / (fetch + plan)
        for fetch, nixl, plan in zip(
            taken_s["fetch"], taken_s["nixl"], taken_s["plan"], strict=True
        )
    ]
    ratio = statistics.median(ratios)
    bar = next(ratio for least_bytes, ratio in BARS if slot_bytes >= least_bytes)
    return {
        "slot_bytes": slot_bytes,
        "slots": slots,
        "transport": transport,
        **rates,
        "ratio_to_nixl": round(ratio, 3),
        "ratio_with_plan": round(statistics.median(with_plan), 3),
        "plan_ms": round(statistics.median(taken_s["plan"]) * 1e3, 2),
        "bar": bar if fetched_bytes >= BAR_BYTES else None,
    }


def take_stages(row: dict[str, Any]) -> dict[str, Any] | None:
    """Out of a row; None where they could not be told apart, as over TCP, where a post only begins
    a read.
    """
    medians = medians_us(row.pop("stages"))
    if medians is None or row["transport"] != "cma":
        return None
    return {key: row[key] for key in ("slot_bytes", "slots", "transport")} | medians


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The worst of each transport and each bound."""
    worst: dict[tuple[str, float], float] = {}
    for row in rows:
        if row["bar"] is not None:
            which = row["transport"], row["bar"]
            worst[which] = min(row["ratio_to_nixl"], worst.get(which, row["ratio_to_nixl"]))
    names = {bar: f"slots of {least >> 10} KiB and more" for least, bar in BARS}
    return [
        at_least(bar, f"{transport}, {names[bar]}: fetch / NIXL, the worst", ratio)
        for (transport, bar), ratio in worst.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "over", "slots", "of", "fetch GB/s", "NIXL GB/s", "memcpy GB/s", "ratio", "bar", "plan"
    )
    for row in rows:
        ratio = f"{row['ratio_to_nixl']:.2f}"
        missed = row["bar"] is not None and row["ratio_to_nixl"] < row["bar"]
        table.add_row(
            row["transport"],
            str(row["slots"]),
            f"{row['slot_bytes'] >> 10} KiB",
            *(f"{row[f'{way}_gb_per_s']:.2f}" for way in WAYS),
            f"[red]{ratio}[/red]" if missed else ratio,
            "" if row["bar"] is None else str(row["bar"]),
            f"{row['plan_ms']:.2f} ms",
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="fetches of blocks next to raw NIXL")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="few cases, a small slab, no bars")
    parser.add_argument("--transports", default=",".join(TRANSPORTS))
    parser.add_argument("--rounds", type=int, help=f"of each case, after a warm one: {ROUNDS}")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (3 if arguments.smoke else ROUNDS)
    payload_bytes = 256 << 20 if arguments.smoke else PAYLOAD_BYTES
    transports = arguments.transports.split(",")
    if unknown := set(transports) - TRANSPORTS.keys():
        parser.error(f"transports are {', '.join(TRANSPORTS)}, not {', '.join(unknown)}")
    rows = list(measure(transports, payload_bytes, rounds, smoke=arguments.smoke))
    stages = [take_stages(row) for row in rows]
    return finish(
        "transfer",
        {"rows": rows, "stages": [row for row in stages if row], "seed": SEED},
        bars(rows),
        n=rounds,
        as_json=arguments.json,
        is_smoke=arguments.smoke,
        show=lambda: show(rows),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
