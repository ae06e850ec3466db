"""The card says what was measured, is valid Hub metadata, leaks nothing, and its code compiles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.recipe import Recipe
from finetune.report.model_card import model_card

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
    "train": {
        "loss": 0.91234567,
        "tokens_per_second": 2413.0,
        "peak_memory_bytes": 13_100_000_000,
        "precision": "bf16",
    },
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


def card(**changes: Any) -> str:
    facts: dict[str, Any] = {
        "kind": "adapter",
        "repo": "me/x",
        "recipe": recipe(),
        "recipe_text": "name: mistral-platypus\n",
        "metrics": METRICS,
        "base": BASE,
        "certificate": CERTIFICATE,
        "template": TEMPLATE,
    }
    return model_card(**{**facts, **changes})


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
    }


def test_metadata_of_a_merged_model() -> None:
    found = metadata(card(kind="merged"))
    assert (found["base_model_relation"], found["library_name"]) == ("finetune", "transformers")
    assert "license" not in found


def test_metadata_reads_back_through_the_client() -> None:
    from huggingface_hub import ModelCard

    assert ModelCard(card()).data["base_model"] == "mistralai/Mistral-7B"


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
    figures = {
        "sources": {"a/b": {"rows": 1000, "refused": 2}},
        "interval": [0.5, 1.25],
        "curve": [1, 2, 3],
        "none": None,
    }
    text = card(metrics={"train": figures})
    assert "| `sources` | a/b rows 1,000, refused 2 |" in text
    assert "| `interval` | 0.5 to 1.25 |" in text
    assert "curve" not in text and "`none`" not in text


def test_the_certificate_speaks_for_itself() -> None:
    assert "The adapter, merged into the base." in card(certificate={**CERTIFICATE, "words": "merged into the base"})


def test_what_was_not_measured_is_said_to_be_missing() -> None:
    text = card(metrics={"evaluate": {}, "filter": {}}, certificate=None, kind="merged")
    for words in ("Not evaluated", "No figures were recorded", "The merge is not certified", "No licence was stated"):
        assert words in text, words
    assert "perplexity_" not in text


@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.parametrize("quantization", [None, {"type": "fp4", "double": False}])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_code_compiles_and_pins_the_base(kind: str, quantization: object, template: object) -> None:
    source = code(card(kind=kind, recipe=recipe(quantization=quantization), template=template))
    compile(source, "card", "exec")
    assert (SHA in source) == (kind == "adapter")
    assert ("load_in_4bit" in source) == (kind == "adapter" and quantization is not None)
    assert ("eos_token_id=[2, 32000]" in source) == (template is not None)


def test_a_token_in_the_recipe_is_refused_and_not_repeated() -> None:
    token = "hf_" + "A1b2" * 8
    with pytest.raises(InputError, match="line 2") as error:
        card(recipe_text=f"name: x\n# {token}\n")
    assert token not in str(error.value)
    with pytest.raises(InputError, match="measured") as error:
        card(metrics={"train": {"note": token}})
    assert token not in str(error.value)


def test_local_folders_are_shortened(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    home = Path.home() / "secret-project" / "more.jsonl"
    text = f"data:\n  - {{source: local, path: {rows}}}\n  - {{source: local, path: ~/secret-project/more.jsonl}}\n"
    sources = [{"source": "local", "path": str(rows)}, {"source": "local", "path": str(home)}]
    found = card(recipe=recipe(data=sources), recipe_text=text)
    assert str(tmp_path) not in found and "secret-project" not in found
    assert "…/rows.jsonl" in found and "…/more.jsonl" in found


@given(st.text(max_size=60), st.text(max_size=60))
def test_nothing_measured_or_written_breaks_out_of_its_place(name: str, value: str) -> None:
    text = card(metrics={"train": {name: "x" + value}}, recipe_text=f"name: x\n```\n# owned\n````\n{value}")
    table = text[text.index("## Training") : text.index("## Evaluation")]
    rows = [line for line in table.split("\n") if line.startswith("|")]
    assert len(rows) == 3
    assert len(re.findall(r"(?<!\\)\|", re.sub(r"\\\\", "", rows[2]))) == 3
    assert not re.search(r"(?<!\\)<", re.sub(r"`.*?`", "", rows[2].split("|", 2)[2]))
    quoted = text[text.index("## Recipe") :]
    fence = re.search(r"(`{3,})yaml\n", quoted)
    assert fence and quoted.count(fence[1]) == 2 and quoted.rstrip().endswith(fence[1])
