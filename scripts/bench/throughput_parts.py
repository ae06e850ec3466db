"""What train_throughput.py measures on and with: random bases in 4 bits, documents, a stopwatch, operations a step."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import random_model
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from finetune.models import attention as varlen
from finetune.recipe import Lora
from finetune.utils.runtime import peak_memory_bytes

LORA = Lora(r=16, alpha=16, dropout=0.0)
DOCUMENTS_A_ROW = 4
SUPERVISED = 0.6  # of a document, at its end


@dataclass(frozen=True)
class Size:
    """A base, the packed rows of one optimiser step, and the tokens of a row."""

    shape: str  # in random_model
    rows: int
    length: int


SIZES = {"tiny": Size("tiny", 4, 128), "small": Size("small", 4, 512), "7b": Size("7b", 8, 2048)}
random_model.SHAPES.setdefault("small", (512, 1408, 6, 8, 4, 8192))


@dataclass(frozen=True)
class Data:
    """The documents of one step: every step sees the same ones, so all ways of laying them out do the same work."""

    documents: list[list[int]]
    supervised: list[int]  # tokens at each one's end

    @property
    def tokens(self) -> int:
        """Of one step, without padding."""
        return sum(map(len, self.documents))

    def labels(self, number: int) -> list[int]:
        """Of one document: -100 where nothing is learned."""
        ids, count = self.documents[number], self.supervised[number]
        return [-100] * (len(ids) - count) + ids[len(ids) - count :]


def documents(size: Size, seed: int = 0, *, changing: bool = False) -> Data:
    """Random documents that fill `size.rows` rows to the last token, four a row, of very different lengths.

    With `changing` each row has its own length, 0.6 of the size's or more.
    """
    generator = np.random.default_rng(seed)
    vocabulary = random_model.SHAPES[size.shape][-1]
    found = []
    for _ in range(size.rows):
        row = int(generator.uniform(0.6, 1) * size.length) if changing else size.length
        shares = generator.dirichlet(np.full(DOCUMENTS_A_ROW, 1.5)) * (row - 8 * DOCUMENTS_A_ROW)
        lengths = 8 + shares.astype(int)
        lengths[-1] += row - lengths.sum()
        found += [generator.integers(3, vocabulary, n).tolist() for n in lengths]
    return Data(found, [max(1, int(SUPERVISED * len(d))) for d in found])


def whole(steps: list[Data]) -> Data:
    """The documents of all steps as one."""
    return Data([d for s in steps for d in s.documents], [n for s in steps for n in s.supervised])


def packed_table(data: Data) -> Any:  # noqa: ANN401 - pyarrow.Table
    """Rows as finetune's pack stage and TRL's packing leave them."""
    import pyarrow as pa

    starts = range(0, len(data.documents), DOCUMENTS_A_ROW)
    groups = [range(s, s + DOCUMENTS_A_ROW) for s in starts]
    return pa.table(
        {
            "input_ids": [[t for i in g for t in data.documents[i]] for g in groups],
            "labels": [[t for i in g for t in data.labels(i)] for g in groups],
            "seq_lengths": [[len(data.documents[i]) for i in g] for g in groups],
        }
    )


def padded_table(data: Data) -> Any:  # noqa: ANN401 - pyarrow.Table
    """A row a document."""
    import pyarrow as pa

    return pa.table({"input_ids": data.documents, "labels": [data.labels(i) for i in range(len(data.documents))]})


def tokenizer() -> Any:  # noqa: ANN401 - PreTrainedTokenizerFast
    """One that has the special tokens a trainer asks for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def base(size: Size, device: str, dtype: torch.dtype, attention: str, *, four_bits: bool = True) -> Any:  # noqa: ANN401
    """A frozen random base on `device`, the same in each `dtype`: made in bf16, linear layers NF4; no file is read."""
    import bitsandbytes
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if attention == varlen.VARLEN:
        varlen.register(attention, varlen.torch_kernel())
    # so that wide ones are no more chaotic than trained ones: at 0.02 a 7B's bf16 gradients are 84 % off its fp32 ones
    settings = random_model.config_of(size.shape)
    settings["initializer_range"] = 0.02 * math.sqrt(512 / max(512, int(str(settings["hidden_size"]))))
    config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    if not four_bits:
        return model.requires_grad_(False).eval()
    model.to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",
            )
            weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            layer.weight = weight.to(device)
            layer.support_avx512bf16_for_cpu = False  # as finetune.models.loading says why
            model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True
    if device == "cuda":
        model.hf_device_map = {"": 0}
    return model.requires_grad_(False).eval()


