"""The modules of a base by name, as far as an adapter's settings are about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.backends.known_layouts import known_layout
from finetune.records import read_json

if TYPE_CHECKING:
    import torch

WITHOUT_WEIGHTS = ("mlp.act_fn",)  # modules of a layer that hold nothing, in every layout known here


@dataclass(frozen=True, slots=True)
class Modules:
    """`linear`: those with a matrix, the head left out; `own`: those with parameters of their own."""

    every: tuple[str, ...]
    linear: tuple[str, ...]
    own: tuple[str, ...]


def read_modules(base: Path, trust_remote_code: bool) -> Modules:
    """Of the base in a folder with config.json; transformers builds it, empty, where its layout is not known."""
    if (known := known_modules(read_json(base / "config.json"))) is not None:
        return known
    from finetune.backends.streamed_forward import empty_model

    return modules_of(empty_model(base, trust_remote_code=trust_remote_code))


def known_modules(config: Mapping[str, Any]) -> Modules | None:
    """From the words of a config.json; None where transformers has to be asked, whose import takes seconds."""
    layout = known_layout(config)
    if layout is None:
        return None
    own = {name.rpartition(".")[0] for name in layout.parameters} | {"lm_head"}
    layers = (f"model.layers.{i}" for i in range(config["num_hidden_layers"]))
    inside = own | {f"{layer}.{name}" for layer in layers for name in WITHOUT_WEIGHTS} | {"model.rotary_emb"}
    holders = {name[:end] for name in inside for end, letter in enumerate(name) if letter == "."}
    return Modules(tuple(sorted({"", *inside, *holders})), tuple(sorted(layout.linears)), tuple(sorted(own)))


def modules_of(model: torch.nn.Module) -> Modules:
    """Of a model that peft has not touched."""
    own = (n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None)
    return Modules(tuple(n for n, _ in model.named_modules()), tuple(linear_names(model)), tuple(own))


def linear_names(model: torch.nn.Module) -> list[str]:
    """Names of the base's linear modules, its head left out; of a model that peft has not touched."""
    from torch import nn

    head = _head(model)
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def _head(model: torch.nn.Module) -> torch.nn.Module | None:
    from transformers import PreTrainedModel

    return cast("PreTrainedModel", model).get_output_embeddings()
