"""Every exported file beside the merged model on the same held-out tokens, one decoder layer in memory at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from finetune.context import Context
from finetune.errors import FinetuneError
from finetune.eval.compare import HeldOut, compare, lay_out, per_row, supervised_hidden
from finetune.eval.metrics import agreement, perplexity
from finetune.models.layerwise import StreamedModel, Weights, empty_model, hidden_states
from finetune.tokenization.token_rows import TokenRow
from finetune.utils.safetensors_io import read_folder

WORTH_SAYING_SECONDS = 30.0


@dataclass(frozen=True)
class Kind:
    """Weights of an exported file by their names in the merged model, and a change of the model that computes."""

    weights: Weights
    prepare: Callable[[PreTrainedModel], None] = lambda model: None


@dataclass(frozen=True)
class Scores:
    """Scores on `tokens` supervised tokens of `rows` rows, by the name of the kind, `merged` first.

    `agreement`: share of positions where the file's likeliest next token is the merged model's; `mean_kl`: nats.
    """

    perplexity: dict[str, float]
    agreement: dict[str, float]
    mean_kl: dict[str, float]
    rows: int
    tokens: int


def score(merged: Path, files: Mapping[str, Kind], rows: Sequence[TokenRow], device: str, ctx: Context) -> Scores:
    """Score the model in the folder `merged`, and the same model with the weights of each of `files`, in fp32.

    Held in memory are two layers, the hidden states of `rows`, and two heads.
    """
    held_out, refs = lay_out(rows), read_folder(merged)
    counts = per_row(None, held_out)
    own = _streamed(merged, lambda name: refs[name].load(), device)
    expected = _hidden(own, held_out, "merged", ctx, models=1 + len(files))
    scores = Scores({}, {}, {}, held_out.rows, len(held_out.labels))
    for kind, file in files.items():
        model = _streamed(merged, file.weights, device)
        file.prepare(model.model)
        hidden = _hidden(model, held_out, kind, ctx)
        with own.head() as first, model.head() as second:
            compared = compare(expected, first, hidden, second, held_out.labels)
        scores.perplexity.setdefault("merged", perplexity(per_row(compared.nll_first, held_out), counts))
        scores.perplexity[kind] = perplexity(per_row(compared.nll_second, held_out), counts)
        if not math.isfinite(scores.perplexity[kind]):
            raise FinetuneError(f"export: the perplexity of {kind} is {scores.perplexity[kind]}; take another kind")
        scores.agreement[kind] = agreement(compared.greedy_first, compared.greedy_second)
        scores.mean_kl[kind] = float(compared.kl.mean())
    return scores


def _streamed(merged: Path, weights: Weights, device: str) -> StreamedModel:
    return StreamedModel(empty_model(merged), weights, device)


def _hidden(model: StreamedModel, held_out: HeldOut, label: str, ctx: Context, models: int = 0) -> torch.Tensor:
    """Final hidden states (P, d) of the supervised positions; `models`: how many passes to announce."""
    tokens = sum(batch.numel() for batch in held_out.batches)
    track = partial(_timed, label=label, tokens=tokens, models=models, ctx=ctx)
    return supervised_hidden(hidden_states([model], held_out.batches, track)[0], held_out)


def _timed(layers: Sequence[int], label: str, tokens: int, models: int, ctx: Context) -> Iterator[int]:
    """The layers under a progress bar; after the first, how long all the passes will take, if that is long."""
    started = time.monotonic()
    for index in ctx.track(layers, f"perplexity {label}", len(layers)):
        yield index
        if index or not models:
            continue
        layer = time.monotonic() - started
        expected = layer * len(layers) * models
        if expected >= WORTH_SAYING_SECONDS:
            others = f"{models - 1} file{'' if models == 2 else 's'}"
            ctx.say(
                f"export: scoring the merged model and {others} on {tokens:,} tokens, "
                f"a layer at a time, takes about {expected / 60:.1f} min ({layer:.1f} s a layer)"
            )
