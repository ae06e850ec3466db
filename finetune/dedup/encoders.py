"""Embed texts with a model: sentence-transformers (cached for other runs), or a static model2vec model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune.dedup.embedding_names import STATIC
from finetune.errors import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from finetune.context import Context
    from finetune.dedup.embedding_cache import EmbeddingCache

TEXTS_PER_CALL = 2048  # between two checks of the stop flag
BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}  # limited by a CPU's cache; a GPU needs many
KEEP_TEXTS = 4096  # embedded between two writes: at most this many are lost if the process is killed


def sentences(
    texts: list[str], name: str, ctx: Context, folder: Path | None, made_by: Mapping[str, object] | None
) -> tuple[NDArray[np.float32], int]:
    """Return vectors (N, d) of a sentence-transformers model, in 16 bits on a GPU; `texts` are unique and not empty.

    Vectors cached under `made_by` are reused; the number of the others is returned too.

    Raises:
        InputError: the model is neither local nor downloadable.
    """
    from finetune.dedup.embedding_cache import EmbeddingCache
    from finetune.models.device import pick_device

    if folder is not None and not folder.is_dir():
        raise InputError(f"dedup.embedding: there is no folder {folder}")
    device = pick_device(ctx.device)
    cache = None
    known, vectors = np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    if made_by is not None:
        cache = EmbeddingCache(ctx.scratch, {"made_by": dict(made_by), "device": device.partition(":")[0]}, ctx.say)
        known, vectors = cache.find(texts)
    out = np.zeros((len(texts), vectors.shape[1]), np.float32)
    out[known] = vectors
    missing = np.setdiff1d(np.arange(len(texts)), known)
    if len(known):
        ctx.say(f"embed: {len(known):,} of {len(texts):,} texts were embedded before")
    if not len(missing):
        return out, 0
    model = _load(name, ctx, folder, device)
    pending: list[tuple[list[int], NDArray[np.float32]]] = []
    planned = batches(model, [texts[i] for i in missing], BATCH_TOKENS[device.partition(":")[0]])
    for batch in ctx.track(planned, "embed", total=len(planned)):
        rows = missing[batch].tolist()
        made = model.encode([texts[i] for i in rows], batch_size=len(rows), show_progress_bar=False)
        pending.append((rows, np.asarray(made, np.float32)))
        if sum(len(r) for r, _ in pending) >= KEEP_TEXTS:
            out = _settled(out, pending, texts, cache)
    return _settled(out, pending, texts, cache), len(missing)


def static(texts: list[str], name: str, ctx: Context, folder: Path | None) -> NDArray[np.float32]:
    """Return vectors (N, d) of a static model: the mean of token vectors (model2vec), about a hundred times faster.

    Raises:
        InputError: model2vec is not installed, or the model is neither local nor downloadable.
    """
    if importlib.util.find_spec("model2vec") is None:
        raise InputError(
            f"dedup.embedding: {STATIC}{name} needs a package that is not installed: pip install model2vec"
        )
    if folder is not None and not folder.is_dir():
        raise InputError(f"dedup.embedding: there is no folder {folder}")
    with _loading(name):
        place = folder or _downloaded(name, ctx)
        _try_tokenizers(place)
    parts = [texts[start : start + TEXTS_PER_CALL] for start in range(0, len(texts), TEXTS_PER_CALL)]
    done = ctx.engine.map(partial(_static_encoder, place, name), parts, len(texts))
    return np.concatenate(list(ctx.track(done, "embed", total=len(parts))))


def _static_encoder(place: Path, name: str) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Build the function that embeds texts with the static model in the folder `place`."""
    from model2vec import StaticModel

    with _loading(name):
        # Whole texts: a mean over the first 512 tokens would be equal for two long answers with the same beginning.
        model = StaticModel.from_pretrained(place, max_length=None, force_download=False)
    return lambda texts: np.asarray(model.encode(texts, use_multiprocessing=False), np.float32)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"dedup.embedding: {name!r} could not be loaded as a model2vec model ({error}); give a Hub name that this "
            "machine can reach, or the folder of a downloaded model"
        ) from error


