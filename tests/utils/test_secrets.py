"""What looks like a credential is found, what merely looks like a hash is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.utils.secrets import find_secrets, redact

ALPHANUMERIC = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=20, max_size=60)


@given(ALPHANUMERIC, st.text("xyz \n:='\"", max_size=20))
def test_a_hub_token_is_found_and_never_repeated(body: str, before: str) -> None:
    token = "hf_" + body
    text = f"{before} {token}\n"
    found = find_secrets(text)
    assert len(found) == 1
    assert f"line {before.count(chr(10)) + 1}" in found[0]
    assert body not in found[0]
    assert body not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567",
        'wandb_key: "' + "ab" * 20 + '"',
        "machine api.wandb.ai login user password " + "cd" * 20,
        "wandb_v1_" + "Ab0" * 12,
        "ghp_" + "a1" * 18,
        "AKIA" + "A1" * 8,
        "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    ],
)
def test_other_credentials_are_found(text: str) -> None:
    assert find_secrets(f"one\n{text}\n")[0].endswith("line 2")


@pytest.mark.parametrize(
    "text",
    [
        "revision: " + "0123456789abcdef" * 2 + "01234567",
        "hf_home: /data",
        "hf_hub_download",
        "wandb: true",
        "sha256 " + "a" * 64,
    ],
)
def test_hashes_and_names_are_not(text: str) -> None:
    assert find_secrets(text) == []
    assert redact(text) == text
