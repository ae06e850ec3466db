"""The card says what was measured, is valid Hub metadata, leaks nothing, and its code compiles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.hub.client import Kind
from finetune.publish.card import CURVE, write_card
from finetune.publish.facts import Facts
from finetune.recipe import Recipe

PLATYPUS_ROWS = "held-out rows of garage-bAInd/Open-Platypus"
BASES = ("base_model", "base_model_relation", "library_name")
SHA = "0123456789abcdef0123456789abcdef01234567"
BASE = {"id": "mistralai/Mistral-7B", "kind": "hub", "revision": SHA, "parameters": 7_241_732_096, "dtype": "bfloat16"}
CERTIFICATE = {
    "base": "original",
    "perplexity_trained": 4.0,
    "perplexity_merged": 4.02,
    "mean_kl": 0.003,
    "agreement": 0.97,
}
TEMPLATE = {"name": "chatml", "sha256": "ab" * 32, "terminators": [2, 32000], "pad_token": "<pad>", "bos": True}
METRICS: dict[str, dict[str, Any]] = {
    "ingest": {"rows": 24926, "sources": {"garage-bAInd/Open-Platypus": 24926}},
    "dedup": {"rows": 18159, "exact": 12, "embedding": 6725},
    "train": {"loss": 0.9123456, "tokens_per_second": 2413.0, "peak_memory_bytes": 13_100_000_000, "precision": "bf16"},
    "evaluate": {"perplexity_base": 7.5, "perplexity_adapter": 4.0, "stop_rate": 0.96875},
    "certify": {"perplexity_merged": 4.02},
}


def recipe(**changes: Any) -> Recipe:
    hub = {"source": "hub", "id": "garage-bAInd/Open-Platypus"}
    raw = {
        "name": "mistral-platypus",
        "model": "mistralai/Mistral-7B",
        "data": [hub],
        "publish": {"repo": "me/x"},
        **changes,
    }
    return Recipe.model_validate(raw)


def facts(**changes: Any) -> Facts:
    made: dict[str, Any] = {
        "recipe": recipe(),
        "recipe_text": "name: mistral-platypus\n",
        "metrics": METRICS,
        "base": BASE,
        "certificate": CERTIFICATE,
        "template": TEMPLATE,
    }
    return Facts(**{**made, **changes})


def card(kind: Kind = "adapter", **changes: Any) -> str:
    return write_card(kind, "me/x", facts(**changes)).text


def metadata(text: str) -> dict[str, Any]:
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert front
    loaded = yaml.safe_load(front[1])
    assert isinstance(loaded, dict)
    return loaded


def code(text: str) -> str:
    block = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert block
    return block[1]


def test_metadata_of_an_adapter() -> None:
    assert metadata(card(recipe=recipe(publish={"repo": "me/x", "license": "apache-2.0"}))) == {
        "base_model": "mistralai/Mistral-7B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["garage-bAInd/Open-Platypus"],
        "tags": ["lora", "sft", "text-generation", "qlora"],
        "model-index": [
            {
                "name": "x",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": PLATYPUS_ROWS, "type": "garage-bAInd/Open-Platypus"},
                        "metrics": [
                            {"type": "perplexity", "value": 4.0, "name": "Perplexity"},
                            {"type": "stop_rate", "value": 0.96875, "name": "Share of greedy answers that end"},
                        ],
                    }
                ],
            }
        ],
    }


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_model_that_never_stops_has_that_as_its_first_limit(kind: str) -> None:
    never = {"evaluate": {**METRICS["evaluate"], "stop_rate": 0.0, "generations": 32}}
    limits = card(kind, metrics={**METRICS, **never}).split("## Limits\n\n- ")[1]
    assert limits.startswith("NO ANSWER ENDED BY ITSELF (0 of 32,") and "Give a limit of new tokens." in limits
    assert "NO ANSWER" not in card(kind)


def test_metadata_reads_back_through_the_client() -> None:
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCard(card()).data
    assert isinstance(data, ModelCardData) and data["base_model"] == "mistralai/Mistral-7B"
    measured = {r.metric_type: r.metric_value for r in data.eval_results or ()}
    assert measured == {"perplexity": 4.0, "stop_rate": 0.96875}
    merged = ModelCard(card("merged")).data
    assert isinstance(merged, ModelCardData) and "license" not in metadata(card("merged"))
    assert (merged["base_model_relation"], merged["library_name"]) == ("finetune", "transformers")
    found = [(r.metric_type, r.metric_value, r.dataset_name) for r in merged.eval_results or ()]
    assert found == [("perplexity", 4.02, PLATYPUS_ROWS)]  # how often the merged model ends was not measured


def test_only_what_is_on_the_hub_is_named_as_such() -> None:
    local = recipe(model="builtin:tiny-mistral", data=[{"source": "pydoc"}])
    text = card(recipe=local, base={"id": "builtin:tiny-mistral", "kind": "builtin", "revision": None})
    assert not {"base_model", "base_model_relation", "datasets"} & set(metadata(text))
    assert "not on the Hub" in text


def test_every_measured_figure_is_there() -> None:
    text = card()
    for words in (
        "24,926",
        "18,159",
        "embedding 6,725",
        "| `loss` | 0.9123 |",
        "13.10 GB",
        "| `perplexity_base` | 7.5 |",
        "| `perplexity_adapter` | 4 |",
        "| `perplexity_merged` | 4.02 |",
        "| `stop_rate` | 0.9688 |",
        "original 16-bit weights",
        "0.97",
        SHA,
        "`[2, 32000]`",
    ):
        assert words in text, words
    assert text.index("`ingest`") < text.index("`dedup`") < text.index("`loss`") < text.index("`stop_rate`")


def test_nested_counts_and_intervals_have_a_short_form() -> None:
    sources = {"a/b": {"rows": 1000, "refused": 2}}
    figures = {"sources": sources, "interval": [0.5, 1.25], "curve": [1, 2, 3], "none": None}
    text = card(metrics={"train": figures})
    assert "| `sources` | a/b rows 1,000, refused 2 |" in text
    assert "| `interval` | 0.5 to 1.25 |" in text
    assert "curve" not in text and "`none`" not in text


def test_the_card_of_a_quantised_folder_says_what_it_cost_and_how_to_serve_it() -> None:
    found = {
        "perplexity": {"merged": 4.02, "q8_0": 4.03, "fp8": 4.05},
        "agreement": {"q8_0": 0.99, "fp8": 0.98},
        "mean_kl": {"q8_0": 0.001, "fp8": 0.002},
        "bytes": {"model-q8_0.gguf": 10, "fp8": 12345},
        "perplexity_rows": 24,
    }
    asked, names = recipe(export={"gguf": ["q8_0"], "hf": ["fp8"]}), {"fp8": "me/x", "merged": "me/y"}
    text = card("fp8", recipe=asked, metrics={**METRICS, "export": found}, siblings=names)
    loaded = metadata(text)
    assert [loaded[n] for n in ("base_model", "base_model_relation", "library_name")] == [
        "me/y",
        "quantized",
        "transformers",
    ]
    results = loaded["model-index"][0]["results"][0]["metrics"]
    assert [(r["name"], r["value"]) for r in results] == [("Perplexity (fp8)", 4.05)]
    for words in ("vllm serve me/x", "transformers serve me/x", "float8_e4m3fn"):
        assert words in text, words
    for words in ("| `perplexity_fp8` | 4.05 |", "| `agreement_fp8` | 0.98 |", "| `mean_kl_fp8` |", "| `bytes_fp8` |"):
        assert words in text, words


@pytest.mark.parametrize(("kind", "reader"), [("fp8", "compressed-tensors"), ("nf4", "bitsandbytes")])
def test_a_card_without_gguf_names_none_and_every_way_to_load_names_its_packages(kind: str, reader: str) -> None:
    found = {"perplexity": {"merged": 4.02, kind: 4.05}, "perplexity_rows": 24}
    text = card(kind, recipe=recipe(export={"hf": [kind]}), metrics={**METRICS, "export": found})
    assert "| `perplexity_merged_beside_files` | 4.02 |" in text and "as_gguf" not in text
    assert f"# pip install transformers accelerate {reader}\nimport torch\n" in text
    assert f"pip install 'transformers[serving]' {reader}\n" in text


def test_a_gguf_card_says_what_quantising_cost_and_how_to_run_it() -> None:
    asked = recipe(export={"gguf": ["q8_0", "q2_k"]})
    found = {
        "perplexity": {"merged": 4.02, "q8_0": 4.03, "q2_k": 5.5},
        "agreement": {"q8_0": 0.99, "q2_k": 0.8},
        "perplexity_rows": 24,
        "tokenizer_exact": False,
        "tokenizer_differs": "contractions",
    }
    text = card("gguf", recipe=asked, metrics={**METRICS, "export": found}, siblings={"gguf": "me/x", "merged": "me/y"})
    loaded = metadata(text)
    assert [loaded[n] for n in BASES] == ["me/y", "quantized", "gguf"]
    results = loaded["model-index"][0]["results"][0]["metrics"]
    assert [(r["name"], r["value"]) for r in results] == [("Perplexity (q8_0)", 4.03), ("Perplexity (q2_k)", 5.5)]
    for words in (
        "| `perplexity_gguf_q2_k` | 5.5 |",
        "beside them, on 24 rows",
        "| `agreement_gguf_q2_k` | 0.8 |",
        "on which file and merged model agree",
        "hf download me/x model-q8_0.gguf Modelfile",
        "llama-cli -m model-q8_0.gguf",
        "ollama create mistral-platypus",
        "reads contractions in other tokens",
        "Also published, merged: me/y",
    ):
        assert words in text, words
    alone = card("gguf", recipe=asked, metrics={"export": {"perplexity_unknown": "too large"}})
    assert metadata(alone)["base_model"] == "mistralai/Mistral-7B" and "was not measured: too large" in alone
    assert "model-index" not in metadata(alone)


def test_machine_revisions_and_licences() -> None:
    platypus = "dataset garage-bAInd/Open-Platypus"
    text = card(
        metrics={"train": {"device": "Tesla T4", "peak_memory_bytes": 13_100_000_000, "tokens_per_second": 2413.0}},
        seconds={"train": 5765.0, "dedup": 61.5, "filter": 30.0},
        versions={"torch": "2.13.0", "numpy": "2.4"},
        sources=[{"commit": SHA[::-1]}],
        licences={"model mistralai/Mistral-7B": "apache-2.0", platypus: "cc-by-nc-4.0"},
    )
    for words in (
        "- Hardware: Tesla T4\n",
        "- Time: 1 h 36 min for the training stage, 2,413 tokens a second\n",
        "- Time of the other stages together: 1 min 32 s\n",
        "- Peak memory while training: 13.10 GB\n",
        "- Libraries: torch 2.13.0\n",
        f"revision `{SHA[::-1]}`, licence: cc-by-nc-4.0",
        f"revision `{SHA}`, 7,241,732,096 parameters, licence: apache-2.0",
    ):
        assert words in text, words
    assert "licence: unknown" in card() and "Hardware" not in card(metrics={})


def test_the_training_curve_is_a_picture_that_stands_alone() -> None:
    steps = [{"step": n, "loss": 3.0 - n / 10, "tokens": n} for n in range(1, 21)] + [
        {"step": 21, "loss": float("nan")}
    ]
    made = write_card("merged", "me/x", facts(steps=steps))
    assert (
        f"![Loss while training]({CURVE})" in made.text and "Loss over 20 logged steps: first 2.9, last 1" in made.text
    )
    root = ElementTree.fromstring(made.files[CURVE])
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("width") == "800"
    kinds = [e.tag.split("}")[1] for e in root.iter()]
    assert kinds.count("polyline") == 2 and "style" in kinds and not {"script", "image"} & set(kinds)
    assert write_card("merged", "me/x", facts(steps=steps)).files == made.files
    assert write_card("merged", "me/x", facts(steps=steps[:1])).files == {} and CURVE not in card(steps=steps[:1])


def sample(prompt: str, text: str, base: str = "") -> dict[str, Any]:
    answers = {"adapter": {"text": text, "finish": "stop"}, "base": {"text": base, "finish": "length"}}
    return {"id": "rows.jsonl:7", "prompt": prompt, **answers}


def test_sample_answers_stand_beside_each_other_and_are_cut() -> None:
    text = card(samples=[sample("Why?", "Because.", "b" * 5000)])
    assert (
        text.index("### rows.jsonl:7") < text.index("Base (did not end):") < text.index("Adapter:\n\n```text\nBecause.")
    )
    assert "b" * 600 + " …" in text and "b" * 601 not in text
    assert "## Sample answers" not in card()


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_answer_breaks_out_of_its_block(prompt: str, answer: str) -> None:
    whole = card(samples=[sample(prompt, f"```\n# owned\n{answer}", answer)])
    block = whole[whole.index("## Sample answers") : whole.index("## Certificate")]
    outside, fence = [], ""
    for line in block.split("\n"):
        if fence:
            fence = "" if re.fullmatch(f"{fence}`*", line.strip()) else fence
        elif opened := re.match(r"(`{3,})text$", line):
            fence = opened[1]
        else:
            outside.append(line)
    assert not fence and "# owned" not in outside
    assert [line for line in outside if line] == [
        "## Sample answers",
        "Greedy answers to held-out prompts, the first of them, not chosen; long texts are cut.",
        "### rows.jsonl:7", "Base (did not end):", "Adapter:",
    ]  # fmt: skip


def test_the_card_of_a_data_set() -> None:
    rows = {"train": {"rows": 900, "columns": ["id", "source", "messages"]}, "eval": {"rows": 100, "columns": ["id"]}}
    steps = [{"step": n, "loss": 1.0} for n in range(9)]
    licences = {"dataset garage-bAInd/Open-Platypus": "cc-by-4.0"}
    given_ = facts(rows=rows, steps=steps, sources=[{"commit": SHA}], licences=licences)
    made = write_card("dataset", "me/rows", given_)
    files = [{"split": "train", "path": "data/train.parquet"}, {"split": "eval", "path": "data/eval.parquet"}]
    assert metadata(made.text) == {
        "task_categories": ["text-generation"],
        "size_categories": ["1K<n<10K"],
        "source_datasets": ["garage-bAInd/Open-Platypus"],
        "tags": ["sft", "curated"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    for words in (f"revision `{SHA}`, licence: cc-by-4.0", "18,159", "| `eval` | `data/eval.parquet` | 100 |"):
        assert words in made.text, words
    assert made.files == {} and "perplexity" not in made.text
    compile(code(made.text), "card", "exec")


def test_the_certificate_speaks_for_itself() -> None:
    assert "The adapter, merged into the base." in card(certificate={**CERTIFICATE, "words": "merged into the base"})


def test_what_was_not_measured_is_said_to_be_missing() -> None:
    text = card("merged", metrics={"evaluate": {}, "filter": {}}, certificate=None)
    for words in ("Not evaluated", "No figures were recorded", "The merge is not certified", "No licence was stated"):
        assert words in text, words
    assert "perplexity_" not in text


@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.parametrize("quantization", [None, {"type": "fp4", "double": False}])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_code_compiles_and_pins_the_base(kind: Kind, quantization: object, template: object) -> None:
    text = card(kind, recipe=recipe(quantization=quantization), template=template)
    source = code(text)
    for block in re.findall(r"```python\n(.*?)\n```", text, re.DOTALL):
        compile(block, "card", "exec")
    assert "load_in_4bit" in text or quantization is None
    assert (SHA in source) == (kind == "adapter")
    assert ("load_in_4bit" in source) == (kind == "adapter" and quantization is not None)
    assert ("eos_token_id=[2, 32000]" in source) == (template is not None)


@pytest.mark.parametrize(("stored", "grows"), [(32000, True), (32064, False)])
def test_an_adapter_with_new_tokens_says_that_the_base_grows(stored: int, grows: bool) -> None:
    tokens = {"add": ["<a>"], "special": False, "known": 32000, "stored": stored, "rows": max(32001, stored)}
    source = code(card(base={**BASE, "tokens": tokens}))
    compile(source, "card", "exec")
    assert ("model.resize_token_embeddings(32001, mean_resizing=False)" in source) == grows
    assert not grows or source.index("resize_token") < source.index("PeftModel.from_pretrained")


def test_a_token_in_the_recipe_is_refused_and_not_repeated() -> None:
    token = "hf_" + "A1b2" * 8
    with pytest.raises(InputError, match="line 2") as error:
        card(recipe_text=f"name: x\n# {token}\n")
    assert token not in str(error.value)
    with pytest.raises(InputError, match="Hugging Face token") as error:
        card(metrics={"train": {"note": token}})
    assert token not in str(error.value)


def test_local_folders_are_shortened(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    text = f"data:\n  - {{source: local, path: {rows}}}\n  - {{source: local, path: ~/secret-project/more.jsonl}}\n"
    sources = [{"source": "local", "path": str(p)} for p in (rows, Path.home() / "secret-project" / "more.jsonl")]
    found = card(recipe=recipe(data=sources), recipe_text=text)
    assert str(tmp_path) not in found and "secret-project" not in found
    assert "…/rows.jsonl" in found and "…/more.jsonl" in found


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_nothing_measured_or_written_breaks_out_of_its_place(name: str, value: str) -> None:
    text = card(metrics={"train": {"x" + name: "x" + value}}, recipe_text=f"name: x\n```\n# owned\n````\n{value}")
    table = text[text.index("## Training") : text.index("## Evaluation")]
    rows = [line for line in table.split("\n") if line.startswith("|")]
    assert len(rows) == 3
    assert len(re.findall(r"(?<!\\)\|", re.sub(r"\\\\", "", rows[2]))) == 3
    assert not re.search(r"(?<!\\)<", re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", rows[2]))  # outside code spans
    quoted = text[text.index("## Recipe") :]
    fence = re.search(r"(`{3,})yaml\n", quoted)
    assert fence and quoted.count(fence[1]) == 2 and quoted.rstrip().endswith(fence[1])


def test_a_benchmark_is_a_line_a_metric() -> None:
    errors = {"base_stderr": 0.01, "adapter_stderr": 0.012}
    scores = {"base": 0.31, "adapter": 0.4, "difference_interval": [0.05, 0.13], **errors}
    tasks = {"hellaswag": {"version": 1, "rows": 100, "shots": 0, "metrics": {"acc": scores}}}
    text = card(metrics={**METRICS, "evaluate": {**METRICS["evaluate"], "tasks": tasks}})
    assert "| `hellaswag, acc` | 0.31 ± 0.01 → 0.4 ± 0.012 on 100 documents; the difference is 0.05 to 0.13 |" in text
    assert "nor any public benchmark" not in text and "nor any public benchmark" in card()
