"""Metrics of each stage, as in its manifest: bytes are integers, seconds floats, shares 0 to 1, intervals [low, high].

No key is required: a manifest of an earlier version may lack it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

Interval = Sequence[float]  # low, high


class Headline(NamedTuple):
    """One row of a table of stages: the most important figure, rows in and rows out."""

    figure: str = ""
    rows_in: int | None = None
    rows_out: int | None = None
    held_out: int | None = None

    @property
    def rows(self) -> str:
        """Return `in → out + N held out`, as much of it as there is."""
        if self.rows_out is None:
            return ""
        start = f"{self.rows_in:,} → " if self.rows_in is not None else ""
        return f"{start}{self.rows_out:,}" + (f" + {self.held_out:,} held out" if self.held_out is not None else "")


class BaseMetrics(TypedDict, total=False):
    """The base; the last six of a built-in base, which is trained here."""

    parameters: int
    revision: str | None
    packing: bool
    attention: str
    weights_sha256: Mapping[str, str]
    pretraining_steps: int
    pretraining_tokens: int
    pretraining_loss: float
    held_out_loss: float
    held_out_bits_per_byte: float
    pretraining_seconds: float


class GenerateMetrics(TypedDict, total=False):
    """Rows written by a language model."""

    model: str
    answered_by: Mapping[str, int]
    method: str
    seeds: int
    seeds_refused: int
    candidates: int
    rows_out: int
    rejected: Mapping[str, int]
    rounds: Sequence[Mapping[str, Any]]
    operations: Mapping[str, int]
    requests: int
    prompt_tokens: int
    tokens: int


class IngestMetrics(TypedDict, total=False):
    """Rows read; `refused` by reason, `sources` by label."""

    rows_out: int
    sources: Mapping[str, Mapping[str, int]]
    refused: Mapping[str, int]
    formats: Mapping[str, str]
    unused: Mapping[str, Sequence[str]]
    notes: Mapping[str, Mapping[str, int]]
    eval_rows: int


class FilterMetrics(TypedDict, total=False):
    """Rows kept; `rejected` by reason."""

    rows_in: int
    rows_out: int
    rejected: Mapping[str, int]


class EmbedMetrics(TypedDict, total=False):
    """Vectors; `embedded` leaves out copies and cached ones, `rows_per_second` is None if none is left."""

    rows: int
    embedded: int
    rows_per_second: float | None
    model: str
    dimension: int


class DedupMetrics(TypedDict, total=False):
    """Rows dropped by each method, and the measured share of duplicates that was found."""

    rows_in: int
    rows_out: int
    exact: int
    minhash: int
    embedding: int
    recall: Mapping[str, Any]


class DecontaminateMetrics(TypedDict, total=False):
    """Rows dropped; `repeat_eval_data` by method, `words` and `embedding` those that match decontaminate.against."""

    rows_in: int
    rows_out: int
    dropped: int
    repeat_eval_data: Mapping[str, int]
    eval_data_rows: int
    words: int
    embedding: int
    evaluation_rows: int


class SampleMetrics(TypedDict, total=False):
    """Rows kept; `kept_by`: what each rule kept, a count or counts by source."""

    rows_in: int
    rows_out: int
    kept_by: Mapping[str, object]


class SplitMetrics(TypedDict, total=False):
    """Rows of both splits; `leaks`: training rows with a near-duplicate among the held-out ones."""

    rows_in: int
    train_rows: int
    eval_rows: int
    eval_data_rows: int
    groups: int
    eval_groups: int
    largest_group: int
    leaks: int
    compared_by: str


class RenderMetrics(TypedDict, total=False):
    """Token ids and labels; `rows` are the training rows."""

    supervised_fraction: float
    truncated: int
    unterminated: int
    dropped: int
    dropped_because: Mapping[str, int]
    masked_turns: int
    special_text: Mapping[str, int]
    rows: int
    tokens: int
    longest: int
    eval_rows: int
    template: str
    terminator: str


class PackMetrics(TypedDict, total=False):
    """Packed rows; `off` is the reason if rows are not packed."""

    efficiency: float
    bins: int
    bins_at_least: int
    tokens: int
    longest: int
    documents: int
    rows: int
    off: str


class PairsMetrics(TypedDict, total=False):
    """Preference pairs; `rows` are the training pairs."""

    rows_in: int
    rows: int
    eval_rows: int
    refused: Mapping[str, int]
    dropped: int
    dropped_because: Mapping[str, int]
    sources: Mapping[str, Any]
    formats: Mapping[str, Any]
    notes: Mapping[str, Any]
    length_bias: float | None
    chosen_tokens: float
    rejected_tokens: float
    completion_tokens: float
    labels: Mapping[str, int]
    tokens: int
    longest: int
    template: str
    terminator: str
    contradictions: int
    groups: int
    leaks: int


class TrainedMetrics(TypedDict, total=False):
    """A training; `loss` is the mean over the last tenth of the steps, in nats a token for stage train."""

    loss: float
    first_loss: float
    steps: int
    epochs: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    precision: str
    attention: str
    device: str
    checkpointing: str
    processes: int
    resumed_from_steps: int
    shared_before: Sequence[Mapping[str, object]]


class TrainMetrics(TrainedMetrics, total=False):
    """Supervised training; `imported`: where the adapter is from, if nothing was trained."""

    fused_adapters: bool
    compiled: bool
    batch_rows: int
    micro_batch_rows: int
    held_out_rows: int
    held_out_loss: float | None
    held_out_best_loss: float | None
    held_out_best_step: int | None
    stopped_early: bool
    imported: str
    tensors: int


class AlignMetrics(TrainedMetrics, total=False):
    """Preference training; the figures of preference.json are there, too."""

    method: str
    loss_type: str
    batch_pairs: int
    micro_batch_pairs: int
    accuracy: float
    accuracy_interval: Interval


class EvaluateMetrics(TypedDict, total=False):
    """Perplexities of base and adapter on held-out rows, use of the prompt, and generated answers."""

    rows: int
    tokens: int
    perplexity_base: float
    perplexity_base_interval: Interval | None
    perplexity_adapter: float
    perplexity_adapter_interval: Interval | None
    perplexity_ratio: float
    perplexity_ratio_interval: Interval | None
    nll_true: float
    nll_shuffled: float | None
    nll_difference_interval: Interval | None
    generations: int
    stop_rate: float | None
    stop_rate_base: float | None
    metrics: Mapping[str, Any]
    tasks: Mapping[str, Any]
    tasks_harness: str
    judge: Mapping[str, Any]


class CertifyMetrics(TypedDict, total=False):
    """The chosen merge against what was trained, in `tokens` supervised positions."""

    base: str
    perplexity_trained: float
    perplexity_merged: float
    mean_kl: float
    agreement: float
    rows: int
    tokens: int


class MergeMetrics(TypedDict, total=False):
    """The merged model."""

    base: str
    dtype: str
    tensors: int
    changed_tensors: int
    bytes: int
    files: int
    peak_anon_bytes: int | None
    seconds: float


class ExportMetrics(TypedDict, total=False):
    """Exported files; the mappings have an entry for each file or kind."""

    bytes: dict[str, int]
    bits_per_weight: Mapping[str, float]
    tokenizer_exact: bool
    tokenizer_differs: Any
    ollama_template: Any
    reload_difference: Mapping[str, float]
    not_loaded: str
    perplexity: Mapping[str, float]
    agreement: Mapping[str, float]
    mean_kl: Mapping[str, float]
    perplexity_rows: int
    perplexity_tokens: int
    perplexity_unknown: str


class RunMetrics(TypedDict, total=False):
    """Stage → its metrics; a stage that is off or has not run is absent or empty."""

    base: BaseMetrics
    generate: GenerateMetrics
    ingest: IngestMetrics
    filter: FilterMetrics
    embed: EmbedMetrics
    dedup: DedupMetrics
    decontaminate: DecontaminateMetrics
    sample: SampleMetrics
    split: SplitMetrics
    render: RenderMetrics
    pack: PackMetrics
    pairs: PairsMetrics
    train: TrainMetrics
    align: AlignMetrics
    evaluate: EvaluateMetrics
    certify: CertifyMetrics
    merge: MergeMetrics
    export: ExportMetrics
