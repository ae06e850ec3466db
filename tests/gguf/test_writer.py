"""GGUF files: the weights read back as they were, and the vocabulary in llama.cpp's words."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import InputError
from finetune.gguf import support
from finetune.gguf import writer as gguf_writer
from finetune.gguf.reader import GgufWeights
from finetune.gguf.vocabulary import Vocabulary, read_sentencepiece, read_vocabulary
from finetune.tiny.model import train_tokenizer
from finetune.utils.files import read_json
from tests.helpers.exported import merged, sentencepiece_file
from tests.helpers.tiny_models import load, save_tiny
from tests.helpers.tiny_tokenizers import CORPUS, build

gguf = pytest.importorskip("gguf")

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write(folder: Path, path: Path, kind: str, planned: list[gguf_writer.Planned] | None = None) -> Path:
    config = read_json(folder / "config.json")
    tokens = [f"t{i}" for i in range(config["vocab_size"])]
    vocabulary = Vocabulary("gpt2", "llama-bpe", tokens, [1] * len(tokens), merges=["t 1"])
    header = gguf_writer.Header(config, vocabulary, {"bos": 1, "pad": 0}, (2, 7, 9), "{{ messages }}")
    gguf_writer.write(path, header, planned or gguf_writer.plan(folder, config, kind), kind)
    return path


def reload(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def greedy(model: Any) -> list[int]:
    ids = torch.arange(3, 30)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


def field(path: Path, key: str) -> Any:
    found = gguf.GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2"])
@pytest.mark.parametrize("written", ["f32", "f16", "bf16"])
def test_weights_read_back_are_those_written(tmp_path: Path, kind: str, written: str) -> None:
    folder = save_tiny(tmp_path / "model", kind)
    found = reload(write(folder, tmp_path / "x.gguf", written)).state_dict()
    weights = load_file(folder / "model.safetensors")
    if kind == "qwen2":
        assert any(n.endswith("q_proj.bias") and w.abs().max() > 0 for n, w in weights.items())
    for name, weight in weights.items():
        expected = weight if weight.ndim == 1 else weight.to(DTYPES[written]).float()
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("written", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2"])
def test_greedy_answers_are_equal(tmp_path: Path, kind: str, written: str) -> None:
    folder = save_tiny(tmp_path / "model", kind)
    merged = load(folder)
    with torch.no_grad():
        for weight in merged.parameters():  # as a model that is merged into that type has them
            if weight.ndim > 1:
                weight.copy_(weight.to(DTYPES[written]))
    assert greedy(reload(write(folder, tmp_path / "x.gguf", written))) == greedy(merged)


WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {  # at values that are easily left out of a file
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "sliding_window": 8}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "starcoder2": ("starcoder2", {"use_bias": True, "sliding_window": 8}),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("written", ["f32", "bf16"])
def test_transformers_reads_back_weights_and_greedy_answers(tmp_path: Path, name: str, written: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, config = WRITTEN[name]
    folder = save_tiny(tmp_path / "model", kind, "bfloat16" if written == "bf16" else "float32", **config)
    path = write(folder, tmp_path / "x.gguf", written)
    assert field(path, "general.architecture") == name
    read = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, config=AutoConfig.from_pretrained(folder)
    ).eval()
    merged = load(folder)
    offset = support.of_config(read_json(folder / "config.json")).offset
    for weight_name, weight in merged.state_dict().items():
        exact = weight.float() + offset - offset if weight_name.endswith("norm.weight") else weight
        assert torch.equal(read.state_dict()[weight_name], exact), weight_name
    assert greedy(read) == greedy(merged)
    own = GgufWeights(path, gguf_writer.plan(folder, read_json(folder / "config.json"), written))
    own.require_same(read.state_dict())
    assert max(own.difference(p) for p in own.planned.values()) <= 2**-23


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar is 20"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "every 6th layer"),
        ("gemma3", {"rope_local_base_freq": 5000.0}, "rotary base of 10000"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type longrope"),
    ],
)
def test_what_llama_cpp_takes_for_granted_is_compared(
    tmp_path: Path, name: str, change: dict[str, Any], words: str
) -> None:
    kind, config = WRITTEN[name]
    plain = read_json(save_tiny(tmp_path / "model", kind, **config) / "config.json")
    assert support.problem(plain) is None
    odd = {k: v for k, v in plain.items() if k != "rope_parameters"} if "rope" in str(change) else plain
    assert words in str(support.problem({**odd, **change}))


def test_rows_left_in_place_are_seen(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mistral")
    planned = gguf_writer.plan(folder, read_json(folder / "config.json"), "f32")
    assert {p.heads for p in planned if ".attn_q." in p.name} == {4}
    assert {p.heads for p in planned if ".attn_k." in p.name} == {2}
    unpermuted = [dataclasses.replace(p, heads=0) for p in planned]
    found = reload(write(folder, tmp_path / "x.gguf", "f32", unpermuted)).state_dict()
    weights = load_file(folder / "model.safetensors")
    different = {n.split(".")[-2] for n, w in weights.items() if not torch.equal(found[n], w)}
    assert different == {"q_proj", "k_proj"}


def test_a_permutation_keeps_every_row_and_pairs_the_halves() -> None:
    weight = torch.arange(16).reshape(16, 1)  # two heads of eight
    assert gguf_writer.permute(weight, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@pytest.mark.parametrize(
    ("kind", "near"), [("q8_0", 0.01), ("q5_1", 0.05), ("q5_0", 0.08), ("q4_1", 0.1), ("q4_0", 0.15)]
)
def test_blocks_are_near(tmp_path: Path, kind: str, near: float) -> None:
    folder = save_tiny(tmp_path / "model", "mistral", intermediate_size=96)
    path = write(folder, tmp_path / "x.gguf", kind)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == kind.upper()
    assert types["output.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.1.ffn_norm.weight"] == types["output_norm.weight"] == "F32"
    found = reload(path).state_dict()
    for name, weight in load_file(folder / "model.safetensors").items():
        assert float((found[name] - weight).norm() / weight.norm()) < near, name


def test_rows_that_fill_no_block_are_f16(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mistral", intermediate_size=112)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(write(folder, tmp_path / "x.gguf", "q8_0")).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"


def test_the_metadata_says_what_the_config_says(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    folder = save_tiny(tmp_path / "model", "mistral", rope_parameters=rope, head_dim=32, rms_norm_eps=2e-5)
    path = write(folder, tmp_path / "x.gguf", "f16")
    expected = {
        "general.architecture": "llama", "general.file_type": 1, "llama.context_length": 256, "llama.block_count": 2,
        "llama.embedding_length": 64, "llama.feed_forward_length": 112, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 32, "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 5000.0, "llama.vocab_size": 128, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    assert {key: field(path, key) for key in expected} == expected
    assert field(path, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(2e-5)
    assert str(tmp_path).encode() not in path.read_bytes()


def test_a_tied_head_is_not_written_twice(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    path = write(folder, tmp_path / "x.gguf", "f32")
    assert "output.weight" not in {t.name for t in gguf.GGUFReader(path).tensors}
    assert greedy(reload(path)) == greedy(load(folder))


def test_llama3_factors_divide_the_frequencies_that_transformers_computes(tmp_path: Path) -> None:
    shape = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **shape}
    folder = save_tiny(tmp_path / "model", "llama", rope_parameters=rope)
    tensors = {t.name: t.data for t in gguf.GGUFReader(write(folder, tmp_path / "x.gguf", "f32")).tensors}
    plain = 500.0 ** (-torch.arange(0, 16, 2) / 16)
    expected = load(folder).model.rotary_emb.inv_freq
    torch.testing.assert_close(plain / torch.tensor(tensors["rope_freqs.weight"]), expected)
    config = {**read_json(folder / "config.json"), "rope_parameters": {"rope_type": "longrope"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="longrope"):
        write(folder, tmp_path / "y.gguf", "f32")


def test_values_that_f16_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mistral")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 3] = 1e6
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight holds values beyond f16"):
        write(folder, tmp_path / "x.gguf", "f16")
    write(folder, tmp_path / "y.gguf", "bf16")


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gemma")
    with pytest.raises(InputError, match=r"no GGUF of GemmaForCausalLM .* Qwen2ForCausalLM"):
        gguf_writer.plan(folder, read_json(folder / "config.json"), "f32")
    with pytest.raises(InputError, match=r"model\.layers\.0\.other\.weight has no place"):
        support.tensor_name("model.layers.0.other.weight", support.ARCHITECTURES["LlamaForCausalLM"])


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_writer.require_gguf()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install gguf"):
        gguf_writer.require_gguf()


def read(folder: Path, rows: int = 1000, bos: str | None = "<s>") -> Vocabulary:
    return read_vocabulary(folder, read_json(folder / "tokenizer.json"), rows, bos)


def test_byte_level_vocabulary(tmp_path: Path) -> None:
    folder = merged(tmp_path / "model")
    tokenizer = build("byte_level")
    found = read(folder, bos="<|begin_of_text|>")
    assert (found.model, found.pre, found.differs, found.add_bos) == ("gpt2", "llama-bpe", "", False)
    assert found.tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert (kinds["<|im_end|>"], kinds["<tool_call>"], kinds["a"], kinds["[PAD999]"]) == (3, 4, 1, 5)
    assert read(merged(tmp_path / "qwen", "qwen2")).pre == "qwen2"
    with pytest.raises(InputError, match="embedding only 100 rows"):
        read(folder, 100)


def changed(folder: Path, **model: Any) -> Path:
    """The tokenizer of `folder` with a word that no merge makes, and fields of its model set."""
    content = read_json(folder / "tokenizer.json")
    content["model"]["vocab"]["zqzq"] = len(content["model"]["vocab"]) + 500
    content["model"].update(model)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_words_that_no_merge_makes_are_read_as_the_tokenizer_reads_them(tmp_path: Path) -> None:
    whole, merges = (changed(merged(tmp_path / str(i)), ignore_merges=i) for i in (True, False))
    assert [(v.pre, v.differs) for v in (read(whole, 1200), read(merges, 1200))] == [("llama-bpe", ""), ("dbrx", "")]
    found = read(changed(merged(tmp_path / "qwen", "qwen2"), ignore_merges=True), 1200)
    assert (found.pre, found.differs) == ("qwen2", "words that no merge makes")


def test_white_space_beside_special_tokens(tmp_path: Path) -> None:
    """llama.cpp strips it as Phi-3's tokenizer does, where the model's name is Phi-3's, and nowhere else."""
    folder = merged(tmp_path / "model", "phi3")
    content = read_json(folder / "tokenizer.json")
    assert not read(folder).strips and read(folder).differs == ""
    assert field(write(folder, tmp_path / "x.gguf", "f32"), "general.name").startswith("phi-")

    def stripping(names: set[str], side: str = "rstrip") -> Vocabulary:
        added = [{**t, side: t["content"] in names} for t in content["added_tokens"]]
        return read_vocabulary(folder, {**content, "added_tokens": added}, 1000, None)

    assert stripping({"<|im_end|>"}).differs == stripping({"<|im_end|>"}, "lstrip").differs != ""
    for i, name in enumerate(("<unk>", "<s>", "<|endoftext|>", "</s>")):
        content["model"]["vocab"][name] = 900 + i
    kept = {t["content"] for t in content["added_tokens"]} - {"<unk>", "<s>", "<|endoftext|>"}
    assert (stripping(kept).strips, stripping(kept).differs) == (True, "")
    assert stripping(kept - {"<|im_end|>"}).differs


