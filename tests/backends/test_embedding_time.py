import json
import os

from finetune.backends.embedding_time import describe, embedding_time


def built(folder, name, metrics, age):
    (folder / name).mkdir(parents=True)
    path = folder / name / "manifest.json"
    path.write_text(metrics if isinstance(metrics, str) else json.dumps({"metrics": metrics}))
    os.utime(path, (1000 - age, 1000 - age))


def test_the_last_stage_of_the_same_model_counts(tmp_path):
    built(tmp_path, "a", {"model": "m/m", "rows_per_second": 10.0}, age=5)
    built(tmp_path, "b", {"model": "m/m", "rows_per_second": 20.0}, age=3)
    built(tmp_path, "c", {"model": "other", "rows_per_second": 99.0}, age=1)
    built(tmp_path, "d", {"model": "m/m", "rows_per_second": None}, age=0)  # everything was kept from before
    built(tmp_path, "e", "half a manifest", age=0)
    found = embedding_time("m/m", 1000, tmp_path)
    assert found == {"rows": 1000, "rows_per_second": 20.0, "seconds": 50.0, "measured": True}
    assert describe(found) == "about 50 s for 1,000 rows at 20 a second (as the last embed stage here)"


def test_without_one_the_table_is_named(tmp_path):
    rates = [embedding_time(n, 100, tmp_path / "none")["rows_per_second"] for n in ("lsa", "model2vec:a/b", "a/b")]
    assert rates[1] > rates[0] > rates[2]
    found = embedding_time("a/b", 6000, tmp_path)
    assert found["seconds"] == 100 and "by the table" in describe(found)
