"""`kvray`: start, look, drain, stop. Each command says on its last line what it found.

Exit codes: 0 as asked; 1 something is wrong, and the text on stderr says what to do; 2 the command
line was not understood. With --json stdout has one JSON document and nothing else.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvray import cluster as kvray_cluster
from kvray.actors import one_line, refuse_untested_ray
from kvray.cluster import Cluster, LinkMeasurement
from kvray.errors import ConfigError, KVRayError, NodeLostError
from kvray.watch import local_ray
from kvray.watch.bench import run_benchmarks
from kvray.watch.doctor import Grade, diagnose, engines_in, verdict
from kvray.watch.page import LOOPBACK, open_page, page_url
from kvray.watch.ports import ports_of
from kvray.watch.tables import NODE_CHARS, status_data, status_view
from kvray.watch.whereabouts import locate_prompt, one_engine, token_ids_of, where_view

DEFAULT_CLUSTER = "default"
WRONG = 1  # exit code
BEGUN = "KVRAY_HAS_BEGUN_RAY"  # from `start` to itself in a new process: see local_ray.begin
GRADE_STYLES = {Grade.GOOD: "green", Grade.WARNING: "yellow", Grade.BAD: "red"}
TOP_PERIOD_S = 1.0
TRACE_LINES = 40
MAX_TOP_PERIOD_S = 3_600.0

app = typer.Typer(
    name="kvray",
    help="One KV cache out of many: every vLLM instance of a Ray cluster reuses what any computed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# No markup: model names and settings are shown, and are no commands to the terminal.
out, err = Console(markup=False), Console(stderr=True, markup=False)

ClusterName = Annotated[
    str, typer.Option("--cluster", metavar="NAME", help="Which kvray, if there are several.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@contextmanager
def explained() -> Iterator[None]:
    """What went wrong in one line, without a traceback, and exit code 1."""
    try:
        yield
    except KVRayError as exc:
        err.print(Text(f"{type(exc).__name__}: {exc}", style="red"))
        raise typer.Exit(WRONG) from exc


def join_ray() -> None:
    """Be a driver of the Ray cluster that is there. Raises NodeLostError if there is none: a local
    one that ends with this process is of no use to a command.
    """
    refuse_untested_ray(ray.__version__)
    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError) as exc:
        raise NodeLostError(
            f"no Ray cluster can be reached: {one_line(exc)}. `kvray start` begins one on this "
            "machine; for another one set $RAY_ADDRESS, and have the Ray and the Python that it has"
        ) from exc


def connected(cluster_name: str) -> Cluster:
    join_ray()
    return kvray_cluster.connect(cluster_name)


def print_json(data: object) -> None:
    typer.echo(json.dumps(data))


# -- the life of a cluster ----------------------------------------------------------------------


@app.command()
def start(
    *,
    cluster_name: ClusterName = DEFAULT_CLUSTER,
    slab_bytes: Annotated[
        str, typer.Option("--slab-bytes", metavar="SIZE", help='Of each node, as "200 GiB".')
    ] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another field of kvray.Config."),
    ] = None,
    page: Annotated[bool, typer.Option(help="Serve kvray's own page.")] = True,
    page_host: Annotated[
        str, typer.Option(help="Where; on anything but loopback it wants a token.")
    ] = LOOPBACK,
    page_token: Annotated[
        str,
        typer.Option(
            envvar="KVRAY_PAGE_TOKEN",
            help="Who has it may look. Without one a page that is not on loopback makes its own.",
        ),
    ] = "",
    page_port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free one.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run kvray on this Ray cluster; begin a local one, which outlives this command, if there is
    none.
    """
    with explained():
        given = parse_settings(settings or [])
        if slab_bytes:
            given["slab_bytes"] = slab_bytes
        given["cluster_name"] = cluster_name
        begun = os.environ.pop(BEGUN, "") == cluster_name
        try:
            join_ray()
        except NodeLostError:
            if begun or "RAY_ADDRESS" in os.environ:
                raise
            with err.status("no Ray cluster is here: starting one"):
                local_ray.begin(cluster_name)
            os.environ[BEGUN] = cluster_name
            os.execv(sys.executable, [sys.executable, "-m", "kvray.watch", *sys.argv[1:]])  # noqa: S606
        try:
            with err.status("starting kvray") as line:
                cluster = kvray_cluster.start(progress=line.update, **given)
        except BaseException:
            if begun:
                ray.shutdown()
                local_ray.end(cluster_name)
            raise
        url = (
            open_page(cluster, host=page_host, port=page_port, token=page_token)
            if page
            else page_url(cluster)
        )
        status = cluster.status()
        if as_json:
            print_json(status_data(status, page_url=url) | {"began_ray": begun})
            return
        out.print(status_view(status))
        if url:
            out.print(f"page: {url}")
        if begun:
            out.print("A Ray cluster was begun on this machine; `kvray stop` ends it.")


