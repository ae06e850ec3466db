"""Recipe sections about where results go: exported formats, publication, experiment tracking.

The string below a field is its documentation, as in recipe/data.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune.recipe.data import REPOSITORY, Contradiction, Section

GgufKind = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip
HfKind = Literal["fp8", "w4a16", "nf4"]


class Export(Section):
    """Other formats of the merged model: at least one of gguf and hf."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": [n], "properties": {n: {"minItems": 1}}} for n in ("gguf", "hf")]}
    )
    gguf: list[GgufKind] = []
    """GGUF files for llama.cpp and Ollama, one per kind; the Modelfile names the first. q…_k… need llama-quantize."""
    hf: list[HfKind] = []
    """Quantised folders for vLLM and transformers: fp8 and w4a16 (compressed-tensors), nf4 (bitsandbytes)."""
    perplexity_rows: Annotated[int, Field(ge=0)] = 256
    """Held-out rows to score merged model and files on, at most (0: none); from 200 M parameters on, certify.tokens."""
    max_perplexity_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.5
    """Stop (exit 3) if a file's perplexity / the merged model's is larger; 1000 lets every finite one pass."""

    def _contradictions(self) -> Iterator[Contradiction]:
        if not self.gguf and not self.hf:
            yield (), "names no format; write gguf: [q8_0], hf: [fp8], or set export: null"


class Publish(Section):
    """Target and contents of `finetune publish`."""

    repo: Annotated[str, Field(pattern=REPOSITORY, max_length=200)] | None = None
    """OWNER/NAME of the repository; null requires --repo."""
    what: Annotated[
        list[Literal["adapter", "merged", "gguf", "fp8", "w4a16", "nf4", "dataset"]], Field(min_length=1)
    ] = ["adapter"]
    """Kinds to push: the first to `repo`, each other one to the same name with its kind appended."""
    private: bool = True
    """Create the repository as private."""
    license: str | None = None
    """Licence in the cards, such as apache-2.0; if null, a base whose licence forbids derivatives is refused."""
    samples: Annotated[int, Field(ge=0, le=10)] | None = None
    """Held-out prompts in a model card with both answers; null: 3, but none if any source is a local file."""


Reporter = Literal[  # transformers' integrations, without W&B and TensorBoard, which have fields of their own
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune",
    "swanlab", "trackio",
]  # fmt: skip


class Tracking(Section):
    """Experiment tracking, in addition to metrics.jsonl, which is always written."""

    wandb: bool = False
    """Send metrics to Weights & Biases."""
    wandb_project: Annotated[str, Field(pattern=r"^[^/\\#?%:\x00-\x1f\x7f-\x9f]{1,128}$")] = "finetune"
    """The W&B project: up to 128 characters, none of / \\ # ? % : in it, as W&B demands."""
    wandb_rows: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Number of first training rows sent to W&B as a table; 0: none."""
    wandb_data: bool = False
    """Send the training rows to W&B as an artifact (packed if pack is on)."""
    tensorboard: bool = False
    """Write TensorBoard event files."""
    report_to: list[Reporter] = []
    """Further trackers, by the names of transformers' `report_to`; each needs its own package and settings."""
