"""Self-contained HTML pages: jinja2 with autoescape, an inline style sheet, and a policy that forbids scripts.

Whatever comes from rows, recipes and measurements is text: it is never a template, and never markup. Should a mistake
of ours let markup through all the same, the page's Content-Security-Policy still runs no script and loads nothing:
the one style sheet is allowed by its hash (https://www.w3.org/TR/CSP3/#match-element-to-source-list).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from finetune.utils.format import duration, interval, number, percent, size, visible

PAGES = Path(__file__).parent / "pages"


def render_page(name: str, facts: Mapping[str, Any]) -> bytes:
    """Render the page `pages/NAME` with `facts` as UTF-8; equal facts give equal bytes."""
    style = (PAGES / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    environment = SandboxedEnvironment(
        loader=FileSystemLoader(PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, interval=interval, number=number, percent=percent, size=size)
    own = {"style": Markup(style), "policy": policy}  # noqa: S704 - a file of this package
    return environment.get_template(name).render(**facts, **own).encode()


def _visible_text(value: object) -> object:
    """Make control characters of a string visible before it is escaped; charts are already markup."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
