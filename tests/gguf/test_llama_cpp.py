"""llama.cpp itself reads the files: the same tokens, and the same greedy answers as transformers on the merged model.

Needs llama-cpp-python (pip install llama-cpp-python; it is compiled on the spot) and, for K-quants, llama-quantize.
"""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.gguf.vocabulary import NEAR_SPLITS, SPLITS
from finetune.recipe import Export
from finetune.stages import export
from tests.gguf.test_writer import changed
from tests.helpers import mistral_tokenizers
from tests.helpers.exported import merged
from tests.helpers.tiny_models import load, save_tiny
from tests.stages.finished import context, write_rows

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

F32 = 0  # ggml's number
TEXTS = (
    "The sea is wide.\n",
    "I've 3 cafés, 12345 naïve 日本語 and a 🙂!\n\n\n  four\t",
    " leading and  double  spaces ",
    "def f(x):\n    return x + 1\r\n",
    "don't WE'LL 'tis x'y",
    "",
)
FAMILIES = [
    ("mistral", "byte_level"), ("qwen2", "byte_level"), ("llama", "byte_level"),
    ("mistral", "sentencepiece"), ("llama", "metaspace"),
]  # fmt: skip


def exported(folder: Path, kind: str = "mistral", tokens: str = "byte_level", *formats: str, **config: Any) -> Path:
    """A merged folder `merge`, and `out` with its GGUF files."""
    merged(folder / "merge", kind, "float16", tokens, **config)
    (folder / "out").mkdir()
    (folder / "render").mkdir()
    asked = Export.model_validate({"gguf": formats or ["f16"], "perplexity_rows": 0})
    export.run(
        export.Spec(export=asked, tokens=8192),
        {"merge": folder / "merge", "render": folder / "render"},
        folder / "out",
        context(folder),
    )
    return folder / "out"


def opened(path: Path) -> Any:
    """llama.cpp's model, with keys and values in fp32 as transformers has them."""
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, verbose=False, logits_all=True, type_k=F32, type_v=F32, flash_attn=False
    )


@pytest.mark.parametrize(("kind", "tokens"), FAMILIES, ids=["-".join(family) for family in FAMILIES])
def test_llama_cpp_makes_the_same_tokens_and_answers(tmp_path: Path, kind: str, tokens: str) -> None:
    from transformers import AutoTokenizer

    out = exported(tmp_path, kind, tokens, "f32", "f16")
    exact, half = (opened(out / f"model-{name}.gguf") for name in ("f32", "f16"))
    tokenizer, plain = AutoTokenizer.from_pretrained(tmp_path / "merge"), load(tmp_path / "merge")
    chat = [{"role": "user", "content": TEXTS[1].strip()}, {"role": "assistant", "content": "Yes."}]
    chat.append({"role": "user", "content": "Why </s> <|im_end|> not?"})
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert half.tokenize(prompt.encode(), add_bos=False, special=True) == ids
    starts = tokenizer("")["input_ids"]  # BOS, or nothing
    for text in TEXTS:  # as within a chat, which begins with BOS: `add_space_prefix` can only be right for one
        expected = tokenizer(tokenizer.decode(starts) + text, add_special_tokens=False)["input_ids"]
        assert half.tokenize(text.encode(), add_bos=True, special=True) == expected, text
    assert half.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    ends = json.loads((tmp_path / "merge/generation_config.json").read_text())["eos_token_id"]
    assert half.token_eos() == (ends[0] if isinstance(ends, list) else ends)

    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    question = torch.tensor([ids])  # with its mask: an id that is the pad token's would be left out
    answer = plain.generate(question, attention_mask=torch.ones_like(question), **options)[0].tolist()
    assert [*ids, *islice(exact.generate(ids, temp=0.0, repeat_penalty=1.0), 24)] == answer
    with torch.no_grad():
        logits = plain(torch.tensor([answer])).logits[0].numpy()
    for model, near in ((exact, 1e-4), (half, 1e-2)):  # llama.cpp multiplies f16 weights by activations in f16
        model.reset()
        model.eval(answer)
        assert abs(model.scores[: len(answer)] - logits).max() < near * abs(logits).max()


def sentences(count: int = 300) -> list[str]:
    """Texts of letters, digits, marks, spaces and line ends of many scripts, in no order that makes sense."""
    chance = random.Random(0)
    parts = [*"aeZ0 7\n\t.,'éÉ日яЯ🙂ß\u00a0\u200d\u0301", "  ", "\n\n", "\r\n", "'s", "'LL", " the", "Hello", "12345"]
    return [*TEXTS, *("".join(chance.choices(parts, k=chance.randint(1, 14))) for _ in range(count))]


def as_llama_cpp_reads(folder: Path, tokenizer: Any) -> tuple[list[str], str]:
    """The sentences that a file made of the tokenizer in `folder` reads otherwise, and what the export says of it."""
    rows = max(tokenizer.get_vocab().values()) + 1
    save_tiny(folder, "mistral", vocab_size=rows, hidden_size=32, head_dim=8)
    out = folder / "out"
    out.mkdir()
    asked = Export.model_validate({"gguf": ["q8_0"], "perplexity_rows": 0})
    said = export.run(export.Spec(export=asked, tokens=8192), {"merge": folder, "render": folder}, out, context(out))
    model = llama_cpp.Llama(str(out / "model-q8_0.gguf"), vocab_only=True, verbose=False)
    chats = [(text, f"<s>[INST] {text} [/INST] {text}</s>[INST] {text} [/INST]") for text in sentences()]
    own = tokenizer([chat for _, chat in chats], add_special_tokens=False)["input_ids"]
    read = [model.tokenize(chat.encode(), add_bos=False, special=True) for _, chat in chats]
    return [t for (t, _), a, b in zip(chats, own, read, strict=True) if a != b], str(said.get("tokenizer_differs", ""))


