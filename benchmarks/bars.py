"""What a benchmark must show: a figure, its bound, and whether it holds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # gpu.py does without: it runs where little is installed
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise. Made by at_most and at_least."""

    what: str
    found: float
    bound: float
    is_upper: bool

    @property
    def holds(self) -> bool:
        return self.found <= self.bound if self.is_upper else self.found >= self.bound

    def to_dict(self) -> dict[str, object]:
        """For the line of JSON."""
        return {
            "what": self.what,
            "found": round(self.found, 4),
            "bound": self.bound,
            "at_most": self.is_upper,
            "holds": self.holds,
        }


def at_most(bound: float, what: str, found: float) -> Bar:
    return Bar(what, found, bound, is_upper=True)


def at_least(bound: float, what: str, found: float) -> Bar:
    return Bar(what, found, bound, is_upper=False)


def exit_code(bars: list[Bar], console: "Console", *, is_smoke: bool) -> int:
    """Prints them. 1 if one is missed; a smoke is too small to be held to them."""
    if is_smoke or not bars:
        return 0
    from rich.table import Table

    table = Table("must show", "found", "bound", "")
    for bar in bars:
        sign = "≤" if bar.is_upper else "≥"
        verdict = "holds" if bar.holds else "[red]missed[/]"
        table.add_row(bar.what, f"{bar.found:.3g}", f"{sign} {bar.bound:g}", verdict)
    console.print(table)
    return 0 if all(bar.holds for bar in bars) else 1
