"""The adapter of `lora.start_from`, as its files describe it, and its differences from the recipe.

Imports neither torch nor peft, so that `validate` and `plan` can use it; lora/resume.py loads the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.lora.config import is_target, layer_count, layer_of
from finetune.models.architecture import Modules
from finetune.recipe import Lora
from finetune.utils.files import read_json
from finetune.utils.format import clipped
from finetune.utils.limits import reading
from finetune.utils.safetensors_io import read_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
NAMED = r"builtin:[\w-]+|\w[\w.-]*/\w[\w.-]*"  # a base's name that is valid on every machine
MERGE_FIRST = "it cannot be continued here; merge it (`finetune merge`) and train on the merged model"
Problem = tuple[tuple[str, ...], str]
"""The recipe's field and a sentence: the value found, and the fix or why there is none."""

SAME_VALUE: tuple[tuple[str, Any, str], ...] = (  # peft's name and default, the recipe's field
    ("r", 8, "r"),
    ("lora_alpha", 8, "alpha"),
    ("use_rslora", False, "rslora"),
    ("use_dora", False, "dora"),
    ("rank_pattern", {}, "rank_pattern"),
    ("alpha_pattern", {}, "alpha_pattern"),
)
NOT_TRAINED = (  # peft's name, what it trains
    ("lora_bias", "a bias of B"),
    ("trainable_token_indices", "single tokens' embeddings (trainable tokens)"),
    ("target_parameters", "parameters that are not modules"),
    ("layer_replication", "replicated layers"),
)


