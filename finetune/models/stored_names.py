"""How the tensors of a checkpoint become those of the model: renamed, converted, or not used at all.

transformers renames weights on load (`embed_out` → `lm_head`, the prefixes of multimodal wrappers) and converts some
(one tensor an expert → one for all). Its own rules (transformers/conversion_mapping.py) are applied here to names
alone, so that a merge can write every tensor under the name that the base has for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finetune.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

Convert = Callable[[Mapping[str, "torch.Tensor"]], "torch.Tensor"]


@dataclass(frozen=True)
class StoredNames:
    """Where the tensors of a model are in a checkpoint. Names that are the same in both are in no mapping."""

    renamed: Mapping[str, str] = field(default_factory=dict)  # tensor of the model → name in the checkpoint
    made_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensor of the model → several, converted
    unused: tuple[str, ...] = ()  # names in the checkpoint of parts that the model does not have
    _converters: Mapping[str, Convert] = field(default_factory=dict)

    def in_file(self, name: str) -> str:
        """The checkpoint's name of a tensor of the model that is not converted."""
        return self.renamed.get(name, name)

    def convert(self, name: str, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The model's tensor `name`, made of those in the checkpoint as transformers makes it on load."""
        return self._converters[name]({n: load(n) for n in self.made_of[name]})


def stored_names(model: PreTrainedModel, names: Iterable[str]) -> StoredNames:
    """Match the tensors `names` of a checkpoint with those of `model`, which needs no weights.

    Raises InputError if two tensors of the checkpoint become the same one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    own: dict[str, torch.Tensor] = model.state_dict()
    prefix = model.base_model_prefix
    renamed: dict[str, str] = {}
    sources: dict[str, list[tuple[str, str]]] = {}  # tensor of the model → (name in the checkpoint, pattern)
    unused = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:
            target, pattern = rename_source_key(name, [], [], prefix, own)
        if target not in own:
            unused.append(name)
        elif pattern is not None:
            sources.setdefault(target, []).append((name, pattern))
        elif target in renamed:
            raise InputError(f"the weights hold {target} twice, as {renamed[target]} and {name}; keep one of them")
        else:
            renamed[target] = name
    made_of: dict[str, tuple[str, ...]] = {}
    functions: dict[str, Convert] = {}
    for target, parts in sources.items():
        rule = by_pattern[parts[0][1]]
        for result in _results(rule, target, own):
            made_of[result] = tuple(name for name, _ in parts)
            functions[result] = _conversion(rule, model, target, result, tuple(parts))
    return StoredNames(
        renamed={target: name for target, name in renamed.items() if target != name},
        made_of=made_of,
        unused=tuple(unused),
        _converters=functions,
    )


def _results(rule: WeightConverter, target: str, own: Mapping[str, torch.Tensor]) -> list[str]:
    """Every tensor of the model that one conversion makes: a fused one may be split into several."""
    first = next((p for p in rule.target_patterns if p in target), None)
    if first is None:
        return [target]
    names = (target.replace(first, pattern, 1) for pattern in rule.target_patterns)
    return [name for name in dict.fromkeys(names) if name in own]


def _conversion(
    rule: WeightConverter,
    model: PreTrainedModel,
    target: str,
    result: str,
    sources: tuple[tuple[str, str], ...],
) -> Convert:
    def convert(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        own = deepcopy(rule)
        add: Callable[..., None] = own.add_tensor  # annotated for a Future; takes a tensor as well (transformers 5.23)
        for name, pattern in sources:
            add(target, name, pattern, tensors[name])
        made = own.convert(target, model=model, config=model.config)[result]
        tensor: torch.Tensor = made[0] if isinstance(made, list) else made
        return tensor

    return convert


def split_unused(model: nn.Module, unused: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split the checkpoint tensors that `model` does not load: (tensors of other modules, tensors of its own modules).

    The first belong to modules that `model` does not have, such as a draft head (`mtp.*`); a merge copies them
    unchanged. The second are errors: a bias of a module without one, a part of a decoder layer, a layer too many.
    """
    from torch import nn

    modules = dict(model.named_modules())
    lists = {name for name, m in modules.items() if isinstance(m, nn.ModuleList)}
    beside: list[str] = []
    own: list[str] = []
    for name in unused:
        parts = name.split(".")
        depth = max(i for i in range(len(parts)) if ".".join(parts[:i]) in modules)
        holders = {".".join(parts[:i]) for i in range(depth + 1)}
        inside = depth == len(parts) - 1 or bool(holders & lists)
        (own if inside and not TABLES.search(name) else beside).append(name)
    return beside, own


TABLES = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$")
# which older files carry, and every reader computes
