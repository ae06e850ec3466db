"""Intervals of the perplexities, and real benchmarks of lm-evaluation-harness on a tiny model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from finetune.context import StopFlag
from finetune.errors import FinetuneError, InputError, Stopped
from finetune.eval import lm_eval
from finetune.models import loading
from finetune.recipe import Judge, LanguageModel, Recipe
from finetune.report.model_sections import _evaluation_figures, metric_rows, moved
from finetune.stages import evaluate
from finetune.tiny import model as tiny_model
from finetune.utils.files import write_json
from tests.helpers.tiny_models import save_adapter, save_tiny
from tests.stages.finished import TERMINATORS, context, write_rows

TASK = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {train: examples.jsonl, test: questions.jsonl}
training_split: train
fewshot_split: train
test_split: test
output_type: multiple_choice
num_fewshot: SHOTS
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 3}
"""
NOUNS = "tree river stone cloud bird house lamp road boat wheel clock garden".split()
COLOURS = "red blue green white".split()


def questions() -> list[dict[str, Any]]:
    return [
        {"question": f"What colour is the {noun}? It is", "choices": COLOURS, "label": i % len(COLOURS)}
        for i, noun in enumerate(NOUNS)
    ]


def write_task(folder: Path, shots: int = 0) -> Path:
    folder.mkdir()
    (folder / "colours.yaml").write_text(TASK.replace("SHOTS", str(shots)))
    lines = [json.dumps(q) + "\n" for q in questions()]
    (folder / "questions.jsonl").write_text("".join(lines))
    (folder / "examples.jsonl").write_text("".join(lines[::-1]))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What evaluate reads: a random base with a real tokenizer, an adapter of random weights, 12 rendered rows."""
    root = tmp_path_factory.mktemp("evaluate")
    tokenizer = tiny_model.train_tokenizer([f"{q['question']} {c}" for q in questions() for c in COLOURS], 320)
    base = save_tiny(root / "base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    about = {"id": "builtin:tiny-mistral", "kind": "builtin", "revision": None, "dtype": "float32", "parameters": 9}
    write_json(base / "base.json", about)
    save_adapter(base, root / "train" / "adapter", size=0.2)
    rng = np.random.default_rng(0)
    (root / "render" / "template").mkdir(parents=True)
    rows = [rng.integers(3, len(tokenizer), rng.integers(8, 30)).tolist() for _ in range(12)]
    write_rows(root / "render" / "eval.parquet", rows)
    write_json(root / "render" / "template" / "template.json", {"terminators": TERMINATORS, "pad_token": "<unk>"})
    return {"base": base, "render": root / "render", "train": root / "train"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def spec_of(**settings: Any) -> evaluate.Spec:
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "model": "builtin:tiny-mistral",
            "data": [{"source": "pydoc"}],
            "train": {"precision": "fp32"},
            "evaluate": {"generations": 1, **settings},
        }
    )
    spec = evaluate.spec(recipe)
    assert spec is not None
    return spec


def run(inputs: dict[str, Path], out: Path, said: list[str] | None = None, **settings: Any) -> dict[str, Any]:
    out.mkdir()
    ctx = context(out.parent)
    if said is not None:
        ctx = dataclasses.replace(ctx, say=said.append)
    metrics = evaluate.run(spec_of(**settings), inputs, out, ctx)
    assert json.loads((out / "eval.json").read_text()) == metrics
    return metrics


def test_perplexities_and_their_ratio_have_intervals(inputs: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    found = run(inputs, tmp_path / "one", said)
    for name in ("perplexity_base", "perplexity_adapter", "perplexity_ratio"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high
    assert found["perplexity_ratio"] == pytest.approx(found["perplexity_adapter"] / found["perplexity_base"])
    assert "tasks" not in found and "tasks_harness" not in found
    low, high = found["perplexity_ratio_interval"]
    assert any("does not distinguish base and adapter" in line for line in said) == (low <= 1 <= high)
    run(inputs, tmp_path / "two")
    for name in ("eval.json", "samples.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_adapter_that_changes_nothing_is_not_told_from_its_base(inputs: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(inputs["base"], tmp_path / "train" / "adapter", size=0.0)
    said: list[str] = []
    found = run({**inputs, "train": tmp_path / "train"}, tmp_path / "out", said)
    assert found["perplexity_ratio_interval"] == [1, 1]
    assert any("does not distinguish base and adapter (ratio 1 to 1" in line for line in said)


def test_one_row_has_no_interval(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = run(inputs, tmp_path / "out", max_rows=1)
    assert found["perplexity_base_interval"] is found["perplexity_ratio_interval"] is None
    assert found["perplexity_base"] > 1


def likeliest(model: Any, tokenizer: Any, question: str, choices: list[str]) -> int:
    """The choice with the largest summed log-likelihood, from one plain forward each."""
    sums = []
    for choice in choices:
        before = tokenizer(question)["input_ids"]
        ids = torch.tensor([tokenizer(f"{question} {choice}")["input_ids"]])
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
        own = scores.gather(1, ids[0, 1:, None])[len(before) - 1 :]
        sums.append(float(own.sum()))
    return int(np.argmax(sums))


def test_a_task_of_ones_own_scores_base_and_adapter(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks")
    settings = {"tasks": ["colours"], "task_folder": str(folder), "batch_tokens": 2048}
    found = run(inputs, tmp_path / "one", **settings)
    assert found["tasks_harness"] == lm_eval.version()
    task = found["tasks"]["colours"]
    assert (task["version"], task["rows"], task["shots"]) == ("3", len(NOUNS), 0)
    spec, tokenizer = spec_of(), loading.load_tokenizer(inputs["base"])
    base = loading.load_base(spec.model, inputs["base"], context(tmp_path), spec.quantization, "fp32", "cpu")
    model = loading.attach_adapter(base, inputs["train"] / "adapter")

    def share() -> float:
        hits = [likeliest(model, tokenizer, q["question"], q["choices"]) == q["label"] for q in questions()]
        return sum(hits) / len(hits)

    figures = task["metrics"]["acc"]
    assert figures["adapter"] == pytest.approx(share(), abs=1e-5)
    with model.disable_adapter():
        assert figures["base"] == pytest.approx(share(), abs=1e-5)
    stopped = dataclasses.replace(context(tmp_path), stop=StopFlag(signal_number=15))
    with pytest.raises(Stopped):  # between two batches
        lm_eval.score(model, tokenizer, lm_eval.load(["colours"], folder, 0), None, 2048, 0, stopped)
    assert figures["higher_is_better"] is True and figures["adapter_stderr"] > 0
    low, high = figures["difference_interval"]
    assert low <= figures["adapter"] - figures["base"] <= high
    told = dict(_evaluation_figures(found))  # in the report
    assert " → " in told["colours, acc"] and "on 12 documents" in told["colours, acc"]
    run(inputs, tmp_path / "two", **settings)
    assert (tmp_path / "one" / "eval.json").read_bytes() == (tmp_path / "two" / "eval.json").read_bytes()


def test_shots_and_a_limit(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Under the same seed both models see the same examples: an adapter that changes nothing scores like its base."""
    folder = write_task(tmp_path / "tasks", shots=2)
    save_adapter(inputs["base"], tmp_path / "train" / "adapter", size=0.0)
    same = {**inputs, "train": tmp_path / "train"}
    task = run(same, tmp_path / "out", tasks=["colours"], task_folder=str(folder), tasks_limit=8)["tasks"]["colours"]
    assert (task["rows"], task["shots"]) == (8, 2)
    figures = task["metrics"]["acc"]
    assert figures["adapter"] == figures["base"] and figures["difference_interval"] == [0, 0]


