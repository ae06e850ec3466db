"""Write the merged model: safetensors one tensor at a time, and every file that a model folder needs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.context import Context
from finetune.errors import InputError
from finetune.metrics import Headline, MergeMetrics
from finetune.recipe import Merge, Model, Quantization, Recipe, Section
from finetune.utils.files import read_json, write_bytes, write_json
from finetune.utils.format import size
from finetune.utils.limits import require_space

if TYPE_CHECKING:
    from finetune.merge.nf4_round_trip import RoundTrip

SMALL_FILES_BYTES = 64_000_000  # tokenizer, template and configurations beside the weights


class Spec(Section):
    """The merge section, and how the base was quantised while training."""

    model: Model
    quantization: Quantization | None
    merge: Merge


def spec(recipe: Recipe) -> Spec | None:
    """Off if the recipe has merge: null."""
    if recipe.merge is None:
        return None
    return Spec(model=recipe.model, quantization=recipe.quantization, merge=recipe.merge)


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Nothing outside the recipe and the inputs."""
    return {}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> MergeMetrics:
    """Merge into the base that the certificate names (without one, the original) and write a folder ready to load."""
    from finetune.merge.blocks import merged_pieces
    from finetune.merge.plan import output_dtype, plan_merge
    from finetune.models import base_limits, loading
    from finetune.models.device import pick_device
    from finetune.models.new_tokens import read_new_tokens
    from finetune.utils.safetensors_io import plan_shards, write_shards

    started = time.monotonic()
    base, adapter = inputs["base"], inputs["train"] / "adapter"
    certificate_file = inputs["certify"] / "certificate.json"
    certificate: dict[str, Any] = read_json(certificate_file) if certificate_file.exists() else {"base": "original"}
    dtype = output_dtype(spec.merge.dtype, base)
    folder = loading.ensure_base(spec.model, base, ctx)
    trip = _round_trip(spec, certificate, ctx) if certificate["base"] == "dequantized" else None
    tokens = read_new_tokens(base)
    plan = plan_merge(folder, adapter, dtype, trip, spec.model.trust_remote_code, tokens)
    shards = plan_shards(plan.shapes, spec.merge.max_shard_bytes)
    require_space(out, shards.file_bytes + SMALL_FILES_BYTES, "merge: the model", "give a larger disk with --scratch")
    with _peak_anonymous() as peak:
        names = [t.name for t in shards.tensors]
        tracked = ctx.track(names, "merge", len(names))
        digests = write_shards(out, shards, merged_pieces(plan, tracked, pick_device(ctx.device)))
    for name, digest in digests.items():
        ctx.hashed(out / name, digest)
    _write_config(base, out, dtype, plan.untie)
    _write_tokenizer(base, adapter, out)
    _write_generation_config(base, adapter, out)
    base_limits.settle_code(folder, out, ctx.say, trusted=spec.model.trust_remote_code)
    if certificate_file.exists():
        write_bytes(out / "certificate.json", certificate_file.read_bytes())
    return {
        "base": certificate["base"],
        "dtype": dtype,
        "tensors": len(names),
        "changed_tensors": sum(bool(t.changes) for t in plan.targets.values()),
        "bytes": shards.file_bytes,
        "files": len(shards.shards),
        "peak_anon_bytes": peak[0],
        "seconds": round(time.monotonic() - started, 3),
    }


def headline(m: MergeMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    return Headline(f"peak {size(m['peak_anon_bytes'])}")


def _round_trip(spec: Spec, certificate: Mapping[str, Any], ctx: Context) -> RoundTrip:
    """Through 4 bits and back in the precision that was certified, whatever this machine would choose."""
    from finetune.merge.nf4_round_trip import RoundTrip
    from finetune.models.device import pick_device

    if spec.quantization is None:
        raise InputError("the certificate names the dequantized base, but quantization is null; run certify again")
    device = pick_device(ctx.device)
    return RoundTrip(spec.quantization.type, spec.quantization.double, certificate["round_trip_dtype"], device)


def _write_config(base: Path, out: Path, dtype: str, untie: bool) -> None:
    """The base's config.json: loadable as it stands, answering fast, and saying the dtype that is in the files."""
    config = read_json(base / "config.json")
    for name in ("_name_or_path", "quantization_config", "torch_dtype"):
        config.pop(name, None)
    config |= {"dtype": dtype, "torch_dtype": dtype, "use_cache": True}  # torch_dtype: for readers older than 2025
    if untie:
        config["tie_word_embeddings"] = False
    write_json(out / "config.json", config)


def _write_tokenizer(base: Path, adapter: Path, out: Path) -> None:
    """The tokenizer and template that were trained: the adapter's, and the base's if the adapter has none."""
    from finetune.models import loading

    for name in (*loading.TOKENIZER_FILES, *loading.more_templates(base)):
        loading.copy_clean((adapter if (adapter / name).exists() else base) / name, out / name)
    settings = out / "tokenizer_config.json"
    if (out / "chat_template.jinja").exists() and settings.exists():
        config = read_json(settings)
        if config.pop("chat_template", None) is not None:  # an older template inside would win in some readers
            write_json(settings, config)
    provenance = adapter / "template" / "template.json"
    if provenance.exists():
        write_bytes(out / "template.json", provenance.read_bytes())


def _write_generation_config(base: Path, adapter: Path, out: Path) -> None:
    """The base's generation settings, ending at the terminators that were trained, and at the base's own others."""
    path = base / "generation_config.json"
    config = read_json(path) if path.exists() else {}
    architecture = read_json(base / "config.json")
    for name in ("_from_model_config", "transformers_version"):
        config.pop(name, None)
    template = adapter / "template" / "template.json"
    if template.exists() and (terminators := read_json(template)["terminators"]):
        own = config.get("eos_token_id", architecture.get("eos_token_id"))
        others = own if isinstance(own, list) else [] if own is None else [own]
        every = list(dict.fromkeys([*terminators, *others]))
        config["eos_token_id"] = every[0] if len(every) == 1 else every
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(name) is None and architecture.get(name) is not None:
            config[name] = architecture[name]
    write_json(out / "generation_config.json", config)


@contextmanager
def _peak_anonymous(every_seconds: float = 0.01) -> Iterator[list[int | None]]:
    """A list whose first item, afterwards, is how far anonymous memory rose above its start (None but on Linux).

    Anonymous memory is what the machine must really hold; pages of files are counted apart and can be given back.
    """
    result: list[int | None] = [None]
    start = _anonymous_bytes()
    if start is None:
        yield result
        return
    done = threading.Event()
    highest = start

    def watch() -> None:
        nonlocal highest
        while not done.wait(every_seconds):
            highest = max(highest, _anonymous_bytes() or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield result
    finally:
        done.set()
        watcher.join()
        result[0] = max(highest, _anonymous_bytes() or 0) - start


def _anonymous_bytes() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)