@dataclass(frozen=True)
class Adapter:
    """An adapter's files. `shapes` are those of the stored tensors by name; None if only the configuration was read."""

    where: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]] | None = None

    @property
    def base(self) -> str | None:
        """Return the base named in the adapter's configuration."""
        named = self.config.get("base_model_name_or_path")
        return named if isinstance(named, str) and named else None

    def adapted(self) -> set[str]:
        """Modules with low-rank factors."""
        keys = (re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_A\.weight", key) for key in self.shapes or {})
        return {match[1] for match in keys if match}

    def whole(self) -> dict[str, tuple[int, ...]]:
        """Fully trained modules and the shape of their weight, without biases."""
        shapes = {}
        for key, shape in (self.shapes or {}).items():
            name = key.removeprefix(PREFIX)
            if name.endswith(".weight") and ".lora_" not in name and ".token_adapter." not in name and shape:
                shapes[name.removesuffix(".weight").removesuffix(".base_layer")] = shape
        return shapes


@dataclass(frozen=True)
class Base:
    """Facts about the recipe's base: its id, and from its configuration the modules and their sizes."""

    id: str
    modules: Modules | None = None
    config: Mapping[str, Any] | None = None
    sizes: Mapping[str, tuple[int, int]] | None = None  # last word of a module's name → (in, out)
    tokens: bool = False  # the recipe adds some: their rows are compared where the adapter is loaded


def read_adapter(folder: Path) -> Adapter:
    """Read the configuration and the header of the weights in a folder written by peft's save_pretrained.

    Raises InputError if one of the two is missing or unreadable; pickled weights are not opened.
    """
    if not (folder / CONFIG).is_file():
        what = f"{folder} holds no {CONFIG}" if folder.is_dir() else f"{folder} is not a folder"
        raise InputError(f"lora.start_from: {what}; allowed: a folder written by peft's save_pretrained")
    try:
        config = read_json(folder / CONFIG)
    except ValueError as error:
        raise InputError(f"lora.start_from: {folder / CONFIG} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"lora.start_from: {folder / CONFIG} must hold a JSON object; copy the adapter again")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        actual = "only adapter_model.bin, a pickle that can run any code; convert it to safetensors" if pickled else ""
        raise InputError(f"lora.start_from: {folder} holds {actual or f'no {WEIGHTS}; copy the adapter again'}")
    try:
        shapes = {name: tuple(ref.shape) for name, ref in read_file(folder / WEIGHTS).items()}
    except InputError as error:
        raise InputError(f"lora.start_from: {error}") from None
    whole = config.get("modules_to_save") or []
    odd = [m for m in whole if not isinstance(m, str)] if isinstance(whole, list) else [whole]
    if odd:
        raise InputError(f"lora.start_from: {folder / CONFIG}: modules_to_save: found {odd[0]!r}; allowed: names")
    return Adapter(folder.name, config, shapes)


def problems(lora: Lora, adapter: Adapter, base: Base, *, importing: bool = False) -> list[Problem]:
    """Return every difference between the recipe and the adapter it continues, each with its field.

    `importing`: nothing is trained (train: null), so only what concerns the base counts.
    """
    kind = adapter.config.get("peft_type")
    if kind != "LORA":
        return [(("lora", "start_from"), f"{adapter.where} is an adapter of type {kind}; only LORA is supported")]
    with reading(f"lora.start_from: {adapter.where}: its {CONFIG} is not one that peft writes"):
        known = None if base.modules is None else base.modules.every if importing else (*base.modules.linear, "lm_head")
        differences = [*_another_base(lora, adapter, base, known), *([] if base.tokens else _vocabulary(adapter, base))]
        if not importing:
            differences += [*_settings(lora, adapter), *_not_trained(adapter, base), *_layers(lora, adapter, base)]
            if not any(field == ("model",) for field, _ in differences):
                differences += _targets(lora, adapter, base)
    return [(field, clipped(words, 1000)) for field, words in differences]


def _another_base(lora: Lora, adapter: Adapter, base: Base, known: Sequence[str] | None) -> Iterator[Problem]:
    """Yield differences of the base. `known`: modules that may be adapted; for a merge they need not be trainable."""
    named = adapter.base
    if (
        named
        and lora.start_base != named
        and all(re.fullmatch(NAMED, n) for n in (named, base.id))
        and named != base.id
    ):
        yield (
            ("model",),
            f"the adapter in {adapter.where} was trained on {named}, the recipe's model is {base.id}; set model: "
            f"{named}, or, if the two are the same model, lora.start_base: {named}",
        )
    if known is not None and (lost := sorted(adapter.adapted() - set(known))):
        there = base.modules is not None and lost[0] in base.modules.every
        why = "which is not a linear module of the base" if there else "which the base does not have"
        words = f"adapts {lost[0]}, {why}"
        yield ("model",), f"the adapter in {adapter.where} {words} ({len(lost)} such); it was trained on {named}"
        return
    for module in sorted(adapter.adapted()):
        size = (base.sizes or {}).get(module.rpartition(".")[2])
        given = [(adapter.shapes or {}).get(f"{PREFIX}{module}.lora_{part}.weight", ()) for part in "AB"]
        if size and all(len(s) == 2 for s in given) and (given[0][1], given[1][0]) != size:
            yield (
                ("model",),
                f"{module} takes {given[0][1]} and gives {given[1][0]} values in the adapter, {size[0]} and {size[1]} "
                f"in the base {base.id}; the adapter was trained on {named}",
            )
            return


def _vocabulary(adapter: Adapter, base: Base) -> Iterator[Problem]:
    size = (base.config or {}).get("vocab_size")
    for module, shape in adapter.whole().items():
        rows, outside = shape[0], len(shape) == 2 and layer_of(module) is None  # an embedding or the head
        if outside and isinstance(size, int) and rows != size:
            yield (
                ("model",),
                f"the adapter holds {module} with {rows} rows, the vocabulary of {base.id} has {size}: tokens were "
                "added in training; set model to a folder whose embeddings have that size, with its tokenizer",
            )


def _settings(lora: Lora, adapter: Adapter) -> Iterator[Problem]:
    for name, default, field in SAME_VALUE:
        theirs, ours = adapter.config.get(name), getattr(lora, field)
        theirs = default if theirs is None else theirs
        if theirs != ours:
            yield (
                ("lora", field),
                f"{name} is {theirs} in the adapter and {ours} here; set lora.{field}: {_yaml(theirs)}",
            )
    whole = {n.rpartition(".")[2] for n in adapter.whole()}
    theirs = sorted({*(adapter.config.get("modules_to_save") or []), *whole} - _covered(adapter, whole))
    if theirs != sorted(lora.modules_to_save):
        yield (
            ("lora", "modules_to_save"),
            f"fully trained modules are {_listed(theirs)} in the adapter and {_listed(sorted(lora.modules_to_save))} "
            f"in the recipe; set lora.modules_to_save: {_yaml(theirs)}",
        )


def _covered(adapter: Adapter, whole: set[str]) -> set[str]:
    """Return stored names covered by a longer or shorter name in modules_to_save (peft compares the ends of names)."""
    named = adapter.config.get("modules_to_save") or []
    return {w for w in whole if w not in named and any(n.endswith(w) or w.endswith(n) for n in named)}


def _not_trained(adapter: Adapter, base: Base) -> Iterator[Problem]:
    bias = adapter.config.get("bias") or "none"
    if bias != "none":
        yield ("lora", "start_from"), f"bias is {bias!r} in the adapter, but biases stay frozen here; {MERGE_FIRST}"
    for name, what in NOT_TRAINED:
        if adapter.config.get(name) and not (base.tokens and name == "trainable_token_indices"):
            yield ("lora", "start_from"), f"{name} is set in the adapter: it trains {what}; {MERGE_FIRST}"
    if any(key.startswith(f"{PREFIX}lm_head.lora_") for key in adapter.shapes or {}):
        yield ("lora", "start_from"), f"the adapter has LoRA on lm_head, which TRL cannot train; {MERGE_FIRST}"
    if any(".lora_embedding_" in key for key in adapter.shapes or {}):
        yield ("lora", "start_from"), f"the adapter has LoRA on embeddings, which are not adapted here; {MERGE_FIRST}"


def _layers(lora: Lora, adapter: Adapter, base: Base) -> Iterator[Problem]:
    theirs = adapter.config.get("layers_to_transform")
    theirs = [theirs] if isinstance(theirs, int) else sorted(theirs or [])
    if not theirs and lora.last_layers is None:
        return
    if base.modules is None:
        if not theirs or lora.last_layers != len(theirs):
            wanted = len(theirs) or None
            yield ("lora", "last_layers"), f"the adapter is on {_layer_words(theirs)}; set it to {_yaml(wanted)}"
        return
    count = layer_count(base.modules.linear)
    ours = list(range(count - (lora.last_layers or count), count)) if lora.last_layers else []
    if theirs == ours:
        return
    if theirs and theirs != list(range(count - len(theirs), count)):
        yield (
            ("lora", "start_from"),
            f"the adapter is on the layers {theirs}, not the last {len(theirs)}; {MERGE_FIRST}",
        )
    else:
        yield (
            ("lora", "last_layers"),
            f"the adapter is on {_layer_words(theirs)}; set it to {_yaml(len(theirs) or None)}",
        )


def _layer_words(layers: Sequence[int]) -> str:
    return f"the last {len(layers)} layers" if layers else "all layers"


def _targets(lora: Lora, adapter: Adapter, base: Base) -> Iterator[Problem]:
    theirs, linear = adapter.adapted() - {"lm_head"}, base.modules.linear if base.modules else None
    if adapter.shapes is None or linear is None:
        named = adapter.config.get("target_modules")
        if isinstance(named, list) and isinstance(lora.targets, list) and sorted(named) != sorted(lora.targets):
            yield (
                ("lora", "targets"),
                f"the adapter is on {_listed(sorted(named))}; set lora.targets: {_yaml(sorted(named))}",
            )
        return
    count = layer_count(linear)
    layers = adapter.config.get(
        "layers_to_transform"
    )  # `_layers` reports that field; here only modules within those layers count
    if isinstance(layers, list) and layers and max(layers) == count - 1:
        lora = lora.model_copy(update={"last_layers": len(layers)})
    elif not layers:
        lora = lora.model_copy(update={"last_layers": None})
    ours = {name for name in linear if is_target(lora, name, count)}
    if ours == theirs:
        return
    words = sorted({name.rpartition(".")[2] for name in theirs})
    short = lora.model_copy(update={"targets": words})
    fits = {name for name in linear if is_target(short, name, count)} == theirs
    wanted = words if fits else sorted(theirs)
    more, fewer = sorted(ours - theirs), sorted(theirs - ours)
    apart = f"{more[0]} is not in the adapter" if more else f"{fewer[0]} is in the adapter and not adapted here"
    yield (
        ("lora", "targets"),
        f"{apart} ({len(more) + len(fewer)} such modules); set lora.targets: {_yaml(wanted)}",
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _yaml(value: object) -> str:
    """Return a value as written in a recipe."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
