"""Apply the recipe's lora section to a base: the modules meant, peft's configuration, and refusals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from finetune.errors import InputError
from finetune.models.architecture import Modules, linear_names, means_more, read_modules
from finetune.models.layerwise import empty_model, other_parts
from finetune.models.new_tokens import NewTokens, read_new_tokens, token_modules
from finetune.recipe import Lora
from finetune.utils.format import did_you_mean

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel

SAVED = ".modules_to_save."  # in the name of a parameter that is trained whole
ROWS = ".token_adapter.trainable_tokens_delta."  # of one whose rows are those of new tokens


def layer_of(name: str) -> int | None:
    """Return the index of the decoder layer of module `name`: its first number, as in peft."""
    match = re.match(r"(?:.*?\.)?[^.]+\.(\d+)\.", name)
    return int(match[1]) if match else None


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


def lora_config(lora: Lora, model: torch.nn.Module | None = None, tokens: NewTokens | None = None) -> LoraConfig:
    """The recipe's adapter in peft's words. `lora.last_layers` is counted on `model`, the base; of its embedding and
    head the rows of the new `tokens` are trained, unless the whole is.

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
        trainable_token_indices=_token_rows(lora, model, tokens),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        # peft takes the first matching pattern but sorts them when it saves: sort here, so that training agrees
        rank_pattern=dict(sorted(lora.rank_pattern.items())),
        alpha_pattern=dict(sorted(lora.alpha_pattern.items())),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _token_rows(lora: Lora, model: torch.nn.Module | None, tokens: NewTokens | None) -> dict[str, list[int]] | None:
    """Module → the rows of it that are trained; None if there are no new tokens, or all is trained whole."""
    if model is None or tokens is None:
        return None
    names = token_modules(cast("PreTrainedModel", model))
    return {name: list(tokens.ids) for name in names if not is_saved(lora, name)} or None


def check_tokens(lora: Lora, model: PreTrainedModel) -> None:
    """Refuse, for a base that new tokens were added to, what would leave their rows untrained. Raises InputError."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return
    names = {id(m): n for n, m in model.named_modules()}
    saved = [is_saved(lora, names[id(m)]) for m in (embedding, head)]
    if len(token_modules(model)) == 1 and saved[0] != saved[1]:
        raise InputError(
            f"lora.modules_to_save: the base's head is its embedding and tokens.add gives both new rows; name both "
            f"({names[id(embedding)].rpartition('.')[2]}, {names[id(head)].rpartition('.')[2]}) or neither"
        )
    if getattr(head, "bias", None) is not None and not saved[1]:
        raise InputError(
            "tokens.add: the base's head has a bias, which peft leaves out if it trains single rows; name "
            f"{names[id(head)].rpartition('.')[2]} in lora.modules_to_save"
        )


def layer_count(names: Iterable[str]) -> int:
    """Return the number of decoder layers that contain the modules `names`."""
    return len({layer for n in names if (layer := layer_of(n)) is not None})


def check_targets(lora: Lora, base: Path, trust_remote_code: bool) -> None:
    """`check_modules` on the base in a folder with config.json, and `check_tokens`; no weights are read."""
    check_modules(lora, read_modules(base, trust_remote_code))
    if read_new_tokens(base) is not None:
        check_tokens(lora, empty_model(base, trust_remote_code=trust_remote_code))


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
    return f"{did_you_mean(name, names)} (there is {', '.join(names)})"


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
    """Give what is trained whole, and the rows of new tokens, the base's own values again: TRL rounds them to bf16 on a
    quantised model.
    """
    import torch
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import TrainableTokensWrapper

    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            setattr(module, "bias", None)  # noqa: B010 - TRL's head reads it, and peft's wrapper has none (0.21.2)
        if isinstance(module, ModulesToSaveWrapper):
            own = dict(module.original_module.named_parameters())
            with torch.no_grad():
                for name, parameter in module.modules_to_save["default"].named_parameters():
                    parameter.copy_(own[name])
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            with torch.no_grad():
                weight = cast("torch.Tensor", module.get_base_layer().weight)
                for name, rows in module.trainable_tokens_delta.items():
                    rows.copy_(weight[module.token_indices[name]])


def saved_parameters(lora: Lora, base: torch.nn.Module, tokens: NewTokens | None = None) -> dict[str, tuple[int, ...]]:
    """Name → shape of what is trained whole and of new tokens' rows, in a model that peft has wrapped, worked out from
    the base's own.
    """
    from peft.utils import ModulesToSaveWrapper

    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in base.named_modules():
        original = module.original_module if isinstance(module, ModulesToSaveWrapper) else None
        if original is not None and is_saved(lora, name):
            for leaf, parameter in original.named_parameters():
                shapes[f"base_model.model.{name}{SAVED}default.{leaf}"] = tuple(parameter.shape)
    if tokens is not None:
        for name, module in token_modules(cast("PreTrainedModel", base)).items():
            if not is_saved(lora, name):
                width = cast("torch.Tensor", module.weight).shape[1]
                shapes[f"base_model.model.{name}{ROWS}default"] = (len(tokens.ids), width)
    return shapes
