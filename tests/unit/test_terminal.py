"""What comes from a model's name or a setting is shown, and does nothing to the terminal."""

import msgspec
import pytest
from rich.console import RenderableType
from rich.table import Table

from kvray.core.wellformed import check_message
from kvray.errors import RemoteProtocolError
from kvray.watch import cli
from kvray.watch.doctor import diagnose
from kvray.watch.tables import status_view
from tests.statuses import cluster, engine, node
from tests.unit.test_codec import HELLO

MARKUP = ["llama[/b]", "[/]", "[link=http://evil.example]click[/link]", "[layers]"]
CONTROL = "llama\x1b[2J\x1b]52;c;ZXZpbA==\x07\n\u202e"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.out, "width", 300)


def printed(shown: RenderableType) -> str:
    with cli.out.capture() as captured:
        cli.out.print(shown)
    return captured.get()


@pytest.mark.parametrize("model", MARKUP)
def test_brackets_of_a_name_are_no_markup(model: str) -> None:
    seen = cluster(node("a", engine(model)), node("b", engine(model, pid=2, hash_seed='"2"')))
    findings = Table("found")
    for finding in diagnose(seen):
        findings.add_row(finding.text)

    assert model.rpartition("/")[2] in printed(status_view(seen))  # a path's last part
    assert model in printed(findings)


@pytest.mark.parametrize("field", ["label", "model"])
def test_a_client_whose_name_moves_the_cursor_is_refused(field: str) -> None:
    with pytest.raises(RemoteProtocolError, match=rf"{field} is .* must have printable"):
        check_message(msgspec.structs.replace(HELLO, **{field: CONTROL}))
