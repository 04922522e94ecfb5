"""`python -m tests.wheel.layered ENVIRONMENT...`: what tests need to run from the wheel.

    dist/                    the wheel, made from what git knows of this checkout
    ENVIRONMENT-wheel/       hard links to ENVIRONMENT, with the wheel in place of the checkout that
                             is installed there, and a guard. Seconds, and next to no bytes
    build/from-wheel/        a copy of all that git knows but kvray/: here tests are started, and
                             there is no kvray that they could find by mistake, but the wheel

`make from-wheel RUN=TARGET` calls this, and then that target in build/from-wheel.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

from tests.engines import ROOT
from tests.wheel import guard
from tests.wheel.building import build
from tests.wheel.commands import run
from tests.wheel.sources import copy_sources

DIST = ROOT / "dist"
CHECKOUT = ROOT / "build" / "from-wheel"
SUFFIX = "-wheel"
KEPT = ".cache"  # of the copy: small models, which take half a minute to make
LINK_LIMIT_S = 300.0  # 180,000 links: 4 s
PIP_LIMIT_S = 120.0


def main(environments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="kvray-wheel-") as scratch:
        sources = Path(scratch) / "sources"
        copy_sources(sources)
        wheel = build(sources, DIST).wheel
    for environment in environments:
        lay(ROOT / environment, wheel)
    CHECKOUT.mkdir(parents=True, exist_ok=True)
    for old in CHECKOUT.iterdir():
        if old.name != KEPT:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    copy_sources(CHECKOUT, kvray=False)
    (CHECKOUT / "dist").mkdir()
    shutil.copy2(wheel, CHECKOUT / "dist")  # ray_cluster.yaml takes it from there
    return 0


def lay(environment: Path, wheel: Path) -> None:
    """Beside `environment`, which stays as it is: no file of it is written to, only replaced by
    another one of the same name in the new folder.
    """
    target = environment.with_name(environment.name + SUFFIX)
    if not _is_link_of(target, environment):
        if target.exists():
            shutil.rmtree(target)
        run(["cp", "-al", str(environment.resolve()), str(target)], limit_s=LINK_LIMIT_S)
    python = str(target / "bin" / "python")
    pip = [python, "-m", "pip", "--no-input", "--disable-pip-version-check", "-q"]
    run([*pip, "uninstall", "-y", "kvray"], limit_s=PIP_LIMIT_S)
    run([*pip, "install", "--no-deps", "--no-index", str(wheel)], limit_s=PIP_LIMIT_S)
    for old in {str(environment), str(environment.resolve())}:
        _rename_in_scripts(target / "bin", old, str(target))
    where = [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(run(where, limit_s=PIP_LIMIT_S).strip())
    shutil.copyfile(guard.__file__, packages / f"{guard.NAME}.py")
    (packages / f"{guard.NAME}.pth").write_text(f"import {guard.NAME}\n")


def _is_link_of(target: Path, environment: Path) -> bool:
    """Whether it was finished after the last installation into the environment, whose stamp says
    when that was.
    """
    stamp = environment / ".installed"
    finished = target.glob(f"lib/python*/site-packages/{guard.NAME}.pth")
    return stamp.exists() and any(path.stat().st_mtime > stamp.stat().st_mtime for path in finished)


def _rename_in_scripts(folder: Path, old: str, new: str) -> None:
    """Scripts name the Python that runs them by its full path: the old one has the checkout."""
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        mode = path.stat().st_mode
        changed = re.sub(re.escape(old).encode() + rb"(?![\w-])", new.encode(), data)
        if changed != data and b"\0" not in data:
            path.unlink()  # and not written to: it is the old environment's as well
            path.write_bytes(changed)
            path.chmod(mode)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
