"""A real browser without a screen, for tests of kvray's page: Debian's Chromium by Playwright.

with open_browser() as browser:
    page = browser.open(url, PHONE)
"""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser as Chromium
from playwright.sync_api import Page, sync_playwright

# Chromium's sandbox needs namespaces that root in a container does not get; only our own page is
# opened. A container's /dev/shm may be small, and is where slabs lie.
ARGUMENTS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")
LIMIT_MS = 30_000  # for the page to come to be as a test waits for it, on a busy machine
MAX_PICTURE_BYTES = 300_000
COLOURS = 128  # in a picture: enough for a page, and a third of the bytes
PICTURES = "KVRAY_PICTURES"  # a folder: what a test sees is kept there (make pictures)


@dataclass(frozen=True)
class Look:
    """How the page is looked at."""

    width: int = 1280
    height: int = 1_100
    is_dark: bool = False


DESK, NIGHT, PHONE = Look(), Look(is_dark=True), Look(width=390)


@dataclass
class Browser:
    """errors: what pages have written to the console as errors, or thrown."""

    chromium: Chromium
    errors: list[str] = field(default_factory=list)

    def open(self, url: str, look: Look = DESK) -> Page:
        context = self.chromium.new_context(
            viewport={"width": look.width, "height": look.height},
            color_scheme="dark" if look.is_dark else "light",
        )
        context.set_default_timeout(LIMIT_MS)
        page = context.new_page()
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        return page

    def _on_console(self, message: object) -> None:
        if getattr(message, "type", "") in ("error", "warning"):
            self.errors.append(str(getattr(message, "text", message)))


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Skips the test where there is no Chromium. Fails if a page has written an error."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Debian's chromium: make system-test")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        browser = Browser(chromium)
        try:
            yield browser
        finally:
            chromium.close()
    assert not browser.errors, f"errors in the browser: {browser.errors}"


def keep_picture(page: Page, name: str) -> None:
    """What is to be seen now, as docs/pictures show it."""
    seen = page.viewport_size
    assert seen is not None
    height = min(seen["height"], int(page.evaluate("document.body.scrollHeight")))
    taken = Image.open(
        io.BytesIO(
            page.screenshot(
                animations="disabled",
                clip={"x": 0, "y": 0, "width": seen["width"], "height": height},
            )
        )
    )
    packed = io.BytesIO()
    taken.convert("RGB").quantize(COLOURS).save(packed, format="png", optimize=True)
    assert len(packed.getvalue()) <= MAX_PICTURE_BYTES, f"{name} has {packed.tell()} bytes"
    if folder := os.environ.get(PICTURES):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(packed.getvalue())


def is_too_wide(page: Page) -> bool:
    """Whether something hangs over the right edge."""
    return bool(
        page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    )
