"""The proofs before step 1, and what TRL's trainer does with our rows on a real quantised model."""

import json
import shutil

import pytest
import torch

from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.lora import config as lora_config
from finetune.models import loading
from finetune.recipe import Lora, Quantization, Runtime
from finetune.train import sanity_checks
from finetune.train import trainer as train_trainer
from finetune.train.batch import batch_shape
from finetune.train.checkpoint import last_checkpoint, mark_complete
from tests.helpers.trainings import assert_close, documents, job, loader, packed, trained, unpacked


def test_a_batch_of_four_is_four_of_one_on_unequal_lengths(load, base, ctx, tmp_path):
    from dataclasses import replace

    rows = unpacked(documents())
    outcomes = []
    for micro in (4, 1):
        own = replace(ctx, runtime=Runtime(micro_batch_rows=micro, save_steps=100))
        outcomes.append(trained(job(tmp_path, f"m{micro}"), load(), base, rows, own)[1])
    assert_close(*outcomes)


def test_packed_is_unpacked(load, base, ctx, tmp_path):
    rows = documents()
    everything = len(rows)  # one step over all of it, so that both see the same tokens in the same step
    path = packed(rows, tmp_path)
    import pyarrow.parquet as pq

    bins = pq.read_metadata(path).num_rows
    one, a = trained(job(tmp_path, "a", batch_rows=everything, max_steps=1), load(), base, unpacked(rows), ctx)
    two, b = trained(job(tmp_path, "b", batch_rows=bins, max_steps=1), load(), base, path, ctx)
    assert one.loss == pytest.approx(two.loss, abs=1e-5)
    assert_close(a, b)


@pytest.mark.parametrize("policy", ["every_2", "selective", "full"])
def test_checkpointing_changes_nothing(policy, load, base, ctx, tmp_path):
    from dataclasses import replace

    rows = packed(documents(), tmp_path)
    off, without = trained(job(tmp_path, "off"), load(), base, rows, ctx)
    on, recomputed = trained(replace(job(tmp_path, "on"), checkpointing=policy), load(), base, rows, ctx)
    assert on.loss == off.loss
    assert_close(without, recomputed, 1e-6)


def test_adapters_are_fp32_and_nearly_every_element_moves(load, base, ctx, tmp_path):
    result, weights = trained(job(tmp_path, max_steps=4, learning_rate=2e-5), load(), base, unpacked(documents()), ctx)
    assert {p.dtype for p in weights.values()} == {torch.float32}
    moved = [(p != 0).float().mean() for n, p in weights.items() if "lora_B" in n]
    assert min(moved) > 0.99
    assert result.steps == 4 and result.trainable_parameters == sum(p.numel() for p in weights.values())


