"""A page in a real browser, for tests: what is in its document once it has had the time to run whatever it can run."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
NO_BROWSER = "no chromium on this machine: apt-get install chromium"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=1000"
).split()


class Elements(HTMLParser):
    """The elements of a document: names, attributes, and the texts of `title`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.titles: list[str] = []
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._in_title = tag == "title"

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.titles.append(data)


def elements(text: str) -> Elements:
    """The elements in an HTML text."""
    found = Elements()
    found.feed(text)
    return found


def opened(page: Path, profile: Path) -> Elements:
    """The document after chromium has loaded `page`; `profile` is a new folder of its own."""
    said = _run(page, profile, "--dump-dom")
    assert "<html" in said
    return elements(said)


def printed(page: Path, profile: Path) -> bytes:
    """The PDF that chromium prints of `page`; `profile` is a new folder of its own."""
    file = profile.with_suffix(".pdf")
    _run(page, profile, f"--print-to-pdf={file}", "--no-pdf-header-footer")
    return file.read_bytes()


def _run(page: Path, profile: Path, *options: str) -> str:
    command = [BROWSER, *FLAGS, *options, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, errors="replace")
    return done.stdout
