"""After a full run with every tracker on, no token is in any file, output, card, manifest or W&B record."""

import json
import shutil

import pytest

from tests.e2e.conftest import Workspace
from tests.helpers import hub_server

SECRETS = {
    "HF_TOKEN": "hf_" + "aVerySecretHubToken" * 2,
    "WANDB_API_KEY": "5ec2e7" * 6 + "abcd",
    "OPENAI_API_KEY": "sk-" + "notOursButInTheEnvironment" * 2,
}
LOGIN = "hf_" + "fromTheLoginOfTheHub" * 2


def leaks(folder, tokens, skip):
    return [
        f"{path}: {name}"
        for path in folder.rglob("*")
        if path.is_file() and path not in skip
        for name, token in tokens.items()
        if token.encode() in path.read_bytes()
    ]


@pytest.mark.slow
def test_no_token_is_written_anywhere(pristine, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(pristine.folder, folder)
    work = Workspace(folder)
    home = folder / "home"
    login = home / ".cache" / "huggingface" / "token"
    login.parent.mkdir(parents=True)
    with hub_server.serve() as server:
        settings = server.env(folder / "hub") | {"HF_HUB_OFFLINE": "0", "HOME": str(home), "WANDB_MODE": "offline"}
        settings |= SECRETS
        tokens = SECRETS | {"login": LOGIN}
        (folder / "hub").mkdir(exist_ok=True)
        logins = [login, folder / "hub" / "token"]
        for path in logins:
            path.write_text(LOGIN)
        sets = ["--set", "tracking.wandb=true", "--set", "publish.what=[merged]"]
        run = work.run("run", "small.yaml", *sets, **settings)
        assert any(folder.rglob("*.wandb")), "W&B recorded nothing: the test would prove nothing"
        outputs = [run]
        for words in (["show", "small", "--json"], ["doctor"], ["publish", "small", "--repo", "me/small", *sets]):
            outputs.append(work.run(*words, **settings))
        by_login = settings | {"HF_TOKEN": ""}
        outputs.append(work.run("publish", "small", "--repo", "me/other", *sets, **by_login))
    for done in outputs:
        assert not [name for name, token in tokens.items() if token in done.stdout + done.stderr]
    assert leaks(folder, tokens, logins) == []
    receipt = json.loads(next(folder.glob("artifacts/runs/small/*/publish.json")).read_text())
    assert {p["repo"] for p in receipt["pushes"]} <= {"me/small", "me/other"}


def test_the_search_finds_a_token_that_is_there(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"\0" + LOGIN.encode())
    assert leaks(tmp_path, {"login": LOGIN}, []) == [f"{tmp_path / 'deep' / 'file'}: login"]