def test_trl_still_casts_the_adapters_of_a_quantised_model_to_bf16(load, base, tmp_path):
    """When this fails, recast_adapters can go."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rendered = {"skip_prepare_dataset": True}
    trainer = SFTTrainer(
        model=load(),
        args=SFTConfig(str(tmp_path), dataset_kwargs=rendered, max_length=None, report_to="none", use_cpu=True),
        train_dataset=Dataset(unpacked(documents())),
        processing_class=loading.load_tokenizer(base),
        peft_config=lora_config.lora_config(Lora(r=4)),
    )  # fmt: skip
    assert train_trainer.recast_adapters(trainer.model) > 0
    assert train_trainer.recast_adapters(trainer.model) == 0


def test_a_loss_that_is_no_number_stops_the_run_with_its_step(load, base, ctx, tmp_path):
    model = load()
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(FinetuneError, match="became nan at step 1"):
        trained(job(tmp_path), model, base, unpacked(documents()), ctx)


def test_a_checkpoint_without_its_marker_is_not_resumed_from(tmp_path):
    for number, complete in ((4, True), (8, True), (12, False)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        if complete:
            mark_complete(folder, {})
    assert last_checkpoint(tmp_path, remove_incomplete=False).name == "checkpoint-8"
    assert (tmp_path / "checkpoint-12").exists()
    assert last_checkpoint(tmp_path, remove_incomplete=True).name == "checkpoint-8"
    assert not (tmp_path / "checkpoint-12").exists()


def batch(positions, labels=None, **more):
    ids = torch.arange(10, 10 + len(positions))[None]
    return {
        "input_ids": ids,
        "labels": ids if labels is None else labels,
        "position_ids": torch.tensor([positions]),
        **more,
    }


def test_the_batch_gate_is_silent_on_isolated_documents_and_fires_otherwise():
    sanity_checks.check_batch(batch([0, 1, 2, 0, 1]), [3, 2], packed=True)
    with pytest.raises(GateRefused, match="do not restart"):
        sanity_checks.check_batch(batch([0, 1, 2, 3, 4]), [3, 2], packed=True)
    with pytest.raises(GateRefused, match="dense attention mask"):
        sanity_checks.check_batch(batch([0, 1, 2, 0, 1], attention_mask=torch.ones(1, 5)), [3, 2], packed=True)
    with pytest.raises(GateRefused, match="no supervised token"):
        sanity_checks.check_batch(batch([0, 1, 2, 0, 1], labels=torch.full((1, 5), -100)), [3, 2], packed=True)
    with pytest.raises(GateRefused, match="differ from its tokens"):
        sanity_checks.check_batch(
            batch([0, 1, 2, 0, 1], labels=torch.ones(1, 5, dtype=torch.long)), [3, 2], packed=True
        )


def test_the_adapter_gate_fires_on_bf16_and_on_a_trained_base(load, base):
    from peft import get_peft_model

    model = get_peft_model(load(), lora_config.lora_config(Lora(r=4)))
    train_trainer.recast_adapters(model)
    sanity_checks.prove_adapters(model)
    norm = model.get_base_model().model.norm.weight
    norm.requires_grad_(True)
    with pytest.raises(GateRefused, match="only LoRA parameters"):
        sanity_checks.prove_adapters(model)
    norm.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(GateRefused, match="not fp32"):
        sanity_checks.prove_adapters(model)


@pytest.mark.parametrize(
    "rows, micro, world, packed, expected",
    [
        (16, "auto", 1, True, (1, 16)),
        (16, "auto", 1, False, (4, 4)),
        (6, "auto", 2, False, (3, 1)),
        (8, 2, 4, True, (2, 1)),
    ],
)
def test_the_effective_batch_is_the_recipes_on_any_machine(rows, micro, world, packed, expected):
    assert batch_shape(rows, micro, world, packed) == expected


def test_a_batch_that_cannot_be_shared_says_which_could(tmp_path):
    with pytest.raises(InputError, match="use 1, 2, 3, 6 processes"):
        batch_shape(6, "auto", 4, True)


def test_a_saved_adapter_is_the_same_bytes_and_names_its_base(load, base, tmp_path):
    from peft import get_peft_model

    lora = Lora(r=4, rank_pattern={"q_proj": 8, "layers.0.*": 2}, targets=["v_proj", "q_proj"])
    torch.manual_seed(0)
    model = get_peft_model(load(), lora_config.lora_config(lora))
    for name in ("one", "two"):
        train_trainer.save_adapter(model, tmp_path / name, "owner/base", "a" * 40)
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "a" * 40)
    assert list(config["rank_pattern"]) == list(model.peft_config["default"].rank_pattern)  # peft takes the first match
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_an_fp16_overflow_is_a_skipped_step_and_only_many_in_a_row_a_lost_run(ctx, tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from finetune.train.callbacks import Follower
    from finetune.train.divergence import MOST_OVERFLOWS

    def logged(fp16, times):
        follower = Follower(ctx, tmp_path / "metrics.jsonl", tmp_path, 100, fp16=fp16)
        for _ in range(times):
            logs = {"loss": 1.0, "grad_norm": float("inf"), "num_tokens": 1}
            follower.on_log(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), logs)

    logged(True, MOST_OVERFLOWS)
    with pytest.raises(FinetuneError, match="grad_norm became inf"):
        logged(True, MOST_OVERFLOWS + 1)
    with pytest.raises(FinetuneError, match="grad_norm became inf"):
        logged(False, 1)


@pytest.mark.parametrize(
    "lora, expected",
    [
        ({"targets": ["q_proj", "kk_proj"]}, "no linear module named 'kk_proj'; did you mean k_proj"),
        ({"targets": "nothing.*"}, "matches no linear module"),
        ({"rank_pattern": {"zzz": 4}}, "lora.rank_pattern: 'zzz' matches no linear module"),
    ],
)
def test_a_target_that_names_nothing_is_refused(base, lora, expected):
    with pytest.raises(InputError, match=expected):
        lora_config.check_targets(Lora(**lora), base, False)


def test_targets_that_name_something_pass(base):
    lora_config.check_targets(Lora(), base, False)
    lora_config.check_targets(Lora(targets=["q_proj", "mlp.up_proj"], rank_pattern={"q_proj": 4}), base, False)
    lora_config.check_targets(Lora(targets=r".*\.(q|v)_proj"), base, False)


def conversations(base):
    """240 rows of the small recipe, the answers supervised."""
    from tests.e2e import conftest

    tokenizer, found = loading.load_tokenizer(base), []
    for row in conftest.rows()[:240]:
        prompt, answer = f"[INST] {row['instruction']} [/INST]", f" {row['output']}"
        first, last = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        last = [*last, tokenizer.eos_token_id]
        found.append((first + last, [-100] * len(first) + last))
    return unpacked(found)


def taught(base, folder, rows):
    """The base after learning `rows`, so that an adapter has something to change: a random one learns by chance."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    chance = torch.Generator().manual_seed(0)
    for _ in range(200):
        chosen = [rows[i] for i in torch.randint(len(rows), (16,), generator=chance).tolist()]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in chosen], batch_first=True, padding_value=-100)
        loss = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_loss_on_four_bits_is_that_on_sixteen(base, ctx, tmp_path):
    """What QLoRA claims (arXiv:2305.14314): the adapter makes up for what the 4-bit base lost.

    Both compute in fp32: a CPU without AMX multiplies 4-bit weights in fp32 and 16-bit ones in bf16.
    """
    from dataclasses import replace

    rows, first, ends = conversations(base), {}, {}
    ids = rows["input_ids"].to_pylist()
    load = loader(taught(base, tmp_path / "taught", ids[:120]), ctx, tmp_path)
    rows = rows.slice(120)
    for name, quantization in (("bf16", None), ("nf4", Quantization(double=True))):
        values = job(tmp_path, name, max_steps=100, batch_rows=8, learning_rate=2e-3, schedule="cosine")
        values = replace(values, lora=Lora(r=16, alpha=32, dropout=0))
        model = load(quantization)
        if quantization is None:
            for weight in model.parameters():
                weight.data = weight.data.bfloat16().float()
        trained(values, model, base, rows, ctx)
        losses = [json.loads(line)["loss"] for line in values.metrics_file.read_text().splitlines()]
        ends[name] = sum(losses[-20:]) / 20
        first[name] = losses[0]
        assert ends[name] < 0.6 * losses[0]  # it learned: two models that did not would agree as well
    assert first["nf4"] > 1.01 * first["bf16"]  # what 4 bits lose, 2.8 %
    assert ends["nf4"] == pytest.approx(ends["bf16"], rel=0.02)
