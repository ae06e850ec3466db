"""Continue training from an earlier adapter: find it, compare it with the recipe, load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.context import Context
from finetune.errors import InputError
from finetune.lora.start import CONFIG, WEIGHTS, Base, problems, read_adapter
from finetune.models.architecture import read_modules
from finetune.models.new_tokens import read_new_tokens
from finetune.recipe import Lora
from finetune.utils.files import file_digest, read_json
from finetune.utils.format import clipped
from finetune.utils.limits import reading
from finetune.utils.links import require_model

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

COMPARED = (
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "modules_to_save", "bias", "fan_in_fan_out", "layer_replication", "trainable_token_indices", "target_parameters",
)  # fmt: skip


def fingerprint(lora: Lora) -> Mapping[str, object]:
    """Return the adapter's part of a stage's key: the digests of a folder's files, or the commit on the Hub."""
    if lora.start_from is None:
        return {}
    if lora.start_folder is not None:
        return {"start_from": {name: file_digest(_file(lora.start_folder, name)) for name in (CONFIG, WEIGHTS)}}
    if lora.start_run is not None:
        raise InputError(f"lora.start_from: {lora.start_from}: its run was not resolved; this is a bug in finetune")
    from finetune.hub.client import resolve_revision

    name, _, revision = lora.start_from.partition("@")
    return {"start_from": resolve_revision(name, revision or None)}


def folder_of(lora: Lora, ctx: Context) -> Path | None:
    """Return the folder of the adapter, downloaded if necessary; None if the recipe names none."""
    if lora.start_from is None or lora.start_folder is not None:
        return lora.start_folder
    from huggingface_hub import HfApi, constants, snapshot_download

    from finetune.hub.client import resolve_revision, tree_of
    from finetune.hub.errors import sentences
    from finetune.hub.verified import is_recorded, require_announced
    from finetune.models.loading import TOKENIZER_FILES

    name, _, revision = lora.start_from.partition("@")
    commit = resolve_revision(name, revision or None, scratch=ctx.scratch, say=ctx.say)
    with sentences("download", name, "model"):
        wanted = [CONFIG, WEIGHTS, *TOKENIZER_FILES]  # an imported adapter's tokenizer and template are compared
        folder = Path(snapshot_download(name, revision=commit, cache_dir=ctx.scratch / "hub", allow_patterns=wanted))
        listed = None if is_recorded(folder) or constants.is_offline_mode() else tree_of(HfApi(), name, "model", commit)
    require_announced(folder, name, listed, ctx.say)
    return folder


def _file(folder: Path, name: str) -> Path:
    require_model(folder, "lora.start_from")
    if not (folder / name).is_file():
        raise InputError(
            f"lora.start_from: {folder} holds no {name}; allowed: a folder written by peft's save_pretrained"
        )
    return folder / name


def _settings(folder: Path) -> dict[str, Any]:
    path = _file(folder, CONFIG)
    with reading(f"lora.start_from: {path} is not an adapter's configuration"):
        value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"lora.start_from: {path}: found a {type(value).__name__}, allowed is an object")
    return value


def check(lora: Lora, folder: Path, base: Path, base_id: str, trust_remote_code: bool) -> None:
    """Refuse an adapter that differs from the recipe or the base, before any weight of the base is read.

    `base` is a folder with config.json. Raises InputError with one line per difference.
    """
    from peft import get_peft_model

    from finetune.lora.config import lora_config
    from finetune.models.layerwise import empty_model

    require_same(lora, folder, base, base_id, trust_remote_code)
    model = empty_model(base, trust_remote_code=trust_remote_code)
    _fitting(get_peft_model(model, lora_config(lora, model, read_new_tokens(base)), low_cpu_mem_usage=True), folder)


def require_same(
    lora: Lora, folder: Path, base: Path, base_id: str, trust_remote_code: bool, *, importing: bool = False
) -> None:
    """Refuse an adapter whose files differ from the recipe or the base. Raises InputError, a line each."""
    modules, tokens = read_modules(base, trust_remote_code), read_new_tokens(base) is not None
    known = Base(base_id, modules, read_json(base / "config.json"), tokens=tokens)
    if differences := problems(lora, read_adapter(folder), known, importing=importing):
        raise InputError("\n".join(f"{'.'.join(field)}: {why}" for field, why in differences))


def load(model: PeftModel, folder: Path) -> None:
    """Load the weights in `folder`, in fp32, into `model`, which has the recipe's adapter. Raises InputError."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, {n: t.float() for n, t in _fitting(model, folder).items()})


def _fitting(model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors after checking that names and shapes match those of `model` exactly."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    _compare_settings(_settings(folder), model.peft_config["default"].to_dict(), folder)
    file = _file(folder, WEIGHTS)
    with reading(f"lora.start_from: {file} is not an adapter's weights"):
        stored = load_file(str(file))
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if odd := sorted(own.keys() ^ stored.keys()):
        where = "is not in the adapter" if odd[0] in own else "is in the adapter but not in the recipe's"
        raise InputError(
            f"lora.start_from: {odd[0]} {where} ({len(odd)} such tensors): lora.targets must be the adapter's"
        )
    for name, tensor in sorted(stored.items()):
        if tensor.shape != own[name].shape:
            raise InputError(
                f"lora.start_from: {name} is {list(tensor.shape)} in the adapter and {list(own[name].shape)} here; "
                "is it the right base, and the same rank?"
            )
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(
                f"lora.start_from: {name} in {folder.name} is {str(tensor.dtype).removeprefix('torch.')}; allowed are "
                "float32, float16 and bfloat16"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"lora.start_from: {name} in {folder.name} holds NaN or an infinity")
    return stored


def _compare_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any], folder: Path) -> None:
    if theirs.get("peft_type") != "LORA":
        raise InputError(f"lora.start_from: {folder.name} holds an adapter of type {theirs.get('peft_type')}, not LORA")
    for name in COMPARED:
        one, other = theirs.get(name), ours.get(name)
        if _plain(one) != _plain(other):
            raise InputError(
                f"lora.start_from: {name} is {clipped(str(one), 200)} in the adapter and {other} in the recipe; make "
                "them agree"
            )


def _plain(value: object) -> object:
    """Return a canonical form: empty values become None, lists are sorted."""
    if not value or value == "none":
        return None
    return sorted(value, key=str) if isinstance(value, list | set | tuple) else value