def _downloaded(name: str, ctx: Context) -> Path:
    from huggingface_hub import snapshot_download

    from finetune.hub.client import resolve_revision

    revision = resolve_revision(name, None, "model", ctx.scratch, ctx.say)
    return Path(snapshot_download(name, revision=revision, cache_dir=ctx.scratch / "hub"))


def _load(name: str, ctx: Context, folder: Path | None, device: str) -> SentenceTransformer:
    import torch
    from huggingface_hub import constants, try_to_load_from_cache
    from sentence_transformers import SentenceTransformer

    from finetune.hub.client import resolve_revision

    cuda = device.startswith("cuda")
    half = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    revision = None if folder else resolve_revision(name, None, "model", ctx.scratch, ctx.say)
    _try_tokenizers(folder)
    try:
        model = SentenceTransformer(
            str(folder or name),
            device=device,
            revision=revision,
            cache_folder=str(ctx.scratch / "hub"),
            local_files_only=folder is not None or constants.is_offline_mode(),
            model_kwargs={"dtype": half if cuda else torch.float32, "use_safetensors": True},  # never a pickle
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"dedup.embedding: {name!r} could not be loaded as a sentence-transformers model ({error}); "
            "give a Hub name that this machine can reach, the folder of a downloaded model, or lsa"
        ) from error
    if folder is None:
        kept = try_to_load_from_cache(name, "tokenizer.json", ctx.scratch / "hub", revision)
        _try_tokenizers(Path(kept).parent if isinstance(kept, str) else None)
    return model


def _try_tokenizers(folder: Path | None) -> None:
    """Raise InputError if a tokenizer in an encoder's folder does not end; it may come from a third party."""
    from finetune.models.base_limits import check_tokenizer

    for path in sorted(folder.glob("**/tokenizer.json")) if folder else ():
        check_tokenizer(path)


def batches(model: SentenceTransformer, texts: Sequence[str], budget: int) -> list[list[int]]:
    """Return positions in `texts`, longest first, in batches of at most `budget` tokens with padding (or one text).

    Texts of similar length need little padding, memory runs out in the first batch or never, and a resumed run forms
    the same batches as the first run.
    """
    lengths = np.fromiter(_token_counts(model, texts), np.int64, len(texts))
    order = np.argsort(-lengths, kind="stable").tolist()
    groups = []
    start = 0
    while start < len(order):
        stop = start + max(1, budget // max(1, int(lengths[order[start]])))
        groups.append(order[start:stop])
        start = stop
    return groups


def _token_counts(model: SentenceTransformer, texts: Sequence[str]) -> Iterator[int]:
    """Yield the tokens of each text as the model truncates it; characters if its tokenizer is of another kind."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = model.tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        yield from map(len, texts)
        return
    limit = model.max_seq_length
    for start in range(0, len(texts), TEXTS_PER_CALL):
        ids = tokenizer(list(texts[start : start + TEXTS_PER_CALL]), padding=False, verbose=False)["input_ids"]
        yield from (min(len(row), limit) if limit else len(row) for row in ids)


def _settled(
    out: NDArray[np.float32],
    pending: list[tuple[list[int], NDArray[np.float32]]],
    texts: Sequence[str],
    cache: EmbeddingCache | None,
) -> NDArray[np.float32]:
    """Return `out` with the pending vectors added, which are also cached for other runs."""
    if not pending:
        return out
    rows = [row for batch, _ in pending for row in batch]
    vectors = np.concatenate([part for _, part in pending])
    if not out.shape[1]:
        out = np.zeros((len(out), vectors.shape[1]), np.float32)
    out[rows] = vectors
    if cache is not None:
        cache.keep([texts[row] for row in rows], vectors)
    pending.clear()
    return out
