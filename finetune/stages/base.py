"""Pin the base model: its revision, configuration and tokenizer; `builtin:tiny-mistral` is trained here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.context import Context
from finetune.errors import InputError
from finetune.metrics import BaseMetrics, Headline
from finetune.recipe import Model, Recipe, Section, Tokens
from finetune.utils.files import file_digest, read_json, write_json
from finetune.utils.limits import reading
from finetune.utils.links import require_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Spec(Section):
    """The base and the tokens it is given; the seed only if the base itself is trained with it."""

    model: Model
    seed: int | None = None
    tokens: Tokens | None = None


def spec(recipe: Recipe) -> Spec:
    """The part of the recipe this stage sees."""
    seed = recipe.seed if recipe.model.kind == "builtin" else None
    return Spec(model=recipe.model, seed=seed, tokens=recipe.tokens)


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """The current commit of the Hub model, the digests of a folder's files, or the text a builtin learns from."""
    model = spec.model
    if model.folder is not None:
        return {"files": _digests(model.folder)}
    if model.kind == "hub":
        from finetune.hub.client import resolve_revision

        return {"revision": resolve_revision(model.id, model.revision)}
    from finetune.data import pydoc_rows
    from finetune.tiny import model as tiny_model
    from finetune.tiny import text as tiny_text

    return {"size": asdict(tiny_model.TINY), "text": tiny_text.sources(), "left_out": pydoc_rows.fingerprint()}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> BaseMetrics:
    """Leave base.json, config and tokenizer; for a builtin the weights too.

    Raises InputError if the base has no safetensors, no causal language model or no tokenizer that fits it.
    """
    from finetune.models import base_limits, loading
    from finetune.models.architecture import positions, scaled
    from finetune.models.base_limits import check_config, check_tokenizer

    model, revision = spec.model, None
    metrics: BaseMetrics = {}
    weights: dict[str, str] = {}
    if model.kind == "builtin":
        metrics = _train_builtin(spec.seed or 0, out, ctx)
        weights = {"model.safetensors": file_digest(out / "model.safetensors")}
        source = out
    elif model.folder is not None:
        weights = {n: d for n, d in _digests(model.folder).items() if ".safetensors" in n}
        source = model.folder
    else:
        from finetune.hub.client import resolve_revision
        from finetune.hub.verified import announced_weights

        revision = resolve_revision(model.id, model.revision, scratch=ctx.scratch, say=ctx.say)
        source = loading.hub_snapshot(model, revision, ctx, weights=False)
        metrics = {"weights_sha256": announced_weights(source)}  # what the download is compared with
    require_model(source, "model")
    with reading(f"{model.id} is not a model that can be used"):
        for name in loading.MODEL_FILES:
            loading.copy_clean(source / name, out / name)
        loading.copy_tokenizer(source, out)
    check_tokenizer(out / "tokenizer.json")
    if model.rope_scaling and (out / "config.json").exists():
        write_json(out / "config.json", scaled(read_json(out / "config.json"), model.rope_scaling))
    if model.trust_remote_code and source != out:
        base_limits.copy_code(source, out)  # loading this config.json needs the classes it names
    if not (out / "config.json").exists():
        raise InputError(f"{model.id} holds no config.json; a base is a folder that transformers can load")
    check_config(out / "config.json")
    parameters = loading.count_parameters(source, model.trust_remote_code)
    _require_fitting_vocabulary(model.id, loading.load_tokenizer(out), read_json(out / "config.json"))
    added = _add_tokens(spec, out, ctx) if spec.tokens else {}
    if model.rope_scaling:
        added |= {"positions": positions(read_json(source / "config.json"), model.rope_scaling)}
    if spec.tokens:
        parameters = loading.count_parameters(out, model.trust_remote_code)
    config = read_json(out / "config.json")
    facts = _try_architecture(model, out, ctx)
    pinned = {
        "id": model.id,
        "kind": model.kind,
        "revision": revision,
        "parameters": parameters,
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "weights": weights,
        **added,
    }
    write_json(out / "base.json", pinned)
    return {"parameters": parameters, "revision": revision, **facts, **metrics}


def headline(m: BaseMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    return Headline(f"{m['parameters']:,} parameters")


def _add_tokens(spec: Spec, out: Path, ctx: Context) -> dict[str, object]:
    """Write the recipe's tokens into the tokenizer and the configuration; what base.json holds of them."""
    from finetune.models import loading, new_tokens
    from finetune.models.layerwise import empty_model

    assert spec.tokens is not None  # noqa: S101 - the caller asked
    rows = new_tokens.embedding_rows(empty_model(out, trust_remote_code=spec.model.trust_remote_code))
    added = new_tokens.add_to_tokenizer(out, spec.tokens, rows, loading.load_tokenizer)
    write_json(out / "config.json", new_tokens.with_rows(read_json(out / "config.json"), added.rows))
    ctx.say(f"base: {added.describe()}")
    return {"tokens": added.as_json()}


def _try_architecture(model: Model, out: Path, ctx: Context) -> BaseMetrics:
    """Leave architecture.json: what the model is made of, and what its code can do. Returns what to report."""
    from finetune.models import inventory, trial
    from finetune.models.layerwise import empty_model

    counted = inventory.require_inventory(empty_model(out, trust_remote_code=model.trust_remote_code), model.id)
    facts = trial.try_architecture(out, trust_remote_code=model.trust_remote_code)
    write_json(out / inventory.FILE, {"inventory": counted.as_json(), **facts.as_json()})
    for note in inventory.notes(counted, read_json(out / "config.json")):
        ctx.say(f"base: {note}")
    return {"packing": facts.packing is None, "attention": facts.attention}


def _train_builtin(seed: int, out: Path, ctx: Context) -> BaseMetrics:
    from finetune.data import pydoc_rows
    from finetune.tiny import model as tiny_model

    return tiny_model.build(out, seed, (entry.doc for entry in pydoc_rows.documentation()), ctx)


def _digests(folder: Path) -> dict[str, str]:
    """Name → digest of every file in `folder` that makes up the model. Raises InputError if there is no model."""
    from finetune.models import loading
    from finetune.models.base_limits import check_config

    if not folder.is_dir():
        raise InputError(f"model: there is no folder {folder}")
    require_model(folder, "model")
    if not (folder / "config.json").exists():
        raise InputError(f"model: {folder} holds no config.json; a base is a folder that transformers can load")
    check_config(folder / "config.json")
    loading.refuse_without_safetensors(str(folder), [p.name for p in folder.iterdir()])
    weights = loading.weight_files(folder)
    if not weights:
        raise InputError(f"model: {folder} lacks a shard that {loading.INDEX} names; download or copy it again")
    more = loading.more_templates(folder)
    small = [folder / n for n in (*loading.MODEL_FILES, *loading.TOKENIZER_FILES, loading.INDEX, *more)]
    code = sorted(folder.glob("*.py"))
    return {p.relative_to(folder).as_posix(): file_digest(p) for p in [*small, *code, *weights] if p.exists()}


def _require_fitting_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, config: dict[str, object]) -> None:
    size, largest = config.get("vocab_size"), max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(size, int) and largest >= size:
        raise InputError(
            f"the tokenizer of {name} has the token id {largest}, its model only {size} embeddings; "
            "they do not belong together: take both from the same revision"
        )
