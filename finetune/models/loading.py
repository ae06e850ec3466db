"""Loading of base models: devices, precision, tokenizers, weights, NF4 and adapters. Nothing else loads a base."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.context import Context
from finetune.errors import MACHINE, FinetuneError, InputError
from finetune.hub.errors import retried, sentences
from finetune.models import device as model_device
from finetune.models import new_tokens, quantized_cache
from finetune.models.architecture import scaled
from finetune.models.attention import prepared
from finetune.models.device import Precision, gpu_index
from finetune.utils.files import file_digest, read_json, write_bytes, write_json
from finetune.utils.format import first_line
from finetune.utils.limits import bounded, reading
from finetune.utils.links import read_regular
from finetune.utils.quiet import quiet
from finetune.utils.runtime import available_memory

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from finetune import recipe

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",  # transformers no longer writes it, but llama.cpp and others read it
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
MODEL_FILES = ("config.json", "generation_config.json")
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
INDEX = "model.safetensors.index.json"
BUILD_SECONDS, BUILD_BYTES = 20, 2_000_000_000  # of an architecture without weights; 0.3 s for a 7B


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a base folder; the network is not asked."""
    from transformers import AutoTokenizer

    with reading(f"{base} holds no tokenizer that transformers can read"):
        return AutoTokenizer.from_pretrained(base, local_files_only=True)


def copy_tokenizer(base: Path, target: Path) -> None:
    """Copy the tokenizer files of `base`, byte by byte, save for local paths."""
    for name in (*TOKENIZER_FILES, *more_templates(base)):
        copy_clean(base / name, target / name)


def more_templates(base: Path) -> list[str]:
    """The files of a base's templates beside its default one, relative to `base`."""
    return [path.relative_to(base).as_posix() for path in sorted(base.glob(MORE_TEMPLATES))]


