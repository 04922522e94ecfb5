"""The sdist and the wheel as `python -m build` makes them, and what is wrong with them.

sources ──▶ sdist ──▶ wheel     what people install
   └────────────────▶ wheel     must be the same
"""

import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

from tests.engines import ROOT
from tests.wheel.commands import run

BUILD_LIMIT_S = 300.0  # an environment of its own, with setuptools from the index: 6 s
PACKAGE = "kvray"
METADATA = frozenset(
    ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
)
SCRIPTS = """\
[console_scripts]
kvray = kvray.watch.__main__:main

[vllm.general_plugins]
kvray = kvray.engine.plugin:register
"""
RUN_BY_PEOPLE = ("LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg")  # of an sdist


@dataclass(frozen=True)
class Built:
    sdist: Path
    wheel: Path

    def requirements(self) -> list[str]:
        return list(message_from_bytes(self._metadata("METADATA")).get_all("Requires-Dist") or [])

    def version(self) -> str:
        return str(message_from_bytes(self._metadata("METADATA"))["Version"])

    def files(self) -> dict[str, bytes]:
        return _unzipped(self.wheel)

    def _metadata(self, name: str) -> bytes:
        [found] = [
            data for path, data in self.files().items() if path.endswith(f".dist-info/{name}")
        ]
        return found


def build(sources: Path, target: Path) -> Built:
    """target: emptied of what was built before. Raises CommandError."""
    target.mkdir(parents=True, exist_ok=True)
    for old in (*target.glob(f"{PACKAGE}-*.whl"), *target.glob(f"{PACKAGE}-*.tar.gz")):
        old.unlink()
    _python("-m", "build", "--outdir", str(target), str(sources))
    [sdist] = target.glob(f"{PACKAGE}-*.tar.gz")
    [wheel] = target.glob(f"{PACKAGE}-*.whl")
    return Built(sdist, wheel)


def problems(built: Built, sources: Path, scratch: Path) -> Iterator[str]:
    """What is not as it has to be, for people."""
    checked = _python("-m", "twine", "check", "--strict", str(built.sdist), str(built.wheel))
    if checked.count("PASSED") != 2:
        yield f"expected twine to pass both, found: {checked}"

    files = built.files()
    info = f"{PACKAGE}-{built.version()}.dist-info/"
    ours = {path: data for path, data in files.items() if not path.startswith(info)}
    wanted = {
        str(path.relative_to(sources)): path.read_bytes()
        for path in (sources / PACKAGE).rglob("*")
        if path.is_file()
    }
    yield from _differences("the wheel", ours, "the checkout's kvray/", wanted)
    yield from _differences(
        "the wheel's metadata",
        {path.removeprefix(info): b"" for path in set(files) - set(ours)},
        "what is expected",
        dict.fromkeys(METADATA, b""),
    )
    for name, text in (("entry_points.txt", SCRIPTS.encode()), ("licenses/LICENSE", _licence())):
        if files.get(info + name) != text:
            yield f"{name} in the wheel: found {files.get(info + name)!r}"
    if f"{PACKAGE}/py.typed" not in files:
        yield "py.typed is not in the wheel: type checkers would not look at kvray's types"

    yield from _differences(
        "the sdist",
        dict.fromkeys(_in_sdist(built.sdist), b""),
        "kvray/ and its description",
        dict.fromkeys((*wanted, *RUN_BY_PEOPLE), b""),
    )
    _python("-m", "build", "--wheel", "--outdir", str(scratch), str(sources))
    [direct] = scratch.glob("*.whl")
    yield from _differences("the sdist's wheel", files, "the checkout's wheel", _unzipped(direct))


def _differences(
    name: str, found: dict[str, bytes], other: str, wanted: dict[str, bytes]
) -> Iterator[str]:
    if more := sorted(set(found) - set(wanted)):
        yield f"{name} has what is not in {other}: {', '.join(more)}"
    if less := sorted(set(wanted) - set(found)):
        yield f"{name} lacks what is in {other}: {', '.join(less)}"
    for path in sorted(set(found) & set(wanted)):
        if found[path] != wanted[path]:
            yield f"{path} differs between {name} and {other}"


def _licence() -> bytes:
    return (ROOT / "LICENSE").read_bytes()


def _in_sdist(path: Path) -> set[str]:
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    return {name for name in names if ".egg-info/" not in name}


def _unzipped(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}


def _python(*words: str) -> str:
    return run([sys.executable, *words], limit_s=BUILD_LIMIT_S)