def save_adapter(model: Any, folder: Path) -> None:  # noqa: ANN401 - PreTrainedModel
    """An adapter whose B matrices are not zero: with zeros A would have no gradient to compare."""
    from peft import get_peft_model

    from finetune.lora import config as lora_config
    from finetune.train import trainer as train_trainer

    torch.manual_seed(1)
    dressed = get_peft_model(model, lora_config.lora_config(LORA, model))
    with torch.no_grad():
        for name, parameter in dressed.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.01)
    train_trainer.save_adapter(dressed, folder, "random", None)


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Notes the moment of every optimiser step in this process, whichever loop runs, and the first step's gradients."""

    device: str
    gradients: bool = True
    started: float = field(default_factory=time.perf_counter)
    moments: list[float] = field(default_factory=list)
    first: dict[int, torch.Tensor] = field(default_factory=dict)  # by place among the trained parameters
    losses: list[float] = field(default_factory=list)  # of every step, where finetune trains

    def __enter__(self) -> Watch:
        """Begin; what is taken at the first step falls into the time of the second, which no figure counts."""
        self._handle = register_optimizer_step_pre_hook(self._step)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())
        if self.gradients and len(self.moments) == 1:
            trained = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
            self.first = {i: p.grad.detach().float().cpu() for i, p in enumerate(trained)}  # type: ignore[union-attr]

    def seconds(self, skip: int) -> list[float]:
        """Of the steps after the first `skip`."""
        return [b - a for a, b in zip(self.moments[skip - 1 :], self.moments[skip:], strict=False)]


def memory(device: str) -> dict[str, int]:
    """Peaks in bytes: the GPU allocator's, or the process's."""
    if device == "cuda":
        return {
            "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
        }
    return {"allocated_peak_bytes": peak_memory_bytes(), "reserved_peak_bytes": peak_memory_bytes()}


def operations(size: Size, data: Data) -> float:
    """Floating-point operations of a step that nothing need do twice: 4 a frozen weight and token (forwards, and the
    gradient of its input), 6 an adapter's weight, the head at supervised positions alone, attention causal in each
    document: 2 products of 2 · T² / 2 · D a head forwards, twice that backwards.
    """
    hidden, _, layers, *_ = random_model.SHAPES[size.shape]
    vocabulary = random_model.SHAPES[size.shape][-1]
    matrices = [s for n, s in random_model.shapes_of(size.shape).items() if n.split(".")[-2] in random_model.LINEARS]
    frozen = sum(math.prod(s) for s in matrices)
    adapter = sum(LORA.r * sum(s) for s in matrices)
    attention = sum(6 * len(d) ** 2 * hidden * layers for d in data.documents)
    return data.tokens * (4 * frozen + 6 * adapter) + 4 * hidden * vocabulary * sum(data.supervised) + attention


def figures(watch: Watch, size: Size, data: Data, skip: int, peak_flops: float | None) -> dict[str, Any]:
    """Of the steps after the first `skip`."""
    seconds = watch.seconds(skip)
    median = statistics.median(seconds)
    flops = operations(size, data) / median
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in watch.first.values()))
    return {
        "steps": len(seconds),
        "tokens_per_second": round(data.tokens / median, 1),
        "supervised_tokens_per_second": round(sum(data.supervised) / median, 1),
        "step_seconds_median": round(median, 4),
        "step_seconds_p95": round(float(np.percentile(seconds, 95)), 4),
        "before_first_step_seconds": round(watch.moments[0] - watch.started - median, 2),
        "teraflops": round(flops / 1e12, 3),
        "mfu": round(flops / peak_flops, 4) if peak_flops else None,
        "grad_norm": norm,
        **memory(watch.device),
    }


def relative_error(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> float:
    """Of all gradients together, against the reference's; infinite where they are not as many or not as large."""
    if found.keys() != expected.keys() or any(found[i].shape != expected[i].shape for i in found):
        return math.inf
    off = sum(float((found[i] - g).double().square().sum()) for i, g in expected.items())
    return math.sqrt(off / sum(float(g.double().square().sum()) for g in expected.values()))
