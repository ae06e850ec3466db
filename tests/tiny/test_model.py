"""The built-in base is a real Mistral: it learns, it is the same twice, and everything that loads a base loads it."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.context import Context, StopFlag
from finetune.errors import Stopped
from finetune.models import loading
from finetune.recipe import Model, Quantization, Runtime, Tracking
from finetune.tiny import model as tiny_model
from finetune.tiny.model import TINY, Size
from finetune.utils.files import write_json
from tests.helpers.quantized import quantized_modules

SMALL = Size(
    hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocabulary=512, sequence=64, steps=40, text=0.02
)
SECRET = ("a text that nobody may learn in advance of the evaluation",)


def context(scratch: Path, **other: Any) -> Context:
    return Context(scratch=scratch, runtime=Runtime(), tracking=Tracking(), device="cpu", **other)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("built")
    return out, tiny_model.build(out, 0, SECRET, context(out), SMALL)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_it_learns(built: tuple[Path, dict[str, Any]]) -> None:
    untrained = torch.log(torch.tensor(512.0)).item()
    assert built[1]["held_out_loss"] < untrained - 0.5
    assert built[1]["pretraining_tokens"] == 40 * SMALL.batch * 64


def test_one_seed_gives_the_same_bytes_whatever_the_threads(built: tuple[Path, Any], tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1)
    try:
        tiny_model.build(tmp_path, 0, SECRET, context(tmp_path), SMALL)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path) == contents(built[0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_another_seed_gives_another_model(built: tuple[Path, Any], tmp_path: Path) -> None:
    tiny_model.build(tmp_path, 1, SECRET, context(tmp_path), dataclasses.replace(SMALL, steps=2))
    assert contents(tmp_path)["model.safetensors"] != contents(built[0])["model.safetensors"]


def test_a_signal_stops_it_between_two_steps(tmp_path: Path) -> None:
    flag, steps = StopFlag(), []

    class Bar:
        def advance(self, steps_: int = 1, note: str = "") -> None:
            steps.append(note)
            flag.signal_number = 15 if len(steps) == 3 else 0

        def close(self) -> None:
            steps.append("closed")

    with pytest.raises(Stopped):
        tiny_model.build(tmp_path, 0, SECRET, context(tmp_path, stop=flag, bar=lambda label, total: Bar()), SMALL)
    assert len(steps) == 4
    assert steps[0].startswith("loss ")
    assert steps[-1] == "closed"
    assert threading.active_count() < 50


def test_the_folder_loads_in_four_bits(built: tuple[Path, Any]) -> None:
    write_json(built[0] / "base.json", {"revision": None})
    try:
        model = loading.load_base(
            Model.model_validate("builtin:tiny-mistral"), built[0], context(built[0]), Quantization(), "fp32", "cpu"
        )
    finally:
        (built[0] / "base.json").unlink()
    assert len(quantized_modules(model)) == 7 * SMALL.layers
    config = json.loads((built[0] / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["sliding_window"]) == ("mistral", "bfloat16", None)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert "_name_or_path" not in config


def test_the_tokenizer_is_mistral_like(built: tuple[Path, Any]) -> None:
    tokenizer = loading.load_tokenizer(built[0])
    ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (0, 1, 2, 3)
    text = "naïve: `json.dumps`\n\n\tx_1 → 日本 </s >"
    assert tokenizer(text)["input_ids"][0] == 1
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == 512


def test_the_chat_template_is_that_of_mistral_instruct(built: tuple[Path, Any]) -> None:
    tokenizer = loading.load_tokenizer(built[0])
    chat = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"))]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>[INST] Hi [/INST] Yes?</s>[INST] Bye [/INST]"
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    for answer in ("Yes?", "`x`", "\n\nYes", " two spaces", "1"):
        turns = [chat[0], {"role": "assistant", "content": answer}]
        full = tokenizer.apply_chat_template(turns)["input_ids"]
        assert full[: len(prompt)] == prompt
        assert full[-1] == 2
        assert full.count(1) == 1


def test_what_is_built_for_people_fits_nf4() -> None:
    for inner in (TINY.hidden, TINY.intermediate):
        assert inner % 64 == 0
    assert TINY.kv_heads < TINY.heads
    assert TINY.hidden % TINY.heads == 0


def repetition_gain(model: Any, vocabulary: int) -> float:
    """How much cheaper random tokens are the second time they come in a text (nats a token)."""
    tokens = torch.randint(10, vocabulary, (8, 24), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([tokens, tokens], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (nll[:, :23].mean() - nll[:, 24:].mean()).item()


def test_a_new_model_can_look_up_in_its_context() -> None:
    size = dataclasses.replace(TINY, vocabulary=512)
    assert repetition_gain(tiny_model.new_model(size, 0).eval(), 512) > 3
