"""A model no better than its base is not pushed without --force; texts of local rows stay on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.context import Context
from finetune.data.records import Example, Message, write_rows
from finetune.errors import GateRefused
from finetune.eval.verdict import verdict
from finetune.publish import private_rows
from finetune.publish.card import write_card
from finetune.publish.facts import Facts
from finetune.publish.publish import _check_worth
from finetune.recipe import Recipe
from tests.publish.test_card import facts

SAME = {
    "perplexity_base": 10.0, "perplexity_adapter": 9.9, "perplexity_ratio": 0.99,
    "perplexity_ratio_interval": [0.9, 1.1], "rows": 40, "tokens": 900, "generations": 4, "stop_rate": 1.0,
}  # fmt: skip
BETTER = {**SAME, "perplexity_adapter": 5.0, "perplexity_ratio": 0.5, "perplexity_ratio_interval": [0.4, 0.6]}


def of(evaluate: dict[str, Any], **train: Any) -> Facts:
    trained = {"steps": 100, "loss": 1.5, **train}
    metrics = {"train": trained, "evaluate": evaluate}
    return facts(metrics=metrics, verdict=verdict(trained, evaluate, {}, merged=False))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    recipe = Recipe.model_validate({"name": "x", "model": "a/b", "data": [{"source": "pydoc"}]})
    return Context(tmp_path, recipe.runtime, recipe.tracking)


def test_a_model_no_better_than_its_base_needs_force(ctx: Context) -> None:
    with pytest.raises(GateRefused, match=r"does not differ from its base.*--force"):
        _check_worth(of(SAME), ["adapter"], ctx, force=False, dry_run=False)
    with pytest.raises(GateRefused, match=r"repeats its training rows.*fewer train\.epochs.*--force"):
        _check_worth(of(BETTER, loss=0.01), ["adapter"], ctx, force=False, dry_run=False)
    _check_worth(of(BETTER, loss=0.01), ["adapter"], ctx, force=True, dry_run=False)
    _check_worth(of(SAME), ["adapter"], ctx, force=True, dry_run=False)
    _check_worth(of(SAME), ["adapter"], ctx, force=False, dry_run=True)
    _check_worth(of(SAME), ["dataset"], ctx, force=False, dry_run=False)
    _check_worth(of(BETTER), ["adapter"], ctx, force=False, dry_run=False)
    _check_worth(of({}), ["adapter"], ctx, force=False, dry_run=False)


@pytest.mark.parametrize(
    ("made", "warning"),
    [
        (of(SAME), "**Warning: the adapter does not differ from its base"),
        (of(BETTER, steps=2), "**Warning: trained for 2 optimiser steps only.**"),
        (of(BETTER, loss=0.01), "**Warning: it repeats its training rows"),
    ],
)
def test_the_card_warns_at_its_head(made: Facts, warning: str) -> None:
    text = write_card("adapter", "me/x", made).text
    assert warning in text[: text.index("## Data")]


def test_the_card_of_a_good_run_has_the_verdict_and_no_warning() -> None:
    text = write_card("adapter", "me/x", of(BETTER)).text
    assert "Warning" not in text and "Better than the base? yes" in text and "Adapter or merged model?" not in text


def made(tmp_path: Path, source: dict[str, Any], **publish: Any) -> Recipe:
    return Recipe.model_validate({"name": "x", "model": "a/b", "data": [source], "publish": publish})


def test_no_text_of_a_local_file_is_shown_unless_the_recipe_says_so(tmp_path: Path) -> None:
    local, hub = {"source": "local", "path": "/x/rows.csv"}, {"source": "hub", "id": "a/rows"}
    assert private_rows.samples_shown(made(tmp_path, local)) == 0
    assert private_rows.samples_shown(made(tmp_path, local, samples=2)) == 2
    assert private_rows.samples_shown(made(tmp_path, hub)) == 3
    assert private_rows.samples_shown(made(tmp_path, hub, samples=0)) == 0


def test_private_text_is_counted_in_local_rows_only(tmp_path: Path) -> None:
    def row(number: int, source: str, text: str) -> Example:
        return Example(f"{source}:{number}", source, (Message("user", text), Message("assistant", "ok")))

    write_rows(tmp_path / "train.parquet", [row(1, "rows.csv", "I am a@b.example"), row(2, "rows.csv", "hello")])
    write_rows(tmp_path / "eval.parquet", [row(3, "rows.csv#2", "c@d.example"), row(4, "a/rows", "e@f.example")])
    local = made(tmp_path, {"source": "local", "path": "/x/rows.csv"})
    said = private_rows.private_text(local, {"split": tmp_path}, "this push")
    assert "before this push: of 3 rows 2 with e-mail addresses" in said and "example" not in said
    assert not private_rows.private_text(made(tmp_path, {"source": "pydoc"}), {"split": tmp_path}, "x")
    assert not private_rows.private_text(local, {}, "x")
