"""Recipe sections about where results go: publication, experiment tracking.

The string below a field is its documentation, as in recipe/data.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune.recipe.data import REPOSITORY, Section


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