@app.command()
def stop(cluster_name: ClusterName = DEFAULT_CLUSTER, as_json: AsJson = False) -> None:
    """End kvray: no actor, slab or socket is left. Ray goes on, unless `kvray start` began it."""
    with explained():
        was_running = False
        try:
            cluster = connected(cluster_name)
        except NodeLostError:
            if local_ray.read_note(cluster_name) is None:
                raise
        else:
            was_running = True
            with err.status("stopping kvray"):
                cluster.stop()
        ray.shutdown()
        ended = local_ray.end(cluster_name)
        if as_json:
            print_json({"cluster": cluster_name, "stopped": was_running, "ended_ray": ended})
            return
        what = "was stopped" if was_running else "did not run"
        out.print(f"kvray cluster {cluster_name} {what}")
        if ended:
            out.print("the Ray cluster that `kvray start` began was ended")


@app.command()
def drain(
    node: Annotated[str, typer.Argument(help="A Ray node id, or the beginning of one.")],
    cluster_name: ClusterName = DEFAULT_CLUSTER,
    as_json: AsJson = False,
) -> None:
    """Let the other nodes take over what only this one has, then end its NodeStore."""
    with explained():
        cluster = connected(cluster_name)
        node_id = full_node_id(cluster, node)
        with err.status(f"draining {node_id[:NODE_CHARS]}") as line:
            drained = cluster.drain(node_id, progress=line.update)
        data = {
            "node": drained.node_id,
            "blocks": drained.blocks,
            "fetched": drained.fetched,
            "kept": drained.kept,
            "lost": drained.lost,
        }
        if as_json:
            print_json(data)
        else:
            out.print(
                f"{drained.blocks:,} blocks: {drained.fetched:,} taken over, {drained.kept:,} were "
                f"elsewhere already, {drained.lost:,} lost for want of room"
            )


@app.command()
def clear(
    wipe: Annotated[
        bool, typer.Option("--wipe", help="Overwrite what they leave in memory, too.")
    ] = False,
    cluster_name: ClusterName = DEFAULT_CLUSTER,
    as_json: AsJson = False,
) -> None:
    """Evict every block that no request is using, on every node."""
    with explained():
        cluster = connected(cluster_name)
        before = sum(node.block_count for node in cluster.nodes())
        with err.status("wiping" if wipe else "clearing"):
            wiped_bytes = cluster.clear(wipe=wipe)
        after = sum(node.block_count for node in cluster.nodes())
        if as_json:
            counts = {"blocks_before": before, "blocks_after": after, "wiped_bytes": wiped_bytes}
            print_json({"cluster": cluster_name} | counts)
        else:
            out.print(f"{before - after:,} of {before:,} blocks were evicted")
            if wipe:
                out.print(f"{wiped_bytes >> 20:,} MiB were overwritten")


# -- looking ------------------------------------------------------------------------------------


@app.command()
def status(cluster_name: ClusterName = DEFAULT_CLUSTER, as_json: AsJson = False) -> None:
    """Nodes, slabs, models, and where the tokens of all prompts came from."""
    with explained():
        cluster = connected(cluster_name)
        seen, url = cluster.status(), page_url(cluster)
        if as_json:
            print_json(status_data(seen, page_url=url))
        else:
            out.print(status_view(seen))
            if url:
                out.print(f"page: {url}")
        if not seen.nodes or any(node.is_ill for node in seen.nodes):
            raise typer.Exit(WRONG)


@app.command()
def where(
    tokens: Annotated[
        str, typer.Option("--tokens", metavar="1,2,3", help="Token ids; @FILE reads a JSON list.")
    ] = "",
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="Split by the model's own tokenizer.")
    ] = "",
    model: Annotated[
        str, typer.Option("--model", help="Which, if engines of several are attached.")
    ] = "",
    cluster_name: ClusterName = DEFAULT_CLUSTER,
    as_json: AsJson = False,
) -> None:
    """Which nodes hold how much of a prompt."""
    with explained():
        cluster = connected(cluster_name)
        engine = one_engine(engines_in(cluster.status()), model)
        found = locate_prompt(cluster, engine, token_ids_of(tokens, prompt, engine.model))
        if as_json:
            print_json(found)
        else:
            out.print(where_view(found))


