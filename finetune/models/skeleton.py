"""Modules of a model from its config.json alone; no weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError
from finetune.models.architecture import known_layout
from finetune.models.stored_names import StoredNames
from finetune.utils.files import read_json
from finetune.utils.upstream import kept_in_fp32

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A causal model's modules and parameters, by name."""

    kinds: Mapping[str, str]  # module → "linear", "conv1d", "embedding" or "other"
    parameters: frozenset[str]
    quantized: frozenset[str]  # modules whose weight bitsandbytes stores in 4 bits
    tied: Mapping[str, str]  # lm_head.weight → model.embed_tokens.weight, when the configuration ties them
    input_embedding: str  # module
    stored: StoredNames = field(default_factory=StoredNames)
    head: str = "lm_head"  # module


def read_skeleton(
    base: Path, names: Iterable[str], trust_remote_code: bool = False, *, quantized: bool = True
) -> Skeleton:
    """The skeleton of the model in `base`, whose weights hold the tensors `names`.

    transformers builds the model and is asked, but for the layouts in `known_layout`: importing it takes seconds.
    Without `quantized` the quantised modules are not determined (a second less). Raises InputError when the base is
    itself quantised, or when the weights hold what the model should have used.
    """
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise InputError(f"{base}: the base is itself quantised; merging needs its 16-bit weights")
    known = _known(config)
    if known is not None and known.parameters - set(known.tied) == set(names) - set(known.tied):
        return known
    return _asked(base, trust_remote_code, quantized, names)


def _known(config: Mapping[str, Any]) -> Skeleton | None:
    """From the configuration's own words, if its layout is one of those known here."""
    layout = known_layout(config)
    if layout is None:
        return None
    modules = {name.rpartition(".")[0] for name in layout.parameters}
    holders = {name[:end] for name in modules for end, letter in enumerate(name) if letter == "."}
    kinds = dict.fromkeys(sorted(modules | holders), "other") | dict.fromkeys(layout.linears, "linear")
    return Skeleton(
        kinds={**kinds, "lm_head": "linear", layout.embedding: "embedding"},
        parameters=layout.parameters,
        quantized=layout.linears,
        tied={"lm_head.weight": f"{layout.embedding}.weight"} if layout.tied else {},
        input_embedding=layout.embedding,
    )


def _asked(base: Path, trust_remote_code: bool, quantized: bool, names: Iterable[str] | None = None) -> Skeleton:
    """From the architecture's own class, built without weights."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from finetune.models.layerwise import empty_model
    from finetune.models.stored_names import split_unused, stored_names

    model = empty_model(base, trust_remote_code=trust_remote_code)
    stored = StoredNames() if names is None else stored_names(model, names)
    if own := split_unused(model, stored.unused)[1]:
        raise InputError(
            f"{base}: the weights hold {own[0]} ({len(own)} such tensors), for which the model that config.json "
            "describes has no place; the two do not belong together: download both again from one revision"
        )
    types = ((Conv1D, "conv1d"), (nn.Linear, "linear"), (nn.Embedding, "embedding"))
    modules = list(model.named_modules())  # taken now: asking what would be quantised swaps modules
    input_embedding = next(n for n, m in modules if m is model.get_input_embeddings())
    head = next((n for n, m in modules if m is model.get_output_embeddings()), "")
    parameters = frozenset(n for n, _ in model.named_parameters())
    return Skeleton(
        kinds={n: next((kind for cls, kind in types if isinstance(m, cls)), "other") for n, m in modules if n},
        parameters=parameters,
        tied=dict(model.all_tied_weights_keys),
        input_embedding=input_embedding,
        quantized=_quantized(model) if quantized else frozenset(),
        stored=stored,
        head=head,
    )


def _quantized(model: PreTrainedModel) -> frozenset[str]:
    """Ask transformers itself which modules it would swap: the head, tied and last modules stay as they are."""
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    skip = [*get_keys_to_not_convert(model), *kept_in_fp32(model)]
    settings = BitsAndBytesConfig(load_in_4bit=True)
    swapped = replace_with_bnb_linear(model, skip, settings)
    return frozenset(n for n, m in swapped.named_modules() if isinstance(m, Linear4bit))