def copy_clean(source: Path, target: Path) -> None:
    """Copy a small file if it is there; a JSON file loses the path it was once loaded from."""
    if not source.is_file():
        return
    content = read_regular(source)
    target.parent.mkdir(exist_ok=True)
    if source.name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        value = read_json(source)
        if not isinstance(value, dict):
            raise InputError(f"{source}: found a {type(value).__name__}, allowed is an object")
        if "_name_or_path" in value or "name_or_path" in value:
            kept = {k: v for k, v in value.items() if k not in ("_name_or_path", "name_or_path")}
            content = (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
    write_bytes(target, content)


def set_pad_token(folder: Path, pad_token: str) -> None:
    """Write `pad_token` into the tokenizer files of `folder`, as the token that was padded with in training."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    write_json(path, {**config, "pad_token": pad_token})
    special = folder / "special_tokens_map.json"
    if special.exists():
        write_json(special, {**read_json(special), "pad_token": pad_token})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`; empty if one is missing or there are none.

    Raises InputError if the index names a file outside the folder: it comes with a download, and is data.
    """
    if (folder / INDEX).exists():
        with reading(f"{folder / INDEX} is not an index of weights"):
            names = {str(name) for name in read_json(folder / INDEX)["weight_map"].values()}
        if outside := sorted(n for n in names if not n.endswith(".safetensors") or Path(n).name != n):
            raise InputError(f"{folder / INDEX}: names {outside[0]!r}, which is not a safetensors file in this folder")
        shards = sorted(folder / name for name in names)
        return shards if all(s.exists() for s in shards) else []
    whole = folder / "model.safetensors"
    return [whole] if whole.exists() else []


def refuse_without_safetensors(where: str, names: Sequence[str]) -> None:
    """Raise InputError unless the file list `names` holds a model in safetensors."""
    if "model.safetensors" in names or INDEX in names:
        return
    pickled = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth")))
    actual = f"only pickled weights ({pickled[0]}), which can run any code" if pickled else "no weights"
    raise InputError(f"{where} holds {actual}; a base needs model.safetensors, or shards with {INDEX}")


def ensure_base(model: recipe.Model, base: Path, ctx: Context) -> Path:
    """Return the folder with config.json and the safetensors files of the revision pinned in `base`.

    For a Hub model that is a snapshot in `scratch/hub`, downloaded again if it is missing; for a builtin, `base`
    itself. Raises InputError if a weight file of a local model folder is missing or has changed since stage base ran,
    FinetuneError if a download fails.
    """
    pinned = read_json(base / "base.json")
    if model.kind == "builtin":
        return base
    if model.folder is not None:
        for name, digest in sorted(pinned["weights"].items()):
            path = model.folder / name
            if not path.exists() or file_digest(path) != digest:
                raise InputError(
                    f"{path} is not the file this run began with; put it back, or run again from the start"
                )
        return model.folder
    return hub_snapshot(model, pinned["revision"], ctx, weights=True)


def hub_snapshot(model: recipe.Model, revision: str, ctx: Context, *, weights: bool) -> Path:
    """The local folder of a Hub model at the commit `revision`, with its weights or with the small files only.

    Raises InputError if the Hub has no such model, or none in safetensors, FinetuneError if it cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from finetune.hub.client import tree_of
    from finetune.hub.verified import require_announced

    small = [*MODEL_FILES, *TOKENIZER_FILES, MORE_TEMPLATES, *(["*.py"] if model.trust_remote_code else [])]
    # Not `consolidated*.safetensors`, the same weights once more in Mistral's own layout, nor files in subfolders.
    wanted = [*small, "model*.safetensors", INDEX] if weights else small
    snapshot = partial(
        snapshot_download,
        model.id,
        revision=revision,
        cache_dir=ctx.scratch / "hub",
        allow_patterns=wanted,
        ignore_patterns=[f"*/*.{kind}" for kind in ("safetensors", "json", "py", "txt", "model")],
    )
    try:
        present = Path(snapshot(local_files_only=True))
        if (present / "config.json").exists() and (weight_files(present) or not weights):
            require_announced(present, model.id, None, ctx.say, weights=weights)
            return present
    except LocalEntryNotFoundError:
        pass  # also where it is there in part
    ctx.say(f"base: {'downloading' if weights else 'reading'} {model.id} at {revision[:12]}")
    with sentences("download", model.id, "model"):
        listed = retried(lambda: tree_of(HfApi(), model.id, "model", revision), ctx.say, time.sleep)
        refuse_without_safetensors(f"{model.id} at {revision[:12]}", [f.path for f in listed])
        folder = Path(retried(snapshot, ctx.say, time.sleep))
        require_announced(folder, model.id, listed, ctx.say, weights=weights)
    if weights and not weight_files(folder):
        raise FinetuneError(f"the download of {model.id} is incomplete in {folder}; run the same command again")
    return folder


def load_base(
    model: recipe.Model,
    base: Path,
    ctx: Context,
    quantization: recipe.Quantization | None,
    compute_dtype: Precision,
    device: str,
    attention: str | None = None,
) -> PreTrainedModel:
    """The frozen base on `device`, in eval mode: its linear layers in 4 bits if `quantization` asks for it, the rest in
    `compute_dtype`. `lm_head` is never quantised. The CPU takes the same path as a GPU. `attention` is a name of
    models/attention; None takes what every device has.

    Raises FinetuneError if the files and the architecture do not agree on every weight.
    """
    import transformers

    from finetune.models.compile import keep_dequantized

    # transformers' own annotations know neither the report nor these constructors
    auto, quantize = cast("Any", transformers.AutoModelForCausalLM), cast("Any", transformers.BitsAndBytesConfig)
    dtype = _torch_dtype(compute_dtype)
    options: dict[str, Any] = {}
    copy = _copy_of(model, base, ctx, quantization, compute_dtype)
    ready = copy is not None and quantized_cache.find(*copy, ctx)
    folder = copy[0] if copy and ready else ensure_base(model, base, ctx)
    if quantization is not None and not ready:
        options["quantization_config"] = quantize(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.type,
            bnb_4bit_use_double_quant=quantization.double,
            bnb_4bit_compute_dtype=dtype,
        )
    tokens = new_tokens.read_new_tokens(base)
    if model.rope_scaling or tokens:  # the folder's config.json may lack the first, and name rows not stored
        options["config"] = _stored_config(folder, model, tokens)
    try:
        with quiet():
            loaded, report = auto.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": f"cuda:{gpu_index(device)}" if device.startswith("cuda") else device},
                attn_implementation=prepared(attention, base, trust_remote_code=model.trust_remote_code),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except FinetuneError:
        raise
    except Exception as error:
        if (isinstance(error, OSError) and error.errno in MACHINE) or isinstance(error, MemoryError):
            raise
        raise FinetuneError(f"cannot load {model.id} from {folder}: {first_line(error)}") from error
    _require_all_weights(model.id, loaded, report, ctx)
    if copy and not ready and ctx.rank == 0:
        with quiet():
            quantized_cache.write(loaded, *copy, loaded.get_memory_footprint(), ctx)
    if quantization is not None or getattr(loaded, "is_loaded_in_4bit", False):  # by the recipe, or as it is stored
        _keep_weights_unpacked(loaded)
        if device == "cpu":  # where dequantising a layer takes longer than its product
            keep_dequantized(loaded, available_memory(ctx.world))
    if tokens:
        new_tokens.grow(loaded, tokens)
    return cast("PreTrainedModel", loaded.requires_grad_(False).eval())


def _stored_config(folder: Path, model: recipe.Model, tokens: new_tokens.NewTokens | None) -> PretrainedConfig:
    """The configuration in `folder` with the recipe's rotary settings, and the embedding's rows that are stored."""
    import transformers

    auto: Any = transformers.AutoConfig
    settings = read_json(folder / "config.json")
    settings = scaled(settings, model.rope_scaling) if model.rope_scaling else settings
    settings = new_tokens.with_rows(settings, tokens.stored) if tokens else settings
    own = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=model.trust_remote_code)
    config: PretrainedConfig = type(own).from_dict(settings)
    return config


def _copy_of(
    model: recipe.Model, base: Path, ctx: Context, quantization: recipe.Quantization | None, compute_dtype: Precision
) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder of the 4-bit copy of this base and the identity of that copy; None if no copy is made.

    A model with its own code gets none: the copy would not contain that code.
    """
    parameters = int(read_json(base / "base.json").get("parameters", 0))
    if quantization is None or model.trust_remote_code:
        return None
    if not quantized_cache.wanted(ctx.runtime.keep_quantized, parameters):
        return None
    return quantized_cache.locate(ctx.scratch, base, quantization, compute_dtype)


def _torch_dtype(precision: Precision) -> torch.dtype:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def _require_all_weights(name: str, model: PreTrainedModel, report: dict[str, Any], ctx: Context) -> None:
    """Refuse what transformers only warns of: it fills what is missing with random numbers. Tensors of parts beside the
    model are reported.
    """
    from finetune.models.stored_names import split_unused

    beside, own = split_unused(model, sorted(map(str, report.get("unexpected_keys") or ())))
    odd = {**report, "unexpected_keys": own}
    wrong = [f"{kind.removesuffix('_keys')} {sorted(map(str, odd[kind]))[0]}" for kind in odd if odd[kind]]
    if wrong:
        raise FinetuneError(
            f"the weights of {name} are not those its config.json describes ({'; '.join(wrong)}); "
            "download them again or fix the folder"
        )
    if beside and ctx.rank == 0:
        ctx.say(f"base: the model does not use {len(beside)} tensors ({beside[0]}); a merge carries them as they are")


def _keep_weights_unpacked(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    In eval mode its `Linear4bit.forward` rewrites the weights into a layout that only its inference kernel reads.
    Backward and `dequantize_4bit` go on reading the old layout, so after one evaluation most gradients are wrong while
    the loss looks normal. Without the flag, evaluation dequantises like training does.
    """
    for _, module in _linear4bit(model):
        module.support_avx512bf16_for_cpu = False


def _linear4bit(model: torch.nn.Module) -> list[tuple[str, Any]]:
    from bitsandbytes.nn.modules import Linear4bit

    return [(n, m) for n, m in model.named_modules() if isinstance(m, Linear4bit)]


def attach_adapter(model: PreTrainedModel, adapter_dir: Path, *, trainable: bool = False) -> PeftModel:
    """`model` with the trained adapter in `adapter_dir`, frozen, in eval mode, computing as it was trained; `trainable`
    to go on training it, under the trainer's own autocast.

    Raises FinetuneError if a key of the adapter is missing or has no place: peft only warns, and a module without
    its adapter answers like the base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    file = adapter_dir / "adapter_model.safetensors"
    if not file.exists():
        raise FinetuneError(f"{adapter_dir} holds no adapter_model.safetensors")
    try:
        with quiet():
            attached = PeftModel.from_pretrained(
                model, adapter_dir, is_trainable=trainable, torch_device=str(model.device)
            )
    except (RuntimeError, ValueError) as error:
        raise FinetuneError(f"the adapter in {adapter_dir} does not fit this base: {first_line(error)}") from error
    with safe_open(file, "pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}
    keys = set(tensors)
    places = set(get_peft_model_state_dict(attached, save_embedding_layers=False))
    missing, extra = sorted(places - keys), sorted(keys - places)
    if missing or extra:
        raise FinetuneError(
            f"the adapter in {adapter_dir} is not complete for this base: {len(missing)} keys missing, "
            f"{len(extra)} without a place ({(missing + extra)[0]})"
        )
    model_device.as_trained(attached, tensors, autocast_forward=not trainable)
    return attached if trainable else attached.eval()


def count_parameters(folder: Path, trust_remote_code: bool = False) -> int:
    """Parameters of the architecture that config.json describes, without allocating any. Raises InputError."""
    import torch
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    what = f"{folder / 'config.json'} describes no causal language model"
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with bounded(what, cpu_seconds=BUILD_SECONDS, memory_bytes=BUILD_BYTES), torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except FinetuneError:
        raise
    except Exception as error:  # a configuration class may raise anything of values that it does not know
        if not trust_remote_code and "trust_remote_code" in str(error):  # what transformers asks for
            raise InputError(
                f"{folder / 'config.json'} needs the Python code beside it, and none was run; read it, and set "
                "model.trust_remote_code: true if this machine may run it"
            ) from error
        raise InputError(f"{folder / 'config.json'} describes no causal language model: {first_line(error)}") from error
    return sum(p.numel() for p in model.parameters())
