"""The certificate: its figures against an ordinary forward, its choice, and its gate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.eval.compare import ENOUGH_TOKENS, choose_rows
from finetune.merge.nf4_round_trip import RoundTrip
from finetune.merge.plan import plan_merge
from finetune.models import loading
from finetune.publish.card_sections import certificate_words
from finetune.recipe import Recipe
from finetune.report.model_sections import certificate_section
from finetune.report.stage_view import StageView
from finetune.stages import certify
from finetune.tokenization.token_rows import TokenRow, read_token_rows
from tests.helpers.merged import merged_tensors
from tests.helpers.tiny_models import save_adapter
from tests.stages.finished import context, finish, random_rows, write_rows

OPEN = {"min_agreement": 0, "max_perplexity_ratio": 10}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": "builtin:tiny-mistral",
            "data": [{"source": "pydoc"}],
            "certify": OPEN,
            "merge": {"dtype": "float32"},
            **sections,
        }
    )


def run(root: Path, inputs: dict[str, Path], name: str = "out", **sections: Any) -> dict[str, Any]:
    spec = certify.spec(recipe(**sections))
    assert spec is not None
    (root / name).mkdir()
    metrics = certify.run(spec, inputs, root / name, context(root))
    certificate = json.loads((root / name / "certificate.json").read_text())
    assert {k: certificate[k] for k in metrics} == metrics
    return certificate


def trained_model(inputs: dict[str, Path]) -> Any:
    spec = recipe()
    base = loading.load_base(spec.model, inputs["base"], context(inputs["base"]), spec.quantization, "fp32", "cpu")
    return loading.attach_adapter(base, inputs["train"] / "adapter")


def merged_model(inputs: dict[str, Path], trip: RoundTrip | None) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(inputs["base"], dtype=torch.float32)
    state = dict(merged_tensors(plan_merge(inputs["base"], inputs["train"] / "adapter", "float32", trip)))
    model.load_state_dict(state, strict=False)
    return model.eval()


def figures(first: Any, second: Any, path: Path) -> dict[str, float]:
    """What a certificate says, from whole forwards of single rows."""
    nll = np.zeros(2)
    kl, same, count = 0.0, 0, 0
    for row in read_token_rows(path):
        with torch.no_grad():
            logits = [m(torch.from_numpy(row.ids)[None].long()).logits[0, :-1].double() for m in (first, second)]
        keep = torch.from_numpy(row.mask[1:])
        labels = torch.from_numpy(row.ids[1:]).long()[keep]
        a, b = (torch.log_softmax(x[keep], -1) for x in logits)
        nll += [float(-x.gather(1, labels[:, None]).sum()) for x in (a, b)]
        kl += float((a.exp() * (a - b)).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        count += len(labels)
    one, two = np.exp(nll / count)
    return {"perplexity_trained": one, "perplexity": two, "mean_kl": kl / count, "agreement": same / count}


def test_the_figures_are_those_of_ordinary_forwards(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    certificate = run(tmp_path, inputs)
    trained = trained_model(inputs)
    for name, trip in (("original", None), ("dequantized", RoundTrip("nf4", True, "float32"))):
        expected = figures(trained, merged_model(inputs, trip), inputs["render"] / "eval.parquet")
        found = {**certificate["candidates"][name], "perplexity_trained": certificate["perplexity_trained"]}
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)
        low, high = found["perplexity_interval"]
        assert low < found["perplexity"] < high
    assert certificate["candidates"]["original"]["mean_kl"] > 1e-3
    assert abs(certificate["candidates"]["dequantized"]["mean_kl"]) < 1e-6
    assert certificate["candidates"]["dequantized"]["agreement"] == 1


def test_the_same_inputs_are_the_same_bytes(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    run(tmp_path, inputs, "first")
    run(tmp_path, inputs, "second")
    assert (tmp_path / "first/certificate.json").read_bytes() == (tmp_path / "second/certificate.json").read_bytes()


def written_by(model: Any, rows: int = 24) -> list[list[int]]:
    """Rows that the model itself would write."""
    texts = [row[:4] for row in random_rows(rows)]
    with torch.no_grad():
        for text in texts:
            for _ in range(20):
                text.append(int(model(torch.tensor([text])).logits[0, -1, 3:].argmax()) + 3)
    return texts


def test_auto_takes_the_original_where_chance_explains_the_difference(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    certificate = run(tmp_path, inputs)
    low, high = certificate["dequantized_minus_original"]["interval"]
    assert low < 0 < high
    assert certificate["base"] == "original"
    assert certificate["perplexity_merged"] == certificate["candidates"]["original"]["perplexity"]


def test_auto_takes_the_dequantized_base_where_it_is_told_from_chance(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    write_rows(inputs["render"] / "eval.parquet", written_by(trained_model(inputs)))
    certificate = run(tmp_path, inputs)
    assert certificate["dequantized_minus_original"]["interval"][1] < 0
    assert certificate["base"] == "dequantized"
    assert certificate["words"].startswith("merged into the dequantized base in float32, it agrees")


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_a_base_that_is_asked_for_is_the_only_candidate(tmp_path: Path, base: str) -> None:
    certificate = run(tmp_path, finish(tmp_path), certify={**OPEN, "base": base})
    assert list(certificate["candidates"]) == [base]
    assert certificate["base"] == base


def test_auto_takes_the_base_that_passes_and_the_gate_refuses_one_that_was_asked_for(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    with pytest.raises(GateRefused, match=r"at least 99\.0%.*publish the adapter instead"):
        run(tmp_path, inputs, certify={**OPEN, "base": "original", "min_agreement": 0.99})
    assert json.loads((tmp_path / "out/certificate.json").read_text())["base"] == "original"  # the figures are kept
    certificate = run(tmp_path, inputs, "again", certify={**OPEN, "min_agreement": 0.99})
    assert certificate["base"] == "dequantized" and certificate["agreement"] == 1
    assert certificate["candidates"]["original"]["agreement"] < 0.99


def test_the_gate_refuses_a_perplexity_that_rose(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    limits = certify.Certify(base="original", min_agreement=0, max_perplexity_ratio=1.05)
    certificate = run(tmp_path, inputs)
    certify._gate(limits, {**certificate, "perplexity_ratio": 1.04})
    with pytest.raises(GateRefused, match="publish the adapter instead"):
        certify._gate(limits, {**certificate, "perplexity_ratio": 1.06, "candidates": {}})


@pytest.mark.parametrize("base", ["auto", "original"])
def test_a_merge_that_4_bits_alone_keep_apart_and_that_is_surely_better_passes(tmp_path: Path, base: str) -> None:
    inputs = finish(tmp_path)
    write_rows(inputs["render"] / "eval.parquet", written_by(merged_model(inputs, None)))
    strict = {"base": base, "min_agreement": 0.995}
    certificate = run(tmp_path, inputs, certify=strict)
    better = certificate["better_than_trained"]
    assert certificate["base"] == "original" and certificate["agreement"] < 0.995
    assert better["interval"][0] < better["nll_per_token"] < better["interval"][1] < 0
    assert better["control_agreement"] == 1
    assert "the same merge into the dequantized base agrees on 100.0%" in certificate["words"]
    loose = run(tmp_path, inputs, "loose", certify={**strict, "min_agreement": 0})
    assert "better_than_trained" not in loose  # nothing to excuse: the certificate is what it was


def test_a_better_merge_is_refused_where_4_bits_do_not_explain_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, plan = finish(tmp_path), certify._merged
    other = tmp_path / "other"
    save_adapter(inputs["base"], other, seed=5, size=0.15)
    wrong = {**inputs, "train": tmp_path / "wrong"}
    (tmp_path / "wrong").mkdir()
    other.rename(tmp_path / "wrong/adapter")
    write_rows(inputs["render"] / "eval.parquet", written_by(merged_model(wrong, None)))

    trips = iter([None, RoundTrip("nf4", True, "float32")])  # the merge, and its control

    def merged_wrongly(model: Any, folder: Path, planned: Any, *rest: Any) -> Any:
        return plan(model, folder, plan_merge(folder, wrong["train"] / "adapter", "float32", next(trips)), *rest)

    monkeypatch.setattr(certify, "_merged", merged_wrongly)
    with pytest.raises(GateRefused, match=r"at least 99\.5%"):
        run(tmp_path, inputs, certify={"base": "original", "min_agreement": 0.995})
    refused = json.loads((tmp_path / "out/certificate.json").read_text())
    assert refused["perplexity_ratio"] < 0.95 and "better_than_trained" not in refused


def test_a_better_merge_on_few_rows_is_refused(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    write_rows(inputs["render"] / "eval.parquet", written_by(merged_model(inputs, None), certify.SURE_ROWS - 1))
    with pytest.raises(GateRefused, match=r"at least 99\.5%"):
        run(tmp_path, inputs, certify={"base": "original", "min_agreement": 0.995})


def test_tied_models_and_other_shapes(tmp_path: Path) -> None:
    inputs = finish(tmp_path, "qwen2", config={"tie_word_embeddings": True}, modules_to_save=["embed_tokens"])
    certificate = run(tmp_path, inputs, merge={"dtype": "float32"})
    assert abs(certificate["candidates"]["dequantized"]["mean_kl"]) < 1e-6


def test_a_base_without_sdpa(tmp_path: Path) -> None:
    inputs = finish(tmp_path, "gemma2", config={"tie_word_embeddings": True})
    assert abs(run(tmp_path, inputs)["candidates"]["original"]["mean_kl"]) < 0.05


def test_16_bit_training_has_one_candidate(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    certificate = run(tmp_path, inputs, quantization=None)
    assert list(certificate["candidates"]) == ["original"]
    assert certificate["agreement"] == 1
    assert certificate["dequantized_minus_original"] is None
    spec = certify.spec(recipe(quantization=None))
    assert spec is not None
    with pytest.raises(InputError, match="quantization is null"):
        certify._candidates(spec.model_copy(update={"certify": certify.Certify(base="dequantized")}), "float32", "cpu")


def test_tokens_bound_the_rows(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    write_rows(inputs["render"] / "eval.parquet", [list(range(3, 43))] * 6)
    certificate = run(tmp_path, inputs, certify={**OPEN, "tokens": 100})
    assert (certificate["rows"], certificate["tokens"]) == (2, 2 * 36)


def rows_of(count: int, prompt: int, answer: int) -> list[TokenRow]:
    """Rows of a prompt and an answer of so many tokens."""
    mask = np.array([0] * prompt + [1] * answer, dtype=bool)
    return [TokenRow(str(i), np.arange(prompt + answer), mask) for i in range(count)]


def compared(rows: list[TokenRow]) -> int:
    return sum(int(r.mask[1:].sum()) for r in rows)


def test_the_budget_that_is_the_default_compares_enough_tokens_where_there_are_so_many() -> None:
    default = certify.Certify().tokens
    short_answers, long_answers = rows_of(200, 300, 60), rows_of(200, 40, 200)
    assert compared(choose_rows(short_answers, default)) >= ENOUGH_TOKENS
    assert sum(len(r.ids) for r in choose_rows(short_answers, default)) <= 4 * default
    assert choose_rows(long_answers, default) == long_answers[:34]  # the budget alone is enough
    mixed = [*rows_of(100, 400, 20), *long_answers]
    chosen = choose_rows(mixed, default)
    assert ENOUGH_TOKENS <= compared(chosen) < ENOUGH_TOKENS + 200
    assert chosen[:19] == mixed[:19]  # those with the longest answers are only added
    assert all(len(r.ids) == 240 for r in chosen[19:])


def test_what_is_read_stays_bounded() -> None:
    hopeless = rows_of(1000, 500, 2)
    assert sum(len(r.ids) for r in choose_rows(hopeless, 8192)) <= 4 * 8192
    assert len(choose_rows(rows_of(1, 5000, 4), 64)) == 1


SENTENCE = "measured on 72 tokens only: 4,096 or more would make its intervals worth reading"


def test_few_tokens_are_said_wherever_the_certificate_speaks(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    write_rows(inputs["render"] / "eval.parquet", [list(range(3, 43))] * 2)
    said: list[str] = []
    (tmp_path / "out").mkdir()
    ctx = dataclasses.replace(context(tmp_path), say=said.append)
    spec = certify.spec(recipe())
    assert spec is not None
    certify.run(spec, inputs, tmp_path / "out", ctx)
    certificate = json.loads((tmp_path / "out/certificate.json").read_text())
    stages = {"certify": StageView("certify", "done", tmp_path / "out", {})}
    for words in (said[-1], certificate["words"], certificate_words(certificate), certificate_section(stages)["words"]):
        assert words.rstrip(".").endswith(SENTENCE)
    with pytest.raises(GateRefused, match="72 tokens only"):
        run(tmp_path, inputs, "refused", certify={**OPEN, "min_agreement": 1, "base": "original"})


def test_enough_tokens_are_worth_no_word(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    rng = np.random.default_rng(0)
    write_rows(inputs["render"] / "eval.parquet", [rng.integers(3, 128, 204).tolist() for _ in range(24)])
    certificate = run(tmp_path, inputs, certify={**OPEN, "base": "original"})
    assert certificate["tokens"] == 24 * 200 and "only" not in certificate["words"]


def test_no_usable_row_is_said(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    write_rows(inputs["render"] / "eval.parquet", [[3, 4, 5, 6]])
    with pytest.raises(FinetuneError, match="every held-out row is truncated"):
        run(tmp_path, inputs)


def test_what_cannot_be_merged_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    path = inputs["train"] / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(InputError, match="'pissa'"):
        run(tmp_path, inputs)
    assert not list((tmp_path / "out").iterdir())


def test_it_is_off_where_nothing_is_merged_or_held_out() -> None:
    for section in ("certify", "merge", "split"):
        assert certify.spec(recipe(**{section: None})) is None
    assert certify.spec(recipe()) is not None