def test_what_is_not_there_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_task(tmp_path / "tasks")
    lm_eval.check(["colours"], folder)  # silent
    (folder / "questions.jsonl").unlink()
    with pytest.raises(FinetuneError, match=r"evaluate\.tasks: colours cannot be loaded"):
        lm_eval.load(["colours"], folder, 0)
    monkeypatch.setattr(lm_eval, "PACKAGE", "no_such_package")
    for ask in (lambda: lm_eval.check(["colours"], folder), lambda: lm_eval.load(["colours"], folder, 0)):
        with pytest.raises(InputError, match=r"lm-evaluation-harness is not installed \(pip install lm-eval"):
            ask()


@pytest.mark.slow
def test_an_unknown_task_names_its_neighbours(tmp_path: Path) -> None:
    """Slow: the harness reads its own 14,000 task files."""
    with pytest.raises(InputError, match=r"has no task 'colour'; similar: .*colours.*task_folder has colours"):
        lm_eval.check(["colour"], write_task(tmp_path / "tasks"))


def test_the_key_follows_the_task_files(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks")
    spec = spec_of(tasks=["colours"], task_folder=str(folder))
    assert str(folder) not in spec.model_dump_json()
    first = evaluate.fingerprint(spec)
    assert sorted(first["task_files"]) == ["colours.yaml", "examples.jsonl", "questions.jsonl"]
    (folder / "questions.jsonl").write_text("")
    assert evaluate.fingerprint(spec) != first
    assert evaluate.fingerprint(spec_of()) == {}
    with pytest.raises(InputError, match="is not a folder"):
        evaluate.fingerprint(spec_of(tasks=["colours"], task_folder=str(tmp_path / "gone")))


@pytest.mark.parametrize("tasks", [["a b"], ["a,b"], [""], ["arc_easy", "arc_easy"]], ids=repr)
def test_names_that_cannot_be_tasks_are_refused(tasks: list[str]) -> None:
    with pytest.raises(ValueError, match="tasks"):
        spec_of(tasks=tasks)


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, None),
        ({"stop_rate": 0.0}, "NO ANSWER ENDED BY ITSELF (0 of 4,"),
        ({"nll_difference_interval": [-0.1, 0.2]}, "may have learned their style only"),
        ({"nll_difference_interval": None}, "no other prompt to be compared with"),
        ({"perplexity_ratio_interval": [0.9, 1.1]}, "does not distinguish base and adapter"),
        ({"stop_rate": None}, None),
    ],
)
def test_what_the_figures_do_not_show_is_said_and_nothing_else(figures: dict[str, Any], words: str | None) -> None:
    said: list[str] = []
    good = {"stop_rate": 0.5, "nll_difference_interval": [0.1, 0.2], "perplexity_ratio_interval": [0.4, 0.6]}
    evaluate._warn({**good, "generations": 4, **figures}, dataclasses.replace(context(Path()), say=said.append))
    assert len(said) == (words is not None) and (words or "") in "".join(said)


