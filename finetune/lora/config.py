"""Apply the recipe's lora section to a base: the modules meant, peft's configuration, and refusals."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from finetune.errors import InputError
from finetune.models.architecture import Modules, linear_names, means_more, read_modules
from finetune.models.layerwise import other_parts
from finetune.recipe import Lora

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel

SAVED = ".modules_to_save."  # in the name of a fully trained parameter


def layer_of(name: str) -> int | None:
    """Return the index of the decoder layer of module `name`: its first number, as in peft."""
    found = re.match(r"(?:.*?\.)?[^.]+\.(\d+)\.", name)
    return int(found[1]) if found else None


def is_target(lora: Lora, name: str, layers: int) -> bool:
    """Return whether the linear module `name` of a base with `layers` decoder layers is adapted; not for the head."""
    if lora.last_layers is not None:
        layer = layer_of(name)
        if layer is None or layer < layers - lora.last_layers:
            return False
    if isinstance(lora.targets, list):
        return any(name == t or name.endswith(f".{t}") for t in lora.targets)
    return lora.targets == "all-linear" or re.fullmatch(lora.targets, name) is not None


def is_saved(lora: Lora, name: str) -> bool:
    """Return whether module `name` is fully trained; peft compares the ends of names, so `norm` means every norm."""
    return any(name.endswith(saved) for saved in lora.modules_to_save)


def rank_of(lora: Lora, name: str) -> int:
    """Return the rank of module `name`: that of the first matching pattern, in the order in which peft saves them."""
    ranks = (r for k, r in sorted(lora.rank_pattern.items()) if re.fullmatch(rf"(.*\.)?({k})", name))
    return next(ranks, lora.r)


def lora_config(lora: Lora, model: torch.nn.Module | None = None) -> LoraConfig:
    """Return peft's configuration of the recipe's adapter. `lora.last_layers` is counted on `model`, the base.

    For a base with parts that are not adapted (a vision tower, fused experts) "all-linear" becomes the names of the
    remaining modules, because peft would adapt the others too.
    """
    from peft import LoraConfig

    targets, layers = lora.targets, None
    beside = other_parts(cast("PreTrainedModel", model)) if model is not None else ()
    if model is not None and targets == "all-linear" and means_more(model):
        targets = _last_words(linear_names(model))
    if lora.last_layers is not None:
        if model is None:
            raise InputError("lora.last_layers: counting the base's layers needs its model, which was not passed")
        names = linear_names(model)
        count = layer_count(names)
        layers = list(range(count - lora.last_layers, count))
        if targets == "all-linear":  # peft does not accept it together with layers
            targets = sorted({n.rpartition(".")[2] for n in names if is_target(lora, n, count)})
    return LoraConfig(
        r=lora.r,
        lora_alpha=cast("int", int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=rf"({'|'.join(map(re.escape, beside))}).*" if beside else None,
        layers_to_transform=layers,
        modules_to_save=sorted(lora.modules_to_save) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        # peft takes the first matching pattern but sorts them when it saves: sort here, so that training agrees
        rank_pattern=dict(sorted(lora.rank_pattern.items())),
        alpha_pattern=dict(sorted(lora.alpha_pattern.items())),
        bias="none",
        task_type="CAUSAL_LM",
    )


def layer_count(names: Iterable[str]) -> int:
    """Return the number of decoder layers that contain the modules `names`."""
    return len({layer for n in names if (layer := layer_of(n)) is not None})


def check_targets(lora: Lora, base: Path, trust_remote_code: bool) -> None:
    """Run `check_modules` on the base in a folder with config.json; no weights are read."""
    check_modules(lora, read_modules(base, trust_remote_code))


def check_modules(lora: Lora, base: Modules) -> None:
    """Refuse a target, pattern or module that matches nothing in the base (peft ignores it silently), or that cannot
    be trained.

    Raises InputError with the nearest name.
    """
    names = base.linear
    if not names:
        raise InputError("lora.targets: the base has no linear module that an adapter can go to")
    last = _last_words(names)
    count = layer_count(names)
    if lora.last_layers is not None and lora.last_layers > count:
        raise InputError(f"lora.last_layers: {lora.last_layers} are more than the {count} layers of the base")
    _check_names(lora, base, count)
    if not any(is_target(lora, n, count) for n in names):
        raise InputError(f"lora.targets: the expression {lora.targets!r} matches no linear module, such as {names[0]}")
    _check_expression(lora, base)
    for field, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            if not any(re.fullmatch(rf"(.*\.)?({pattern})", n) for n in names):
                raise InputError(f"lora.{field}: {pattern!r} matches no linear module (there is {', '.join(last)})")
    _check_saved(lora, base)


def _last_words(names: Iterable[str]) -> list[str]:
    return sorted({n.rpartition(".")[2] for n in names})


def _check_names(lora: Lora, base: Modules, layers: int) -> None:
    names = base.linear
    where = "" if lora.last_layers is None else f" in the last {lora.last_layers} of {layers} layers"
    for target in lora.targets if isinstance(lora.targets, list) else []:
        if not any(is_target(lora.model_copy(update={"targets": [target]}), n, layers) for n in names):
            if (word := target.rpartition(".")[2]) in base.refused:
                raise InputError(
                    f"lora.targets: {target}: {base.refused[word]}; allowed: {', '.join(_last_words(names))}"
                )
            near = _near(target, _last_words(names))
            raise InputError(f"lora.targets: no linear module named {target!r}{where}{near}")


def _check_expression(lora: Lora, base: Modules) -> None:
    """Refuse a regular expression that also matches other modules: peft applies it to the full name of any module."""
    if isinstance(lora.targets, str) and lora.targets != "all-linear":
        linear = set(base.linear)
        others = [n for n in base.every if n not in linear and re.fullmatch(lora.targets, n)]
        if others:
            raise InputError(
                f"lora.targets: the expression {lora.targets!r} also matches {others[0]}, which is not a "
                "linear module; narrow it, as in .*mlp\\.(gate|up|down)_proj"
            )


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"{f'; did you mean {near[0]}?' if near else ''} (there is {', '.join(names)})"


def _check_saved(lora: Lora, base: Modules) -> None:
    """Refuse modules_to_save that have no parameters of their own, or are adapted or quantised."""
    linear, own = set(base.linear), set(base.own)
    able = _last_words(own - linear)
    for name in lora.modules_to_save:
        hits = [n for n in base.own if n.endswith(name)]
        if quantized := [n for n in hits if n in linear]:
            raise InputError(
                f"lora.modules_to_save: {quantized[0]} is a linear module, which is quantised and frozen: adapt it "
                f"with lora.targets (allowed here: {', '.join(able)})"
            )
        if not hits or any(n.endswith(name) for n in base.every if n not in own):
            why = f"no module with weights of its own is named {name!r}{_near(name, able)}"
            raise InputError(f"lora.modules_to_save: {why}")


def restore_saved(model: torch.nn.Module) -> None:
    """Restore the base's values of fully trained modules: TRL rounds them to bf16 on a quantised model."""
    import torch
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            own = dict(module.original_module.named_parameters())
            with torch.no_grad():
                for name, parameter in module.modules_to_save["default"].named_parameters():
                    parameter.copy_(own[name])


def saved_parameters(lora: Lora, base: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name → shape of fully trained parameters as peft will name them, computed from the base."""
    from peft.utils import ModulesToSaveWrapper

    found: dict[str, tuple[int, ...]] = {}
    for name, module in base.named_modules():
        original = module.original_module if isinstance(module, ModulesToSaveWrapper) else None
        if original is not None and is_saved(lora, name):
            for leaf, parameter in original.named_parameters():
                found[f"base_model.model.{name}{SAVED}default.{leaf}"] = tuple(parameter.shape)
    return found
