"""What every test of the Hub's client checks: sentences of one line, and no token in anything that is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.errors import FinetuneError
from tests.helpers.hub_server import TOKEN


@pytest.fixture(autouse=True)
def no_token_in_output(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> Iterator[None]:
    yield
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


def code_of(error: pytest.ExceptionInfo[FinetuneError]) -> tuple[int, str]:
    text = str(error.value)
    assert "\n" not in text and TOKEN not in text
    return error.value.exit_status, text