@pytest.mark.slow
@pytest.mark.parametrize("file", [True, False], ids=["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("prepend", ["every", "first"])
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_mistrals_sentencepiece_is_repeated(tmp_path: Path, version: str, prepend: str, file: bool) -> None:
    tokenizer = mistral_tokenizers.load(version, "{{ messages }}", prepend)
    tokenizer.save_pretrained(tmp_path)
    if file:
        shutil.copy(mistral_tokenizers.DATA / mistral_tokenizers.FILES[version], tmp_path / "tokenizer.model")
    assert as_llama_cpp_reads(tmp_path, tokenizer) == ([], "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "normalizer"), [("llama-bpe", None), ("qwen2", None), ("qwen2", "NFC"), ("tekken", None)]
)
def test_a_byte_level_split_is_repeated_or_said_to_differ(tmp_path: Path, split: str, normalizer: str | None) -> None:
    """With the merges of Mistral's Tekken, whichever way the text is split: they show where words are cut."""
    from transformers import AutoTokenizer

    patterns = {name: pattern for pattern, name in SPLITS.items()}
    patterns |= {name: pattern for pattern, (name, _) in NEAR_SPLITS.items()}
    mistral_tokenizers.load("tekken", "{{ messages }}").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = patterns[split]
    content["normalizer"] = {"type": normalizer} if normalizer else None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found, said = as_llama_cpp_reads(tmp_path, AutoTokenizer.from_pretrained(tmp_path))
    assert bool(found) == bool(said)
    assert all(any(unicodedata.category(c) == "Mn" or c in "ÉЯ" for c in text) for text in found)


def reads(folder: Path, text: str) -> tuple[list[int], list[int]]:
    """The ids of a text: llama.cpp's from a file of the tokenizer in `folder`, and the tokenizer's own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    as_llama_cpp_reads(folder, tokenizer)
    model = llama_cpp.Llama(str(folder / "out/model-q8_0.gguf"), vocab_only=True, verbose=False)
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    return model.tokenize(text.encode(), add_bos=False, special=True), own


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_words_that_no_merge_makes_are_whole_or_not(tmp_path: Path, whole: bool) -> None:
    read, own = reads(changed(merged(tmp_path / "model"), ignore_merges=whole), "zqzq")
    assert read == own and (len(own) == 1) == whole


@pytest.mark.slow
def test_white_space_behind_phi3s_special_tokens(tmp_path: Path) -> None:
    folder = merged(tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    kept, first = ("<unk>", "<s>", "<|endoftext|>"), max(content["model"]["vocab"].values()) + 100
    more = [{**content["added_tokens"][0], "id": first + i, "content": n} for i, n in enumerate((*kept, "</s>"))]
    content["added_tokens"] = [{**t, "rstrip": t["content"] not in kept} for t in [*content["added_tokens"], *more]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    read, own = reads(folder, "<s>  a<|im_end|>  b<|im_start|>\nc</s> d<|endoftext|> e")
    assert read == own


def test_k_quants_of_llama_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real program: each file is a model llama.cpp opens, and two bits are further from it than four."""
    if shutil.which("llama-quantize") is None:
        pytest.skip("llama-quantize is not on the PATH")
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    merged(tmp_path / "merge", "mistral", "float16", **wide)
    render, out = tmp_path / "render", tmp_path / "out"
    render.mkdir(), out.mkdir()
    size = json.loads((tmp_path / "merge/config.json").read_text())["vocab_size"]
    chance = random.Random(0)
    write_rows(render / "eval.parquet", [[chance.randrange(3, size) for _ in range(30)] for _ in range(16)])
    asked = Export.model_validate({"gguf": ["q2_k", "q4_k_m", "q6_k", "f16"], "perplexity_rows": 16})
    metrics: dict[str, Any] = export.run(
        export.Spec(export=asked, tokens=8192), {"merge": tmp_path / "merge", "render": render}, out, context(out)
    )
    found = metrics["perplexity"]
    away = {kind: abs(found[kind] / found["merged"] - 1) for kind in ("q2_k", "q4_k_m", "q6_k", "f16")}
    assert away["f16"] < away["q6_k"] < away["q4_k_m"] < away["q2_k"]
    sizes = [metrics["bytes"][f"model-{kind}.gguf"] for kind in ("q2_k", "q4_k_m", "q6_k", "f16")]
    assert sizes == sorted(sizes)
    with torch.no_grad():
        expected = load(tmp_path / "merge")(torch.arange(3, 40)[None]).logits[0].numpy()
    apart = []
    for kind in ("q2_k", "q4_k_m", "f16"):
        model = opened(out / f"model-{kind}.gguf")
        model.eval(list(range(3, 40)))
        apart.append(float(((model.scores[:37] - expected) ** 2).mean()))
    assert apart[0] > apart[1] > apart[2]
