"""Data stages give the same bytes whatever engine runs their partitions."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from finetune.data.records import Example, Message, read_rows, row_ranges, write_rows
from finetune.dedup import embed
from finetune.engine.local import Local
from finetune.errors import InputError
from finetune.recipe import Render
from finetune.recipe.filters import Own
from finetune.stages import filter as filtering
from finetune.stages import render
from tests.helpers.base_templates import MISTRAL_LATER
from tests.helpers.tiny_tokenizers import build
from tests.stages.rows import context, recipe


class Apart(Local):
    """Engine with two workers in this process that share nothing with it but what is pickled."""

    def map(self, build, parts, rows, part_bytes=0):
        workers = [pickle.loads(pickle.dumps(build))() for _ in range(2)]
        for number, part in enumerate(parts):
            yield pickle.loads(pickle.dumps(workers[number % 2](pickle.loads(pickle.dumps(part)))))


def rows(count):
    words = "the sea is blue and </s> not red"
    return [
        Example(f"r:{i}", "r", (Message("user", f"What is {i}?"), Message("assistant", f"{i} {words} " * (1 + i % 4))))
        for i in range(count)
    ]


@pytest.fixture
def folders(tmp_path):
    made = {name: tmp_path / name for name in ("base", "ingest", "split")}
    for name in ("ingest", "split"):
        made[name].mkdir()
    build("metaspace", MISTRAL_LATER).save_pretrained(made["base"])
    write_rows(made["ingest"] / "rows.parquet", rows(3000), chunk=700)
    write_rows(made["split"] / "train.parquet", rows(3000), chunk=700)
    write_rows(made["split"] / "eval.parquet", rows(40))
    return made


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def built(folders, tmp_path, engine, name):
    """The bytes and metrics of filter and render."""
    found = {}
    asked = recipe(filter={"max_length_tokens": 60, "min_user_characters": 11})
    ctx = replace(context(tmp_path), engine=engine)
    for stage, spec in (
        (filtering, filtering.spec(asked)),
        (render, Render(max_length_tokens=40, max_truncated_fraction=1, max_unterminated_fraction=1)),
    ):
        out = tmp_path / name / stage.__name__
        out.mkdir(parents=True)
        metrics = stage.run(spec, folders, out, ctx)
        found[stage.__name__] = (files(out), metrics)
    return found


def test_partitions_and_workers_change_no_byte(folders, tmp_path, monkeypatch):
    one = built(folders, tmp_path, Local(1), "one")
    monkeypatch.setattr(filtering, "PART_ROWS", 1000)
    monkeypatch.setattr(render, "PART_ROWS", 512)
    assert built(folders, tmp_path, Apart(), "two") == one
    kept = one["finetune.stages.filter"][1]
    assert 0 < kept["rows_out"] < 3000 and len(kept["rejected"]) == 2, kept["rejected"]
    assert one["finetune.stages.render"][1]["truncated"] > 0


def test_an_own_rule_that_remembers_rows_sees_all_of_them_with_any_engine(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(filtering, "PART_ROWS", 1000)
    (tmp_path / "mine.py").write_text(
        "seen = set()\n\n\ndef again(row):\n    key = int(row.id[2:]) % 1500\n"
        "    if key in seen:\n        return 'seen before'\n    seen.add(key)\n"
    )
    own = Own(rule="own", function="mine:again", folder=tmp_path)
    asked = recipe(filter={})
    asked = asked.model_copy(update={"filter": asked.filter.model_copy(update={"rules": [own]})})
    (tmp_path / "out").mkdir()
    ctx = replace(context(tmp_path), engine=Apart())
    assert filtering.run(filtering.spec(asked), folders, tmp_path / "out", ctx)["rows_out"] == 1500


@pytest.mark.slow
def test_processes_change_no_byte(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(filtering, "PART_ROWS", 1000)
    monkeypatch.setattr(render, "PART_ROWS", 512)
    assert built(folders, tmp_path, Local(2), "two") == built(folders, tmp_path, Local(1), "one")


@pytest.mark.slow
def test_ray_changes_no_byte(folders, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from finetune.engine.ray import started

    monkeypatch.setattr(filtering, "PART_ROWS", 1000)
    monkeypatch.setattr(render, "PART_ROWS", 512)
    one = built(folders, tmp_path, Local(1), "one")
    with started(None, [], lambda line: None) as engine:
        assert built(folders, tmp_path, engine, "ray") == one


def test_ranges_of_rows_are_the_file(tmp_path):
    made = rows(50)
    write_rows(tmp_path / "rows.parquet", made, chunk=7)
    for size in (1, 6, 50, 80):
        assert [row for part in row_ranges(tmp_path / "rows.parquet", size) for row in part.read()] == made
    write_rows(tmp_path / "none.parquet", [])
    assert row_ranges(tmp_path / "none.parquet", 5) == []
    assert list(read_rows(tmp_path / "none.parquet")) == []


def test_lsa_in_parts_is_fitted_to_a_sample(monkeypatch):
    rng = np.random.default_rng(0)
    words = [f"w{k}" for k in rng.zipf(1.3, 40_000) % 3000]
    texts = []
    for i in range(1000):
        text = words[40 * i : 40 * i + 40]
        changed = text[: 2 * (i % 20)] + words[-40 * i - 40 :][: 40 - 2 * (i % 20)]
        texts += [" ".join(text), " ".join(changed)]
    whole = embed._unit(embed.lsa(texts))
    monkeypatch.setattr(embed, "PART_ROWS", 300)
    assert np.array_equal(embed._unit(embed.lsa(texts, Apart())), whole)
    monkeypatch.setattr(embed, "FITTED_ROWS", 1000)
    monkeypatch.setattr(embed, "PART_ROWS", 400)
    parts = embed._unit(embed.lsa(texts, Apart()))
    assert parts.shape == whole.shape
    assert np.array_equal(parts, embed._unit(embed.lsa(texts)))
    near, far = (np.einsum("ij,ij->i", v[::2], v[1::2]) for v in (whole, parts))
    assert np.corrcoef(near, far)[0, 1] > 0.97  # the same cosines, from half of the rows


def test_an_error_in_a_worker_is_the_error_of_the_stage():
    def build():
        raise InputError("row r:1 is wrong")

    with pytest.raises(InputError, match="r:1"):
        list(Local(1).map(build, [1], 1))
