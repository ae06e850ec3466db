"""What a model is made of, from its config.json alone: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError
from finetune.models.architecture import known_layout
from finetune.utils.files import read_json

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


def read_skeleton(base: Path, trust_remote_code: bool = False, *, quantized: bool = True) -> Skeleton:
    """The skeleton of the model in `base`; without `quantized` nobody is asked which modules would be (a second less).

    transformers builds the model and is asked, but for the layouts in `known_layouts`: importing it takes seconds.
    Raises InputError when the base is itself quantised, or when transformers renames, fuses or splits its weights on
    load: a name in the file is then no name of the model, and an adapter's tensors cannot be added one by one.
    """
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise InputError(f"{base}: the base is itself quantised; merging needs its 16-bit weights")
    return _known(config) or _asked(base, trust_remote_code, quantized)


def _known(config: Mapping[str, Any]) -> Skeleton | None:
    """From the configuration's own words, where its layout is one of those known here."""
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


def _asked(base: Path, trust_remote_code: bool, quantized: bool) -> Skeleton:
    """From the architecture's own class, built without weights."""
    from torch import nn
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.pytorch_utils import Conv1D

    from finetune.models.layerwise import empty_model

    model = empty_model(base, trust_remote_code=trust_remote_code)
    if get_model_conversion_mapping(model, add_legacy=False):
        raise InputError(
            f"{base}: transformers converts the weights of {model.config.model_type} on load, so an adapter cannot be "
            "merged tensor by tensor; set merge: null and publish the adapter"
        )
    types = ((Conv1D, "conv1d"), (nn.Linear, "linear"), (nn.Embedding, "embedding"))
    modules = list(model.named_modules())  # taken now: asking what would be quantised swaps modules
    input_embedding = next(n for n, m in modules if m is model.get_input_embeddings())
    parameters = frozenset(n for n, _ in model.named_parameters())
    return Skeleton(
        kinds={n: next((kind for cls, kind in types if isinstance(m, cls)), "other") for n, m in modules if n},
        parameters=parameters,
        tied=dict(model.all_tied_weights_keys),
        input_embedding=input_embedding,
        quantized=_quantized(model) if quantized else frozenset(),
    )


def _quantized(model: PreTrainedModel) -> frozenset[str]:
    """Ask transformers itself which modules it would swap: the head, tied and last modules stay as they are."""
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    skip = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
    settings = BitsAndBytesConfig(load_in_4bit=True)
    swapped = replace_with_bnb_linear(model, skip, settings)
    return frozenset(n for n, m in swapped.named_modules() if isinstance(m, Linear4bit))
