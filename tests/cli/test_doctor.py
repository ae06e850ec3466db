"""What the doctor says of this machine, and that it names what is missing without showing a secret."""

import socket
import sys

import pytest

from finetune.cli import doctor
from finetune.errors import FinetuneError
from tests.helpers import hub_server

SECRET = "0123456789abcdef" * 2 + "01234567"


def test_examine_prints_versions_device_and_room_and_makes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "hub_login", lambda: doctor.Finding("Hub", "not asked"))
    doctor.examine(tmp_path / "artifacts", tmp_path / "scratch")
    shown = capsys.readouterr().out
    extras = ("wandb", "gguf", "lm-eval", "py3langid", "model2vec", "deepspeed", "llama-quantize")
    for word in (
        "python",
        "torch",
        "transformers",
        "GPU",
        "NF4 works",
        "memory",
        "artifacts",
        "scratch",
        "W&B",
        *extras,
    ):
        assert word in shown
    assert not list(tmp_path.iterdir())


def test_a_missing_core_package_fails_after_the_table_with_the_command_that_mends_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CORE", ("numpy", "no-such-package-of-ours"))
    monkeypatch.setattr(doctor, "hub_login", lambda: doctor.Finding("Hub", "not asked"))
    with pytest.raises(FinetuneError, match=r"no-such-package-of-ours: missing; .*pip install") as caught:
        doctor.examine(tmp_path, tmp_path)
    assert caught.value.exit_status == 1 and "numpy" in capsys.readouterr().out


def test_apple_and_amd_have_a_line_each_and_others_none(monkeypatch):
    from finetune.models import device

    assert device.machine_notes() == [] or sys.platform == "darwin"
    monkeypatch.setattr(device.sys, "platform", "darwin")
    monkeypatch.setattr(device.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(device.Path, "exists", lambda self: str(self) == "/dev/kfd")
    apple, amd = device.machine_notes()
    assert apple.startswith("Apple: ") and "MPS is not used" in apple and amd.startswith("AMD: ")


def test_packages_are_compared_with_the_versions_asked_for():
    assert doctor.package("numpy", ">=1").broken is False
    old = doctor.package("numpy", ">=999")
    assert old.broken and ">=999" in old.found and '"numpy>=999"' in old.fix
    absent = doctor.package("no-such-package-of-ours", "", "tracking.nothing")
    assert not absent.broken and "needed only for tracking.nothing" in absent.found


def test_disk_says_where_nothing_can_be_written(tmp_path):
    free = doctor.disk("scratch", tmp_path / "not" / "yet", "--scratch", wanted=10**18)
    assert "free in" in free.found and "--scratch FOLDER" in free.fix
    assert doctor.disk("scratch", tmp_path, "--scratch").fix == ""
    (tmp_path / "file").write_text("")
    assert "cannot be written" in doctor.disk("artifacts", tmp_path / "file" / "in", "--artifacts").found


def test_wandb_key_is_found_where_wandb_looks_and_never_shown(tmp_path):
    nowhere = {"NETRC": str(tmp_path / "none")}
    assert doctor.wandb_key(nowhere).fix == "wandb login"
    file = tmp_path / "netrc"
    file.write_text(f"machine api.wandb.ai\n  login user\n  password {SECRET}\n")
    for environment in ({"NETRC": str(file)}, {**nowhere, "WANDB_API_KEY": SECRET}):
        found = doctor.wandb_key(environment)
        assert found.found.startswith("key present") and SECRET not in str(found)
    file.write_text("machine other.example\n  login user\n  password x\n")
    assert doctor.wandb_key({"NETRC": str(file)}).found.startswith("no key")


@pytest.fixture
def client(monkeypatch, tmp_path):
    """The Hub's client of this process, with a token and pointed wherever a test says."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def point(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)

    return point


def test_hub_names_the_account_and_never_the_token(client):
    with hub_server.serve() as server:
        client(server.url)
        found = doctor.hub_login()
    assert found.found.startswith("logged in as ") and hub_server.TOKEN not in str(found)


def test_hub_says_that_a_token_is_not_accepted_and_that_it_is_out_of_order(client):
    with hub_server.serve() as server:
        client(server.url)
        server.fail("GET", "whoami", status=401)
        refused = doctor.hub_login()
        server.fail("GET", "whoami", status=503)
        broken = doctor.hub_login()
    assert "does not accept HF_TOKEN" in refused.found and refused.fix == "hf auth login"
    assert "status 503" in broken.found


def test_hub_without_a_network_is_said_to_be_offline(client, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: every connection is refused
        client(f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert "offline: Connect" in doctor.hub_login().found
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(doctor, "HUB_SECONDS", 0.2)
        client(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "offline" in doctor.hub_login().found


def test_hub_is_not_asked_without_a_token_or_when_offline_is_set(client, monkeypatch):
    from huggingface_hub import constants

    client("http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not tried" in doctor.hub_login().found
    monkeypatch.delenv("HF_TOKEN")
    assert doctor.hub_login().found.startswith("not logged in")
