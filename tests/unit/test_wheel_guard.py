"""The guard of the tests that run from the wheel ends a process that has kvray from elsewhere.

Method: two folders with a kvray each, and a Python that has loaded the guard from one of them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wheel import guard

USE = """
import sys
sys.path[:0] = [{first!r}, {site!r}]
import {guard}
import kvray
print(kvray.__file__)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for name in ("site", "checkout"):
        (tmp_path / name / "kvray").mkdir(parents=True)
        (tmp_path / name / "kvray" / "__init__.py").touch()
    shutil.copyfile(guard.__file__, tmp_path / "site" / f"{guard.NAME}.py")
    (tmp_path / "notes").mkdir()
    return tmp_path / "site"


def use(site: Path, first: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", USE.format(first=str(first), site=str(site), guard=guard.NAME)],
        env=os.environ | {guard.NOTES: str(site.parent / "notes")},
        cwd=site.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_kvray_from_the_wheel_is_loaded_and_written_down(site: Path) -> None:
    done = use(site, first=site)
    assert done.stdout.strip() == str(site / "kvray" / "__init__.py")
    assert guard.main(str(site.parent / "notes")) == 0


def test_kvray_from_elsewhere_ends_the_process_and_fails_the_run(site: Path) -> None:
    done = use(site, first=site.parent / "checkout")
    assert done.returncode == guard.WRONG
    assert f"found {site.parent / 'checkout' / 'kvray' / '__init__.py'}" in done.stderr
    assert guard.main(str(site.parent / "notes")) == 1


def test_a_run_that_never_loaded_kvray_has_shown_nothing(site: Path) -> None:
    assert guard.main(str(site.parent / "notes")) == 1
