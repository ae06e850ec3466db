"""Licences, read from the metadata on the Hub by the real client: what is said, what is refused, what is silent."""

from __future__ import annotations

import pytest

from finetune.errors import GateRefused
from tests.helpers.hub_server import LoopbackHub
from tests.helpers.publishing import BASE, SHA, Act, recipe

HUB_ROWS = {"data": [{"source": "hub", "id": "me/rows"}]}


def licensed(hub: LoopbackHub, base: str, rows: str = "mit") -> None:
    """Put the base and a data set on the Hub, with these licences in their metadata."""
    hub.plant(BASE, {"README.md": f"---\nlicense: {base}\n---\n# Base\n"})
    repo = hub.repos["model", BASE]
    repo.commits[SHA] = repo.commits.pop(repo.head)
    hub.plant("me/rows", {"README.md": f"---\nlicense: {rows}\n---\n"}, "dataset")


def test_a_licence_that_forbids_derivatives_stops_the_push(hub: LoopbackHub, act: Act) -> None:
    licensed(hub, "cc-by-nd-4.0")
    with pytest.raises(GateRefused, match=r"forbids publishing derived works.*publish\.license") as error:
        act(recipe(**HUB_ROWS))
    assert "\n" not in str(error.value) and hub.asked("POST", "") == 0
    receipt = act(recipe(license="mit", **HUB_ROWS))
    assert receipt["licences"] == {f"model {BASE}": "cc-by-nd-4.0", "dataset me/rows": "mit"}
    assert any("cc-by-nd-4.0" in line and "publish.license is mit" in line for line in act.said)


def test_rows_do_not_derive_from_the_base(hub: LoopbackHub, act: Act) -> None:
    licensed(hub, "cc-by-nd-4.0")
    assert act(recipe(what=["dataset"], **HUB_ROWS))["pushes"]
    licensed(hub, "mit", "cc-by-nc-nd-4.0")
    with pytest.raises(GateRefused, match="dataset me/rows is under cc-by-nc-nd"):
        act(recipe(what=["dataset"], **HUB_ROWS))


@pytest.mark.parametrize(
    ("base", "rows", "words"),
    [
        ("apache-2.0", "cc-by-nc-4.0", "dataset me/rows is under cc-by-nc-4.0, which forbids commercial use"),
        ("llama2", "mit", "under llama2, a community licence: its text and notice"),
        ("llama3.1", "mit", "under llama3.1, a community licence: a model made of it is to carry Llama"),
        ("gemma", "mit", "under gemma, terms of use"),
        ("other\nlicense_name: house", "mit", f"of model {BASE} is other (house); read it"),
        ("mit", "[mit, cc-by-nc-sa-4.0]", "mit, cc-by-nc-sa-4.0, which forbids commercial use"),
    ],
    ids=["nc", "llama2", "llama3", "gemma", "other", "two"],
)
def test_a_licence_with_conditions_is_said(hub: LoopbackHub, act: Act, base: str, rows: str, words: str) -> None:
    licensed(hub, base, rows)
    act(recipe(license="other", **HUB_ROWS))
    said = act.licence_lines()
    assert len(said) == 1 and words in said[0]


def test_open_licences_are_silent_and_an_absent_one_is_said(hub: LoopbackHub, act: Act) -> None:
    licensed(hub, "apache-2.0")
    act(recipe(license="apache-2.0", **HUB_ROWS))
    assert act.licence_lines() == []
    assert b"licence: apache-2.0" in hub.files("me/tiny")["README.md"]
    act(recipe(**HUB_ROWS))
    assert act.licence_lines() == [
        "licence: publish.license is not set; without a licence others may not use the published model"
    ]


def test_a_licence_that_cannot_be_read_is_unknown(hub: LoopbackHub, act: Act) -> None:
    act(recipe(license="mit"))  # the base is not on this Hub
    said = act.licence_lines()
    assert f"cannot read the licence of model {BASE}" in said[0]
    assert said[1] == f"licence: the licence of model {BASE} is unknown; read it before you publish"
    assert b"licence: unknown" in hub.files("me/tiny")["README.md"]
