"""What an attempt leaves behind when the device was full: nothing of it is alive when the next one begins."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import Trainer

from finetune.recipe import Lora, Runtime
from finetune.train import arguments, recipe_trainer
from finetune.train import trainer as train_trainer
from tests.helpers.trainings import documents, job, trained, unpacked
from tests.train.test_divergence import full

OPTIMIZERS = [
    "adamw_8bit",
    *(pytest.param(n, marks=pytest.mark.slow) for n in arguments.OPTIMIZERS if n != "adamw_8bit"),
]


@pytest.fixture(autouse=True)
def whole_batches(monkeypatch):
    """As on a GPU, the device that these tests fill."""
    monkeypatch.setattr(recipe_trainer, "in_pieces", lambda _: False)


@pytest.fixture
def first(monkeypatch):
    """Weak references to what the first attempt of a training made: trainer, optimizer and its states, parameters."""
    found, step = {}, Trainer.training_step

    def note(trainer, model, *rest):
        found.setdefault("trainer", weakref.ref(trainer))
        if found["trainer"]() is trainer:
            found["optimizer"] = weakref.ref(trainer.optimizer.optimizer)
            found.update({n: weakref.ref(p) for n, p in model.named_parameters() if p.requires_grad})
            states = (s.items() for s in trainer.optimizer.state.values())
            tensors = [v for state in states for _, v in state if isinstance(v, torch.Tensor)]
            found.update({f"state {i}": weakref.ref(tensor) for i, tensor in enumerate(tensors)})
        return step(trainer, model, *rest)

    monkeypatch.setattr(Trainer, "training_step", note)
    return found


def alive(references):
    return [name for name, reference in references.items() if reference() is not None]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_of_an_attempt_is_alive_when_the_next_begins(optimizer, first, load, base, ctx, tmp_path, monkeypatch):
    left, attempt = [], train_trainer.run

    def counted(*given):
        left.append(alive(first))
        return attempt(*given)

    monkeypatch.setattr(train_trainer, "run", counted)
    lora = Lora(r=4, modules_to_save=["embed_tokens", "lm_head"])
    values = replace(job(tmp_path, max_steps=3, optimizer=optimizer), lora=lora)
    own = replace(ctx, runtime=Runtime(micro_batch_rows=4, save_steps=1))
    result, _ = trained(values, full(load(), 2, after=12), base, unpacked(documents()), own)
    assert (result.micro_batch_rows, result.steps) == (2, 3) and result.resumed_from >= 1
    assert "state 0" in first and any("embed_tokens" in name for name in first)
    assert left == [[], []]
    del result
    gc.collect()
    from bitsandbytes.optim import GlobalOptimManager

    assert not GlobalOptimManager.get_instance().module_weight_config_triple
