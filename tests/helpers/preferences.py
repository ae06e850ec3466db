"""Hand-made outputs of stage pairs, start adapters, and alignments of seconds on a tiny quantised model."""

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from finetune.models import loading
from finetune.preference import align as preference_align
from finetune.preference.reference import Objective
from finetune.recipe import Lora, Train
from finetune.train.arguments import Job
from finetune.train.trainer import save_adapter
from tests.helpers import tiny_models

INTS, MASK = pa.list_(pa.int32()), pa.list_(pa.int8())
PAIRS = pa.schema(
    [("pair_id", pa.string()), ("source", pa.string()), ("prompt_ids", INTS), ("chosen_ids", INTS),
     ("rejected_ids", INTS), ("chosen_mask", MASK), ("rejected_mask", MASK)]
)  # fmt: skip
JUDGED = pa.schema(
    [("pair_id", pa.string()), ("source", pa.string()), ("prompt_ids", INTS), ("completion_ids", INTS),
     ("completion_mask", MASK), ("label", pa.bool_())]
)  # fmt: skip


def pair_rows(count=12, seed=0):
    """Pairs of unequal lengths whose masks have a hole: chosen answers have low ids, rejected ones high ids."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high, least, most):
        n = int(torch.randint(least, most, (), generator=generator))
        return torch.randint(low, high, (n,), generator=generator).tolist()

    found = []
    for i in range(count):
        row = {"pair_id": f"p{i}", "source": f"kind{i % 2}", "prompt_ids": ids(5, 300, 4, 12)}
        for side, (low, high) in (("chosen", (5, 150)), ("rejected", (150, 300))):
            row[f"{side}_ids"] = ids(low, high, 4, 10)
            row[f"{side}_mask"] = [1, 0, *[1] * (len(row[f"{side}_ids"]) - 2)]
        found.append(row)
    return found


def judged_rows(count=12, seed=0):
    """The same pairs, taken apart."""
    found = []
    for row in pair_rows(-(-count // 2), seed):
        for side in ("chosen", "rejected"):
            own = {k: row[k] for k in ("source", "prompt_ids")}
            found.append(
                {**own, "pair_id": f"{row['pair_id']}-{side}", "completion_ids": row[f"{side}_ids"],
                 "completion_mask": row[f"{side}_mask"], "label": side == "chosen"}
            )  # fmt: skip
    return found[:count]


def write_pairs(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, PAIRS if "chosen_ids" in rows[0] else JUDGED), path)
    return path


def start_adapter(base, folder, seed=1, size=0.05, **lora):
    """An adapter on `base` (which is changed) with every element moved; written as stage train writes it."""
    model = tiny_models.adapted(base, folder, seed, size, **{"r": 4, "lora_alpha": 8, **lora})
    save_adapter(model, folder, "owner/base", None)
    return folder


def job(tmp_path, name="run", **train):
    settings = {"learning_rate": 1e-3, "batch_rows": 4, "max_steps": 3, "warmup_fraction": 0, "optimizer": "adamw"}
    (tmp_path / name).mkdir(exist_ok=True)
    return Job(
        seed=0, lora=Lora(r=4, dropout=0), train=Train(**{**settings, **train}), precision="fp32", device="cpu",
        checkpointing="none", checkpoints=tmp_path / name / "checkpoints",
        metrics_file=tmp_path / name / "metrics.jsonl", stage="align",
    )  # fmt: skip


DPO, KTO = (Objective(method=method, loss=loss, beta=0.1) for method, loss in (("dpo", "sigmoid"), ("kto", "kto")))


def aligned(job, model, base, pairs, adapter, ctx, objective=DPO):
    """The result, and the trained weights by name."""
    tokenizer = loading.load_tokenizer(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    result = preference_align.align(job, objective, model, tokenizer, pairs, adapter, ctx)
    return result, {n: p.detach().clone() for n, p in result.model.named_parameters() if p.requires_grad}
