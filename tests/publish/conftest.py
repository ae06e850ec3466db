"""Fixtures for tests of publishing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hub_server import LoopbackHub, point_client, serve
from tests.helpers.publishing import STAGES, Act, finish_stages


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A loopback Hub to which the real client in this process talks."""
    with serve() as running:
        point_client(monkeypatch, running, tmp_path / "hf_home")
        yield running


@pytest.fixture(scope="session")
def finished_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody changes these."""
    return finish_stages(tmp_path_factory.mktemp("finished-stages"))


@pytest.fixture
def folders(finished_stages: Path, tmp_path: Path) -> dict[str, Path]:
    """A copy of them."""
    made = Path(shutil.copytree(finished_stages, tmp_path / "artifacts"))
    return {name: made / name for name in STAGES}


@pytest.fixture
def act(tmp_path: Path, folders: dict[str, Path]) -> Act:
    """A publish to call."""
    return Act(tmp_path, folders)