def test_a_split_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    build("byte_level").save_pretrained(tmp_path)  # as Llama-3, but without contractions
    with pytest.raises(InputError, match=r"llama\.cpp has no splitter"):
        read(tmp_path)
    (tmp_path / "unigram").mkdir()
    build("unigram").save_pretrained(tmp_path / "unigram")
    with pytest.raises(InputError, match="this one is Unigram"):
        read(tmp_path / "unigram")


@pytest.mark.parametrize(
    ("normalizer", "differs"),
    [({"type": "NFC"}, "accents that are"), ({"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}, None)],
    ids=["nfc", "lower case"],
)
def test_what_is_done_to_text_before_it_is_split(tmp_path: Path, normalizer: Any, differs: str | None) -> None:
    folder = merged(tmp_path / "model", "qwen2")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**read_json(path), "normalizer": normalizer}))
    if differs:
        assert read(folder).differs.startswith(differs)
    else:
        with pytest.raises(InputError, match=r"llama\.cpp does not repeat what Lowercase does to text"):
            read(folder)


def test_the_builtin_is_near_and_says_so(tmp_path: Path) -> None:
    train_tokenizer(CORPUS, 300).save_pretrained(tmp_path)
    found = read(tmp_path)
    assert (found.pre, found.differs, found.add_bos) == ("smollm", "contractions", True)


