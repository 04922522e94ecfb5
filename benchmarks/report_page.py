"""The page of report.py: what the scripts said, as Markdown tables. It computes nothing."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

# Said once for the page, or for people's eyes only.
LEFT_OUT = {
    "benchmark",
    "machine",
    "versions",
    "bars",
    "command",
    "took_s",
    "exit_code",
    "samples_ms",
}
TITLES = {
    "ttft": "Time to the first token",
    "long_doc_qa": "Questions about long documents",
    "multi_turn": "Conversations behind a plain load balancer",
    "transfer": "Fetching blocks, next to raw NIXL",
    "lookup": "Look-ups, locates, registering, the directory",
    "hit_rate": "One cache of N x C",
    "routing": "Which replica a request should go to",
    "serve_routing": "Which replica a request should go to: in Ray Serve itself",
    "idle": "What idling costs",
    "overhead": "What kvray costs where nothing is reused",
    "watching": "What watching costs, and how soon one sees",
    "behind_nginx": "Two vllm serve behind nginx",
    "audit": "Trust what has been seen to be equal",
    "descriptors": "What describing a copy job costs",
    "gpu": "Copies between slab and GPU",
}


HOW_TO_READ = (
    "Ratios and bounds are the results; single times vary with what else the host does. "
    "GB are 10^9 bytes."
)


def page(results: Mapping[str, Any], plots: Mapping[str, list[str]], *, notes: str) -> str:
    """The whole page. plots: of each result, paths relative to the page."""
    parts = ["# Results\n", _machines(results), _promises(results)]
    for name, result in results.items():
        parts.append(_section(name, result, plots.get(name, [])))
    if notes:
        parts.append(notes)
    return "\n".join(parts).rstrip() + "\n"


def missed(results: Mapping[str, Any]) -> list[str]:
    """The promises that do not hold, and the scripts without a result."""
    found = [f"{name}: {r['error']}" for name, r in results.items() if "error" in r]
    for name, result in results.items():
        found += [f"{name}: {_bar(bar)}" for bar in result.get("bars", []) if not bar["holds"]]
    return found


def _machines(results: Mapping[str, Any]) -> str:
    """One paragraph a machine, with what was measured on it where there are several: a page of one
    run has one.
    """
    texts: dict[str, list[str]] = {}
    for name, result in results.items():
        if "machine" not in result:
            continue
        machine, versions = result["machine"], result["versions"]
        packages = ", ".join(f"{name} {version}" for name, version in versions.items())
        card = result.get("card", "no GPU")
        text = (
            f"Measured on one machine: {machine['cores']} cores ({machine['cpu']}, virtual), "
            f"{machine['memory_gb']} GB, Linux {machine['kernel']}, {card}, no RDMA; {packages}."
        )
        texts.setdefault(text, []).append(name)
    said = (
        list(texts)
        if len(texts) == 1
        else [f"{', '.join(names)}. {text}" for text, names in texts.items()]
    )
    return "\n\n".join([*said, HOW_TO_READ]) + "\n"


def _promises(results: Mapping[str, Any]) -> str:
    rows = [
        {
            "benchmark": name,
            "what": bar["what"],
            "found": _number(bar["found"]),
            "bound": f"{'≤' if bar['at_most'] else '≥'} {_number(bar['bound'])}",
            "": "" if bar["holds"] else "**missed**",
        }
        for name, result in results.items()
        for bar in result.get("bars", [])
    ]
    return "## What must hold\n\n" + _table(pd.DataFrame(rows)) if rows else ""


def _section(name: str, result: Mapping[str, Any], plots: list[str]) -> str:
    script, _, variant = name.partition("-")
    title = TITLES.get(script, script) + (f": {variant}" if variant else "")
    lines = [f"## {title}\n", f"`{result['command']}`, {result['took_s']:,.0f} s\n"]
    if "error" in result:
        return "\n".join([*lines, f"**{result['error']}**\n"])
    lines += [f"![{title}]({path})\n" for path in plots]
    plain: dict[str, str] = {}
    for key, value in result.items():
        if key in LEFT_OUT or value in ([], {}):
            continue
        if isinstance(value, list) and isinstance(value[0], dict):
            lines += [f"{_words(key)}:\n", _table(pd.DataFrame(map(_flat, value)))]
        elif isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            rows = [{"": name} | _flat(row) for name, row in value.items()]
            lines += [f"{_words(key)}:\n", _table(pd.DataFrame(rows))]
        elif isinstance(value, dict):
            lines += [f"{_words(key)}:\n", _table(pd.DataFrame([value]))]
        else:
            plain[_words(key)] = _number(value)
    lines.append(_table(pd.DataFrame(plain.items(), columns=["figure", "value"])))
    return "\n".join(lines)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table: what is inside of it as columns, a list as text, counters left out."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key == "counters":
            continue
        if isinstance(value, Mapping):
            flat |= {f"{key} {name}": inner for name, inner in _flat(value).items()}
        elif isinstance(value, list):
            if not any(isinstance(inner, Mapping) for inner in value):
                flat[key] = " / ".join(map(_number, value))
        else:
            flat[key] = value
    return flat


def _table(frame: pd.DataFrame) -> str:
    """A Markdown table; what is not there stays empty."""
    rows = [list(map(_words, map(str, frame.columns))), ["---"] * len(frame.columns)]
    rows += [["" if _is_empty(v) else _number(v) for v in row] for row in frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # noqa: PLR0124 (NaN)


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "/")
    return f"{value:,}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _bar(bar: Mapping[str, Any]) -> str:
    sign = "≤" if bar["at_most"] else "≥"
    return f"{bar['what']}: {_number(bar['found'])}, must be {sign} {_number(bar['bound'])}"
