"""Private names of other libraries: the only module that uses them.

None has a public counterpart in the version named next to it. `tests/utils/test_upstream.py` fails when one is gone, or
when a public name has taken its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from jinja2 import Template
    from peft import LoraConfig
    from transformers import PreTrainedModel, TrainingArguments

Arguments = TypeVar("Arguments", bound="TrainingArguments")


def compile_template(source: str) -> Template:
    """Compile a chat template in transformers' sandbox with its extensions; cached by transformers (5.23)."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(source)


def kept_in_fp32(model: PreTrainedModel) -> list[str]:
    """Return the patterns of module names that the class keeps in fp32 (transformers 5.23)."""
    return list(model._keep_in_fp32_modules or [])


def use_one_gpu(arguments: Arguments) -> Arguments:
    """Make Trainer use one GPU in a process without a launcher (transformers 5.23).

    Trainer otherwise takes every visible GPU through DataParallel, which multiplies the rows of a step and scales the
    loss. The recipe's batch must not depend on the machine; several GPUs are used by one process each.
    """
    _ = arguments.n_gpu  # sets _n_gpu
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def register_lora_layers(config: LoraConfig, layers: Mapping[type[torch.nn.Module], type[torch.nn.Module]]) -> None:
    """Make peft build `layers[type]` for a base layer of that type (peft 0.21; documented, but private by name)."""
    config._register_custom_module(dict(layers))


def check_lora_target(config: LoraConfig, model: torch.nn.Module, name: str) -> None:
    """Raise ValueError if peft refuses to adapt modules of this name in this architecture (peft 0.21; none before)."""
    try:
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check
    except ImportError:
        return
    check(config, model, name)


def prepare_compiling(graphs: int) -> type[Exception]:
    """Limit the graphs of a function to `graphs`, have a backward compiled with its forward, and return the class of
    what compiling raises (torch 2.13; `torch.compiler.config` has the limit only, since 2.12).
    """
    from torch._dynamo import config
    from torch._dynamo.exc import TorchDynamoException
    from torch._functorch import config as backward

    config.recompile_limit = graphs
    backward.force_non_lazy_backward_lowering = True
    return TorchDynamoException


@contextmanager
def no_gguf_bar() -> Iterator[None]:
    """Read GGUF without the bar that transformers always draws (transformers 5.23).

    `load_gguf_checkpoint` calls tqdm itself and does not ask `logging.is_progress_bar_enabled`
    (https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_gguf_pytorch_utils.py).
    """
    from transformers import modeling_gguf_pytorch_utils as reader

    before = reader.tqdm
    reader.tqdm = partial(before, disable=True)
    try:
        yield
    finally:
        reader.tqdm = before


def silence_ray() -> None:
    """Stop Ray's driver from printing hundreds of lines for each lost process, node and full disk (ray 2.60).

    `log_to_driver=False` does not cover them, and there is no other option.
    """
    import ray

    ray._private.worker.print_to_stdstream = lambda *data, **how: None
