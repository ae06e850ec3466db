"""A first model card, made of what was measured and nothing else.

Everything that comes from a recipe, a file or a measurement is escaped for Markdown; the recipe is quoted in a code
block whose fence no content can close. Metadata: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.backends.secrets import find_secrets
from finetune.errors import InputError
from finetune.recipe import HubSource, LocalSource, Recipe

if TYPE_CHECKING:
    import jinja2

# A model merged into one base is a finetune of it; the Hub's "merge" means several models made into one.
RELATION = {"adapter": "adapter", "merged": "finetune"}
LIBRARY = {"adapter": "peft", "merged": "transformers"}
FUNNEL = ("ingest", "filter", "dedup", "decontaminate", "sample", "split")
ROWS = ("rows_out", "rows", "rows_kept", "kept", "train_rows")
EVALUATION = ("perplexity_base", "perplexity_adapter", "perplexity_merged", "stop_rate")
LONGEST_LIST = 12

_TEMPLATE = """\
---
{{ metadata }}
---

# {{ repo }}

{{ summary }}

- Base: {{ base_words }}
- Kind: {{ kind_words }}
{%- if template %}
- Chat template: {{ template.name | code }}, sha256 {{ template.sha256 | code }}; a turn ends with token \
{{ template.terminators | code }}
{%- endif %}

## Data

{% if sources %}
{%- for source in sources %}
- {{ source }}
{%- endfor %}
{% endif %}
{%- if funnel %}
| stage | rows left | what happened |
|---|---:|---|
{%- for stage, rows, detail in funnel %}
| {{ stage | code }} | {{ rows }} | {{ detail }} |
{%- endfor %}
{% endif %}
## Training
{% if training %}
| figure | value |
|---|---:|
{%- for name, value in training %}
| {{ name | code }} | {{ value }} |
{%- endfor %}
{% else %}
No figures were recorded.
{% endif %}
## Evaluation
{% if evaluation %}
On held-out rows of the same data. Perplexity is exp(sum of negative log-likelihoods / supervised tokens); `stop_rate` \
is the share of greedy generations that end by themselves.

| figure | value |
|---|---:|
{%- for name, value in evaluation %}
| {{ name | code }} | {{ value }} |
{%- endfor %}
{% else %}
Not evaluated.
{% endif %}
## Certificate

{{ certificate }}

## How to load it
{% if load_note %}
{{ load_note }}
{% endif %}
{{ load | fence("python") }}

## Limits

{% for limit in limits -%}
- {{ limit }}
{% endfor %}
## Recipe