def test_sentencepiece_vocabulary_from_merges(tmp_path: Path) -> None:
    found = {t: read(merged(tmp_path / t, tokens=t)) for t in ("sentencepiece", "metaspace")}
    assert {t: (v.model, v.add_bos, v.add_space_prefix) for t, v in found.items()} == {
        "sentencepiece": ("llama", True, True),
        "metaspace": ("llama", True, False),  # its chats have no space behind <s>
    }
    vocabulary = found["sentencepiece"]
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x0A>"], kinds["▁the"]) == (2, 3, 6, 1)
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    merges = read_json(tmp_path / "sentencepiece/tokenizer.json")["model"]["merges"]
    first, last = "".join(merges[0]), "".join(merges[-1])
    assert scores[first] > scores[last]
    build("sentencepiece").save_pretrained(tmp_path)  # trained, not converted: some pairs have no merge
    with pytest.raises(InputError, match="was not converted from SentencePiece"):
        read(tmp_path)


def test_sentencepiece_vocabulary_from_its_own_file(tmp_path: Path) -> None:
    folder = merged(tmp_path / "model", tokens="sentencepiece")
    pieces = sentencepiece_file(folder / "tokenizer.model")
    assert [(t, k, pytest.approx(s)) for t, k, s in pieces] == read_sentencepiece(folder / "tokenizer.model")
    found = read(folder, 10)
    assert found.tokens[:6] == [p[0] for p in pieces]
    assert found.scores[5] == -0.5
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        read(folder)
