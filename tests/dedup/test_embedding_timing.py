import pytest

from finetune.dedup.embedding_timing import describe, embedding_time, keep_rate


def test_what_was_measured_here_is_used_and_said(tmp_path):
    keep_rate(tmp_path, "m/m", 4000, 400.0)
    keep_rate(tmp_path, "m/m", 4000, 200.0)  # the last one counts
    keep_rate(tmp_path, "model2vec:s/s", 9000, 1.0)
    keep_rate(tmp_path, "m/m", 999, 1.0)  # so few say more of loading the model
    found = embedding_time("m/m", 1000, tmp_path)
    assert (found["rows_per_second"], found["seconds"], found["measured"]) == (20.0, 50.0, True)
    assert {name: other["measured"] for name, other in found["others"].items()} == {"model2vec:s/s": True, "lsa": False}
    assert describe(found) == (
        "m/m about 50 s (measured here) for 1,000 rows; instead: lsa about 0 s (an estimate for 2 cores); "
        "model2vec:s/s about 0 s (measured here)"
    )


def test_without_a_measurement_it_is_called_an_estimate(tmp_path):
    rates = [embedding_time(n, 100, tmp_path)["rows_per_second"] for n in ("lsa", "model2vec:a/b", "a/b", "a/b-large")]
    assert rates[1] > rates[0] > rates[2] > rates[3]
    found = embedding_time("lsa", 6000, tmp_path)
    assert not found["measured"] and list(found["others"]) == ["model2vec:", "sentence-transformers"]
    assert describe(found) == (
        "lsa about 3 s (an estimate for 2 cores) for 6,000 rows; instead: a static model about 1 s (an estimate for "
        "2 cores); a small transformer about 100 s (an estimate for 2 cores)"
    )


@pytest.mark.parametrize("damage", ["half a fi", "[]", '{"lsa": "fast"}', '{"lsa": 0}'], ids=list("abcd"))
def test_a_damaged_file_is_as_good_as_none(tmp_path, damage):
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "rates.json").write_text(damage)
    assert not embedding_time("lsa", 10, tmp_path)["measured"]
    keep_rate(tmp_path, "lsa", 2000, 2.0)
    assert embedding_time("lsa", 10, tmp_path)["rows_per_second"] == 1000.0


def test_a_place_that_takes_no_file_is_no_failure(tmp_path):
    (tmp_path / "embeddings").write_text("in the way")
    keep_rate(tmp_path, "lsa", 2000, 2.0)
    assert not embedding_time("lsa", 10, tmp_path)["measured"]
