"""A real browser, where there is one: Debian's Chromium, driven by Playwright, which downloads nothing."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@contextmanager
def chromium() -> Iterator:
    """A browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not path:
        pytest.skip("there is no Chromium (Debian: apt install chromium; elsewhere CHROMIUM=/path/to/it)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


class Tab:
    """A page that is open, and everything in it that must not happen: errors, dialogs, requests.

    Args:
        browser: From `chromium`.
        target: File or address to open.
        width: Of the window, in pixels.
        scheme: Of colours, `light` or `dark`.
    """

    def __init__(self, browser, target: Path | str, width: int = 1400, scheme: str = "light"):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page, self.errors, self.requests = self.context.new_page(), [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: line.type in ("error", "warning") and self.errors.append(line.text))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(target if isinstance(target, str) else target.as_uri())

    def text(self, selector: str) -> str:
        """What an element holds, to the character."""
        return self.page.locator(selector).first.evaluate("element => element.textContent")

    def wait_until(self, expression: str, seconds: float = 10.0) -> None:
        """Until it is true; Playwright's own waiting evaluates text within the page, which the page forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"after {seconds:g} s this was still false: {expression}"
            self.page.wait_for_timeout(50)

    def focused(self) -> str:
        """The text of the element that has the focus."""
        return self.page.evaluate("document.activeElement.textContent")