{{ recipe_text | fence("yaml") }}
"""


class Markdown(str):
    """Text that is Markdown already and must not be escaped again."""

    __slots__ = ()


def model_card(
    *,
    kind: Literal["adapter", "merged"],
    repo: str,
    recipe: Recipe,
    recipe_text: str,
    metrics: Mapping[str, Mapping[str, Any]],
    base: Mapping[str, Any],
    certificate: Mapping[str, Any] | None = None,
    template: Mapping[str, Any] | None = None,
) -> str:
    """The README.md of a push.

    Args:
        kind: what is pushed.
        repo: the repository's id on the Hub.
        recipe: what was run.
        recipe_text: the recipe as it was written; local folders in it are shortened to `…/NAME`.
        metrics: stage → what the stage measured; absent or empty where it did not run.
        base: `base.json`: id, kind, revision, parameters.
        certificate: `certificate.json`, if the merge was certified.
        template: `template.json`: name, sha256, terminators (token ids).

    Raises:
        InputError: something in the recipe or the figures looks like a credential.
    """
    if found := find_secrets(recipe_text):
        raise InputError(f"the recipe would be published with {found[0]}: take it out (a token belongs in HF_TOKEN)")
    load_note, load = _loading(kind, repo, recipe, base, template)
    card = _template().render(
        metadata=Markdown(_metadata(kind, recipe, base)),
        repo=repo,
        summary=_summary(kind, recipe, base),
        base_words=_base_words(base),
        kind_words=_kind_words(kind, recipe),
        template=template,
        sources=[_source_words(s) for s in recipe.data],
        funnel=_funnel(metrics),
        training=_figures(metrics.get("train") or {}),
        evaluation=_evaluation(metrics),
        certificate=_certificate_words(certificate),
        load_note=load_note,
        load=load,
        limits=_limits(kind, recipe, certificate, metrics),
        recipe_text=_without_folders(recipe_text, recipe),
    )
    if found := find_secrets(card):
        raise InputError(f"the model card would be published with {found[0]}: look for it in what the run measured")
    return card


def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 - jinja2 escapes HTML; `finalize` escapes Markdown, with its HTML
        undefined=jinja2.StrictUndefined, finalize=_escaped, keep_trailing_newline=True
    )
    environment.filters.update(code=_code, fence=_fence)
    return environment.from_string(_TEMPLATE)


def _metadata(kind: str, recipe: Recipe, base: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    on_hub = base["kind"] == "hub"
    datasets = list(dict.fromkeys(s.id for s in recipe.data if isinstance(s, HubSource)))
    tags = ["lora", "sft", "text-generation"] + (["qlora"] if recipe.quantization else [])
    card = ModelCardData(
        base_model=base["id"] if on_hub else None,
        library_name=LIBRARY[kind],
        pipeline_tag="text-generation",
        license=recipe.publish.license,
        datasets=datasets or None,
        tags=tags,
    )
    if on_hub:
        card["base_model_relation"] = RELATION[kind]
    return card.to_yaml()


def _summary(kind: str, recipe: Recipe, base: Mapping[str, Any]) -> str:
    trained = "QLoRA" if recipe.quantization else "LoRA"
    what = "adapter for" if kind == "adapter" else "fine-tune of"
    return f"{recipe.name}: a {trained} {what} {base['id']}, trained by supervised fine-tuning."


def _base_words(base: Mapping[str, Any]) -> Markdown:
    size = f", {base['parameters']:,} parameters" if "parameters" in base else ""
    if base["kind"] == "hub":
        link = f"[{_escaped(base['id'])}](https://huggingface.co/{base['id']})"
        return Markdown(f"{link} at revision {_code(base.get('revision') or 'unknown')}{size}")
    return Markdown(f"{_code(base['id'])}, which is not on the Hub{size}")


def _kind_words(kind: str, recipe: Recipe) -> str:
    if kind == "merged":
        return "the whole model, the adapter merged into its weights"
    lora, quantization = recipe.lora, recipe.quantization
    stored = f"{quantization.type}{' with double quantisation' if quantization.double else ''}" if quantization else ""
    over = f", trained over the base in {stored}" if stored else ""
    return f"a LoRA adapter of rank {lora.r}, alpha {_number(lora.alpha)}, on {lora.targets}{over}"


def _source_words(source: Any) -> Markdown:  # noqa: ANN401 - one of the recipe's sources
    weight = f", weight {_number(source.weight)}" if source.weight != 1 else ""
    if isinstance(source, HubSource):
        where = f"[{_escaped(source.id)}](https://huggingface.co/datasets/{source.id}), split {_code(source.split)}"
        at = f", revision {_code(source.revision)}" if source.revision else ""
        return Markdown(where + at + weight)
    if isinstance(source, LocalSource):
        return Markdown(f"a local file, {_code(source.label)}{weight}")
    return Markdown(f"{_code(source.label)}{weight}")


def _funnel(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(stage, rows left, the other figures) of every data stage that ran, in order."""
    lines = []
    for stage in FUNNEL:
        if figures := metrics.get(stage):
            key = next((k for k in ROWS if isinstance(figures.get(k), int)), None)
            rest = [f"{n} {v}" for n, v in _figures({k: v for k, v in figures.items() if k != key})]
            lines.append((stage, _number(figures[key]) if key else "", "; ".join(rest[:LONGEST_LIST])))
    return lines


