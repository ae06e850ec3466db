"""Build the README.md of a push from measurements only.

Everything that comes from a recipe, a file or a measurement is escaped for Markdown; the recipe and the answers are
quoted in code blocks whose fences no content can close. Metadata: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import InputError
from finetune.eval.metrics import never_stops
from finetune.eval.verdict import BAD, REPEATS, few_steps
from finetune.hub.client import HF_KINDS, Kind
from finetune.preference.words import figures_of
from finetune.publish import card_sections as sections
from finetune.publish.adapter_summary import trained
from finetune.publish.card_curve import training_curve
from finetune.publish.facts import Card, Facts
from finetune.publish.markdown import Markdown, code, escaped, fence
from finetune.recipe import HubSource, Recipe
from finetune.utils.format import duration, number
from finetune.utils.secrets import find_secrets

if TYPE_CHECKING:
    import jinja2

# A model merged into one base is a finetune of it; the Hub's "merge" means a merge of several models.
RELATION = {"adapter": "adapter", "merged": "finetune", **dict.fromkeys(("gguf", *HF_KINDS), "quantized")}
LIBRARY = {"adapter": "peft", "gguf": "gguf", **dict.fromkeys(("merged", *HF_KINDS), "transformers")}
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
CURVE = "assets/training.svg"
CARDS = Path(__file__).parent / "cards"
COLUMNS = {
    "id": "SOURCE:N, the N-th row of that source, counted from 1",
    "source": "the source's name",
    "messages": "the turns in order, each with `role` (system, user, assistant, tool) and `content`",
    "text": "the whole of a raw-text row, whose messages are empty",
    "tools": "the tools on offer, as JSON",
}


def write_card(kind: Kind, repo: str, facts: Facts) -> Card:
    """Return the README.md of one push, and the files it shows.

    Args:
        kind: what is pushed.
        repo: the repository's id on the Hub.
        facts: the run. Local folders in the recipe's text are shortened to `…/NAME`.

    Raises:
        InputError: something in the recipe, the answers or the figures looks like a credential.
    """
    if secrets := find_secrets(facts.recipe_text):
        raise InputError(f"the recipe would be published with {secrets[0]}: remove it (a token belongs in HF_TOKEN)")
    curve, words = (b"", "") if kind == "dataset" else training_curve(facts.steps)
    text = _dataset_card(repo, facts) if kind == "dataset" else _model_card(kind, repo, facts, words)
    if secrets := find_secrets(text):
        raise InputError(f"the model card would be published with {secrets[0]}: remove it from the run's files")
    return Card(text, {CURVE: curve} if curve else {})


def _model_card(kind: Kind, repo: str, facts: Facts, curve_words: str) -> str:
    recipe, measured, train = facts.recipe, facts.metrics.get("evaluate") or {}, facts.metrics.get("train") or {}
    refusal = facts.verdict.refusal if facts.verdict else ""
    evaluation, measured_on = sections.evaluation(facts.metrics)
    siblings = [(f"Also published, {other}", where) for other, where in facts.siblings.items() if other != kind]
    return _template("model.jinja").render(
        metadata=Markdown(_metadata(kind, repo, facts)),
        repo=repo,
        kind=kind,
        name=recipe.name,
        base=facts.base,
        lora=recipe.lora,
        quantization=recipe.quantization,
        gguf=recipe.export.gguf if recipe.export else [],
        longest=recipe.render.max_length_tokens,
        licence=recipe.publish.license,
        measured=measured,
        certified=facts.certificate is not None,
        exported=(facts.metrics.get("export") or {}) if kind in ("gguf", *HF_KINDS) else {},
        never_stops=never_stops(measured, "Give a limit of new tokens."),
        base_words=sections.base_words(facts.base, facts.licences),
        template=facts.template,
        siblings=siblings,
        sources=sections.sources(facts),
        funnel=sections.funnel(facts.metrics),
        curve=CURVE,
        curve_words=curve_words,
        trained=trained(recipe),
        train=train,
        seconds=facts.seconds,
        versions={name: facts.versions[name] for name in LIBRARIES if name in facts.versions},
        refusal=refusal,
        few_steps=isinstance(train.get("steps"), int) and few_steps(train["steps"]),
        memorised=not refusal.startswith(REPEATS)
        and any(line.question == "Memorised?" and line.level == BAD for line in sections.verdict_lines(facts)),
        training=sections.training(facts.metrics),
        preference=figures_of(facts.metrics.get("align") or {}),
        evaluation=evaluation,
        verdict=sections.verdict_lines(facts),
        measured_on=Markdown(measured_on),
        samples=sections.samples(facts),
        certificate=sections.certificate_words(facts.certificate),
        recipe_text=sections.without_folders(facts.recipe_text, facts.recipe),
    )


def _dataset_card(repo: str, facts: Facts) -> str:
    columns = dict.fromkeys(name for split in facts.rows.values() for name in split["columns"])
    return _template("dataset.jinja").render(
        metadata=Markdown(_dataset_metadata(facts)),
        repo=repo,
        name=facts.recipe.name,
        sources=sections.sources(facts),
        funnel=sections.funnel(facts.metrics),
        splits=[(split, number(counts["rows"])) for split, counts in facts.rows.items()],
        columns=[(name, Markdown(COLUMNS[name])) for name in columns],
        load=f"from datasets import load_dataset\n\nrows = load_dataset({repo!r})\nprint(rows)",
        recipe_text=sections.without_folders(facts.recipe_text, facts.recipe),
    )


def _template(name: str) -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 - jinja2 escapes HTML; `finalize` escapes Markdown, with its HTML
        loader=jinja2.FileSystemLoader(CARDS),
        undefined=jinja2.StrictUndefined,
        finalize=escaped,
        keep_trailing_newline=True,
    )
    literal, verbatim = (lambda value: Markdown(repr(value))), Markdown
    environment.filters.update(
        code=code, duration=duration, fence=fence, literal=literal, number=number, verbatim=verbatim
    )
    return environment.get_template(name)


def _metadata(kind: Kind, repo: str, facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    recipe, on_hub = facts.recipe, facts.base["kind"] == "hub"
    merged = facts.siblings.get("merged") if RELATION[kind] == "quantized" else None
    base = merged or (facts.base["id"] if on_hub else None)  # it is a quantisation of the merged model
    methods = [*(["sft"] if recipe.train else []), *([recipe.preference.method] if recipe.preference else [])]
    tags = ["lora", *(methods or ["sft"]), "text-generation"] + (["qlora"] if recipe.quantization else [])
    results = sections.results(kind, facts)
    card = ModelCardData(
        base_model=base,
        library_name=LIBRARY[kind],
        pipeline_tag="text-generation",
        license=recipe.publish.license,
        datasets=_datasets(recipe) or None,
        tags=[*tags, "gguf"] if kind == "gguf" else tags,
        model_name=repo.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    if base:
        card["base_model_relation"] = RELATION[kind]
    return card.to_yaml()


def _dataset_metadata(facts: Facts) -> str:
    from huggingface_hub import DatasetCardData

    files = [{"split": split, "path": f"data/{split}.parquet"} for split in facts.rows]
    card = DatasetCardData(
        license=facts.recipe.publish.license,
        task_categories=["text-generation"],
        size_categories=[_size(sum(counts["rows"] for counts in facts.rows.values()))],
        source_datasets=_datasets(facts.recipe) or None,
        tags=["sft", "curated"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    return card.to_yaml()


def _size(rows: int) -> str:
    """Return the Hub's size category for a number of rows."""
    ends = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6))
    return next((name for name, end in ends if rows < end), "1M<n<10M")


def _datasets(recipe: Recipe) -> list[str]:
    return list(dict.fromkeys(s.id for s in recipe.data if isinstance(s, HubSource)))