@app.command()
def top(
    cluster_name: ClusterName = DEFAULT_CLUSTER,
    period_s: Annotated[
        float,
        typer.Option("--period", metavar="S", min=0.2, max=MAX_TOP_PERIOD_S, help="Seconds."),
    ] = TOP_PERIOD_S,
    rounds: Annotated[
        int, typer.Option("--rounds", min=0, help="End after so many; 0: at Ctrl-C.")
    ] = 0,
) -> None:
    """The same as `status`, live."""
    with explained():
        cluster = connected(cluster_name)
        shown = 0
        with Live(console=out, auto_refresh=False) as live:
            try:
                while not rounds or shown < rounds:
                    live.update(status_view(cluster.status()), refresh=True)
                    shown += 1
                    if shown != rounds:
                        time.sleep(period_s)
            except KeyboardInterrupt:
                return


@app.command()
def doctor(
    *,
    cluster_name: ClusterName = DEFAULT_CLUSTER,
    rdma: Annotated[
        bool,
        typer.Option("--rdma", help="Insist: where two hosts have RDMA devices, bytes use them."),
    ] = False,
    measure: Annotated[
        bool, typer.Option(help="Read 80 MiB over each link, to time it and to see its way.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Check what sharing needs, measure the links between the nodes, and say between which engines
    kvray will share, or why not.
    """
    with explained():
        if rdma and not measure:
            raise ConfigError("--rdma asks what --no-measure leaves out: take one of them")
        cluster = connected(cluster_name)
        seen = cluster.status()
        links: tuple[LinkMeasurement, ...] = ()
        if measure:
            with err.status("measuring links") as line:
                links = cluster.measure_links(line.update)
        findings, said = diagnose(seen, links, wants_rdma=rdma), verdict(seen)
        is_ill = any(finding.grade is Grade.BAD for finding in findings)
        if as_json:
            checks = [finding.to_dict() for finding in findings]
            measured = [link.to_dict() for link in links]
            print_json(
                {
                    "ok": not is_ill,
                    "findings": checks,
                    "links": measured,
                    "ports": [port.to_dict() for port in ports_of(seen)],
                    "verdict": said,
                }
            )
        else:
            table = Table("", "check", "found")
            for finding in findings:
                grade = Text(finding.grade.value, style=GRADE_STYLES[finding.grade])
                table.add_row(grade, finding.check, finding.text)
            out.print(table)
            out.print(Text(said, style="bold"))
        if is_ill:
            raise typer.Exit(WRONG)


@app.command()
def trace(
    node: Annotated[str, typer.Argument(help="A Ray node id, or the beginning of one.")],
    last: Annotated[int, typer.Option("--last", min=1, help="How many events.")] = TRACE_LINES,
    cluster_name: ClusterName = DEFAULT_CLUSTER,
    as_json: AsJson = False,
) -> None:
    """The last events of a node's core: what engines, peers and the directory have said to it."""
    with explained():
        cluster = connected(cluster_name)
        events = cluster.recent(full_node_id(cluster, node))[-last:]
        if as_json:
            print_json([{"ago_ms": ago_ms, "event": what} for ago_ms, what in events])
        else:
            for ago_ms, what in events:
                out.print(Text(f"{-ago_ms:>8,} ms  {what}"))


@app.command()
def bench(
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where the page and its plots go.")
    ] = Path("kvray-bench"),
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="One of them; repeatable.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Only whether each runs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure kvray on this machine, in clusters of its own: the short set of benchmarks/report.py.
    Needs a checkout, vLLM, and a machine that does nothing else; takes minutes.
    """
    with explained():
        page, missed = run_benchmarks(output, only or [], smoke=smoke)
        if as_json:
            print_json({"page": page, "missed": missed})
        else:
            for text in missed:
                out.print(Text(f"missed: {text}", style="yellow"))
            out.print(f"page: {page}")
        if missed and not smoke:
            raise typer.Exit(WRONG)


# -- what is typed ------------------------------------------------------------------------------


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON if it is any, else as text. Raises ConfigError."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {pair!r}: expected NAME=VALUE, as lookup_deadline_ms=500")
        settings[name] = _value_of(text)
    return settings


def _value_of(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def full_node_id(cluster: Cluster, beginning: str) -> str:
    """Raises ConfigError if it is not that of exactly one node."""
    node_ids = [node.node_id for node in cluster.status().nodes]
    found = [node_id for node_id in node_ids if node_id.startswith(beginning)]
    if len(found) != 1:
        raise ConfigError(
            f"{beginning!r} is the beginning of {len(found)} node ids; the nodes are "
            f"{', '.join(node_ids) or 'none'}"
        )
    return found[0]


main: Callable[[], None] = app