def _evaluation(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    figures = {**metrics.get("certify", {}), **metrics.get("evaluate", {})}
    first = {k: figures[k] for k in EVALUATION if k in figures}
    return _figures({**first, **{k: v for k, v in metrics.get("evaluate", {}).items() if k not in first}})


def _figures(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and formatted values of what was measured: counts are joined into a line, an interval is a range."""
    lines = []
    for name, value in values.items():
        if isinstance(value, int) and name.endswith("_bytes") and value >= 10**8:
            lines.append((name, f"{value / 1e9:.2f} GB"))
        elif text := _shown(value):
            lines.append((name, text))
    return lines


def _shown(value: object) -> str:
    """A scalar, a pair of numbers or a mapping of those; "" for what has no short form."""
    if isinstance(value, Mapping):
        parts = [f"{key} {text}" for key, inner in value.items() if (text := _shown(inner))]
        return ", ".join(parts[:LONGEST_LIST])
    if isinstance(value, (list, tuple)):
        return " to ".join(_number(v) for v in value) if len(value) == 2 else ""
    return _number(value) if isinstance(value, (str, int, float)) else ""


def _number(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _certificate_words(certificate: Mapping[str, Any] | None) -> str:
    if certificate is None:
        return "There is none: how far a merged model is from what was trained was not measured."
    if certificate.get("words"):
        return f"The adapter, {certificate['words']}."
    into = {
        "original": "the base's original 16-bit weights",
        "dequantized": "the base as the adapter saw it in training, dequantised from 4 bits",
    }.get(str(certificate.get("base")), str(certificate.get("base")))
    words = f"The adapter is merged into {into}."
    named = (
        ("perplexity_trained", "perplexity as trained"),
        ("perplexity_merged", "as merged"),
        ("mean_kl", "mean KL divergence between the two"),
        ("agreement", "share of equal next-token choices"),
    )
    measured = [f"{label} {_number(certificate[k])}" for k, label in named if certificate.get(k) is not None]
    return f"{words} Measured on held-out rows: {', '.join(measured)}." if measured else words


def _loading(
    kind: str, repo: str, recipe: Recipe, base: Mapping[str, Any], template: Mapping[str, Any] | None
) -> tuple[str, str]:
    """A note on what is needed, and Python that loads the push and answers one question."""
    lines = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    note, options, on_hub = "", ['device_map="auto"'], base["kind"] == "hub"
    if kind == "adapter":
        lines.append("from peft import PeftModel")
        if recipe.quantization:
            lines[1] += ", BitsAndBytesConfig"
            lines.append(
                f"four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={recipe.quantization.type!r}, "
                f"bnb_4bit_use_double_quant={recipe.quantization.double}, bnb_4bit_compute_dtype=torch.bfloat16)"
            )
            options.append("quantization_config=four_bit")
        if on_hub and base.get("revision"):
            options.append(f"revision={base['revision']!r}")
        if not on_hub:
            note = f"The base {base['id']} is not on the Hub: put the folder it lies in here in place of its name."
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({base['id']!r}, {', '.join(options)})")
        lines.append(f"model = PeftModel.from_pretrained(model, {repo!r})")
    else:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained({repo!r}, dtype="auto", {options[0]})')
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({repo!r})")
    if template:
        lines.append('messages = [{"role": "user", "content": "What is a file descriptor?"}]')
        lines.append("inputs = tokenizer.apply_chat_template(")
        lines.append('    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"')
        lines.append(").to(model.device)")
        ends = f", eos_token_id={list(template['terminators'])!r}"
    else:
        lines.append('inputs = tokenizer("What is a file descriptor?", return_tensors="pt").to(model.device)')
        ends = ""
    lines.append(f"answer = model.generate(**inputs, max_new_tokens=256{ends})")
    lines.append('print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))')
    return note, "\n".join(lines)


def _limits(
    kind: str, recipe: Recipe, certificate: Mapping[str, Any] | None, metrics: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    limits = [
        f"Trained on sequences of at most {recipe.render.max_length_tokens:,} tokens; longer ones were not tried.",
        "Neither truthfulness, nor safety, nor any public benchmark was measured.",
        "The base's own licence and limits apply.",
    ]
    if recipe.publish.license is None:
        limits.append("No licence was stated for this repository.")
    if not metrics.get("evaluate"):
        limits.append("Nothing was measured on held-out rows.")
    if kind == "merged" and certificate is None:
        limits.append("The merge is not certified.")
    return limits


def _without_folders(text: str, recipe: Recipe) -> str:
    """The recipe's text with the local folders it names shortened: where files lie is nobody else's business."""
    sources = [*recipe.data, *(recipe.decontaminate.against if recipe.decontaminate else [])]
    paths = [s.path for s in sources if isinstance(s, LocalSource)]
    paths += [p for p in (recipe.model.folder, recipe.render.template_file) if p is not None]
    if recipe.dedup and (recipe.dedup.embedding or "").startswith(("/", "~")):
        paths.append(Path(recipe.dedup.embedding or "").expanduser())
    for path in sorted(paths, key=lambda p: -len(str(p))):
        written = [str(path)]
        if path.is_relative_to(Path.home()):
            written.append(f"~/{path.relative_to(Path.home())}")
        for form in written:
            text = text.replace(form, f"…/{path.name}")
    return text


def _escaped(value: object) -> str:
    """`value` as plain text in Markdown: no emphasis, link, HTML, table border or line break can come from it."""
    if isinstance(value, Markdown):
        return value
    text = re.sub(r"\s+", " ", str(value))
    text = re.sub(r"([\\`*\[\]<|])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def _code(value: object) -> Markdown:
    """`value` as a code span, fit for a table cell."""
    text = re.sub(r"\s+", " ", str(value)).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markdown(f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`")


def _fence(value: object, language: str) -> Markdown:
    """`value` as a code block that nothing inside it can close."""
    text = str(value).strip("\n")
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markdown(f"{ticks}{language}\n{text}\n{ticks}")
