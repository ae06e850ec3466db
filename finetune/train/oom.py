"""Out of GPU memory: halve the micro-batch and keep the effective batch."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finetune.context import Context
from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
SMALLER = "FINETUNE_SMALLER_MICRO_BATCH"  # variable with the file through which a process requests it from the launcher


def halving(
    attempt: Callable[[int], T],
    base: PreTrainedModel,
    micro: int,
    per_process: int,
    ctx: Context,
    *,
    checkpointing: bool,
    least: int = 1,
) -> T:
    """Call `attempt(micro)`, and again with half of it each time the device runs out of memory.

    `attempt` resumes from its last complete checkpoint; random generators are restored to their state at its first
    call, and the adapter that it added to `base` is removed. Raises FinetuneError with advice at a micro-batch of
    `least`, and with several processes: the others wait inside the failed step, so all must be restarted; our launcher
    does so with the smaller micro-batch.
    """
    import torch

    from finetune.utils.runtime import RandomState

    start, forward = RandomState.now(), vars(base).get("forward")
    while True:
        try:
            return attempt(micro)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            smaller = max((n for n in range(least, micro // 2 + 1) if per_process % n == 0), default=0)
            words = (
                f"the device ran out of memory with {micro} rows a micro-batch; going on with {smaller} from the last "
                f"complete checkpoint (runtime.micro_batch_rows={smaller} begins with it)"
            )
            if ctx.world > 1 and smaller and SMALLER in os.environ:
                Path(os.environ[SMALLER]).write_text(str(smaller), encoding="utf-8")
                raise FinetuneError(f"train: {words}") from error
            if ctx.world > 1 or not smaller:
                raise FinetuneError(what_to_try(micro, checkpointing=checkpointing)) from error
        finally:
            _forget_embeddings()
        # Outside the handler: a live exception keeps its frames, and with them every tensor, in memory.
        ctx.say(f"train: {words}")
        micro = smaller
        remove_adapters(base)
        vars(base).pop("forward", None)  # TRL's fused head: the next trainer would wrap it again
        if forward is not None:
            vars(base)["forward"] = forward
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        start.restore()


def _forget_embeddings() -> None:
    """Remove references to embeddings that bitsandbytes holds.

    For its 8-bit optimisers transformers registers them in a list of a singleton, to be kept in 32 bits; a fully
    trained
    embedding would stay alive there after training. So would the moments of a paged optimiser, in another list; their
    driver memory is not returned (bitsandbytes has no call for it), but it can move to RAM.
    """
    from bitsandbytes.functional import GlobalPageManager
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().initialize()
    GlobalPageManager.get_instance().initialize()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether the device was out of memory, also if cuBLAS or the driver failed to allocate."""
    import torch

    words = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "CUBLAS_STATUS_ALLOC_FAILED" in words
        or "CUDA error: out of memory" in words
    )


def what_to_try(micro: int, *, checkpointing: bool) -> str:
    """Return the message for a device that is too small, with advice."""
    tries = [f"runtime.micro_batch_rows={max(1, micro // 2)}"] if micro > 1 else []
    tries += [] if checkpointing else ["runtime.checkpointing=full"]
    tries += [
        "a smaller render.max_length_tokens (and pack.length_tokens)", "a smaller lora.r",
        "train.optimizer=paged_adamw_8bit",
    ]  # fmt: skip
    return (
        f"the device ran out of memory with {micro} row{'s' if micro > 1 else ''} a micro-batch; the checkpoints are "
        f"kept. Try, in this order: {', '.join(tries)}"
    )


def remove_adapters(base: PreTrainedModel) -> None:
    """Remove all adapters that peft added to `base` in place, restoring its layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    from finetune.lora.shared_inputs import dissolve

    dissolve(base)
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.original_module)
    vars(base).pop("peft_config", None)
    base.requires_grad_(False)
    base.zero_grad(set_to_none=True)