def test_answers_are_measured_base_beside_adapter(inputs: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    found = run(inputs, tmp_path / "out", said, generations=6, metrics=["f1", "bleu", "json_valid"])
    assert set(found["metrics"]) == {"f1", "bleu", "json_valid"}
    assert found["metrics"]["f1"]["rows"] == 6 and found["metrics"]["json_valid"]["rows"] == 0
    assert any(line.startswith("evaluate: f1 ") for line in said)
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    base = np.mean([line["scores"]["f1"][0] for line in lines])
    assert found["metrics"]["f1"]["base"] == pytest.approx(base)
    assert metric_rows(found)[0][0] == "f1"
    shown = {sample["id"] for _, samples in moved(lines) for sample in samples}
    assert shown <= {line["id"] for line in lines}


def test_a_missing_package_stops_it_before_a_model_is_loaded(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rouge_score" else find(name))
    monkeypatch.setattr(loading, "load_base", None)
    with pytest.raises(InputError, match="rouge_l needs rouge-score"):
        run(inputs, tmp_path / "out", metrics=["rouge_l"])


def test_a_judge_compares_base_and_adapter_in_both_orders(inputs: dict[str, Path], tmp_path: Path) -> None:
    from tests.helpers.chat_server import chat_server

    def second_is_better(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        return f"Verdict: {2 if len(text.split('[Answer 2]')[1]) % 2 else 1}"

    with chat_server(second_is_better) as server:
        model = {"endpoint": server.url, "name": "m", "concurrency": 3}
        judge = {"model": model, "rows": 10}
        raw = {"name": "a", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}]}
        asked = Recipe.model_validate({**raw, "evaluate": {"generations": 4, "judge": judge}})
        spec = evaluate.spec(asked)
        assert spec is not None and spec.evaluate.judge is not None and spec.judge is not None
        assert (spec.evaluate.judge.model.concurrency, spec.judge.model.concurrency) == (8, 3)
        out = tmp_path / "out"
        out.mkdir()
        result = evaluate.run(spec, inputs, out, context(tmp_path))
        lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        equal = sum(line["base"]["text"].strip() == line["adapter"]["text"].strip() for line in lines)
        assert len(server.requests) == 2 * (10 - equal) and len(lines) == 10 == result["generations"]
        judged: Any = result["judge"]
        assert judged["model"] == "m" and judged["wins"] + judged["ties"] + judged["losses"] == judged["rows"] == 10
        assert judged["win_rate"] == pytest.approx(np.mean([sum(line["judge"]) / 2 for line in lines]))
        assert any("judge m: the adapter wins" in value for _, value in _evaluation_figures(result))
        evaluate.run(spec, inputs, out, context(tmp_path))
        assert len(server.requests) == 2 * (10 - equal)  # verdicts are kept


def test_a_judge_that_fails_costs_no_measurement(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.chat_server import chat_server

    monkeypatch.setattr("finetune.synth.asking.RETRIES", 0)
    raw = {"name": "a", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}]}
    outs = [tmp_path / name / "key" for name in ("whole", "first", "second")]
    for out in outs:
        out.mkdir(parents=True)
    with chat_server(lambda body: "Verdict: 1") as server:
        judge = {"model": {"endpoint": server.url, "name": "m"}, "rows": 4}
        spec = evaluate.spec(Recipe.model_validate({**raw, "evaluate": {"generations": 6, "judge": judge}}))
        assert spec is not None
        evaluate.run(spec, inputs, outs[0], context(tmp_path / "a"))
        assert not list((tmp_path / "a").glob("evaluate-*"))
        server.faults = [500] * 99
        with pytest.raises(FinetuneError, match="failed"):
            evaluate.run(spec, inputs, outs[1], context(tmp_path / "b"))
        server.faults = []
        monkeypatch.setattr(loading, "load_base", None)
        evaluate.run(spec, inputs, outs[2], context(tmp_path / "b"))
    for name in ("eval.json", "samples.jsonl"):
        assert (outs[0] / name).read_bytes() == (outs[2] / name).read_bytes()
    with pytest.raises(FinetuneError, match="cannot be reached"):  # before a model is loaded
        evaluate.run(spec, inputs, outs[1], context(tmp_path / "c"))
    local = tmp_path / "judge"
    local.mkdir()
    (local / "config.json").write_text("{}")
    model = LanguageModel(local=str(local))
    spec = spec.model_copy(update={"judge": Judge(model=model)})
    with pytest.raises(InputError, match="safetensors"):
        evaluate.run(spec, inputs, outs[1], context(tmp_path / "c"))
    tiny_model.train_tokenizer(["a b c"] * 5, 300).save_pretrained(local)
    save_tiny(local, vocab_size=300)
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (local / file).unlink(missing_ok=True)
    with pytest.raises(InputError, match="has no chat template"):
        evaluate.run(spec, inputs, outs[1], context(tmp_path / "c"))


def test_without_a_judge_samples_and_key_are_what_they_were(inputs: dict[str, Path], tmp_path: Path) -> None:
    raw = {"name": "a", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}], "evaluate": {"generations": 2}}
    spec = evaluate.spec(Recipe.model_validate(raw))
    assert spec is not None and evaluate.fingerprint(spec) == {}
    evaluate.run(spec, inputs, tmp_path, context(tmp_path))
    line = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert set(line) == {"id", "prompt", "reference", "adapter", "base"}
