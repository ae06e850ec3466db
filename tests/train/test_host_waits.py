"""What a micro-batch costs beside TRL's own work: no wait for the device, and no whole logits."""

from __future__ import annotations

import dataclasses

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.recipe import Runtime
from finetune.train import trainer as train_trainer
from finetune.train.recipe_trainer import RecipeTrainer
from tests.helpers.trainings import documents, job, packed

WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero")


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a value, while `counting`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in WAITS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def count(load, base, ctx, tmp_path, monkeypatch):
    from finetune.models import loading

    rows = packed(documents(12), tmp_path)

    def of(name, micro_batches, wrapped):
        waits, model, logits = Waits(), load(), []
        train = RecipeTrainer.train

        def counted(trainer, **arguments):
            if not wrapped:  # TRL's own loop over the same rows
                trainer.callback_handler.callbacks = [
                    c for c in trainer.callback_handler.callbacks if type(c).__module__.startswith("transformers")
                ]
            with waits:
                model.get_output_embeddings().register_forward_hook(lambda *_: logits.append(1))
                train(trainer, **arguments)
            assert not logits  # TRL's chunked loss never calls the head
            raise StopIteration

        monkeypatch.setattr("finetune.train.recipe_trainer.keeps_logits", lambda *_: False)  # as on a GPU
        monkeypatch.setattr(RecipeTrainer, "train", counted)
        own = dataclasses.replace(ctx, runtime=Runtime(save_steps=100, micro_batch_rows=4 // micro_batches))
        with pytest.raises(StopIteration):
            train_trainer.train(job(tmp_path, name, max_steps=1), model, loading.load_tokenizer(base), rows, own)
        return waits.count

    return of


def test_more_micro_batches_cost_our_loop_no_more_waits_than_trls(count):
    ours = [count(f"ours{n}", n, wrapped=True) for n in (1, 2)]
    trls = [count(f"trl{n}", n, wrapped=False) for n in (1, 2)]
    assert trls[1] > trls[0] > 0  # TRL waits for its metrics in each
    assert ours[1] - ours[0] == trls[1] - trls[0]
