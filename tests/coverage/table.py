"""The rows as README has them."""

from collections.abc import Sequence

from kvray.engine import versions
from tests.coverage.rows import Kind, Row, Verdict

GOOD = {Verdict.EQUAL, Verdict.NAMED}


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"| of vLLM {versions.installed_version()} | taken | not taken |",
        "|---|---|---|",
        *(_line(kind, [row for row in rows if row.kind is kind]) for kind in Kind),
    ]
    return "\n".join(lines)


def _line(kind: Kind, rows: Sequence[Row]) -> str:
    taken = [row for row in rows if row.verdict in GOOD]
    others = [row for row in rows if row.verdict not in GOOD]
    return f"| {_name(kind)} | {_cell(taken)} | {_cell(others)} |"


def _name(kind: Kind) -> str:
    return f"`{kind}`" if kind.startswith("--") else str(kind)


def _cell(rows: Sequence[Row]) -> str:
    verdicts = sorted({str(row.verdict) for row in rows})
    assert len(verdicts) == 1, f"a row is of one verdict: {verdicts}"
    return f"{verdicts[0]}: {', '.join(f'`{row.name}`' for row in rows)}"
