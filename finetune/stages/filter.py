"""Leave out rows by the recipe's rules; every one that is left out is written down with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from finetune.context import Context
from finetune.data.records import Example, Reject, RowRange, batches, reject_writer, row_ranges, write_rows
from finetune.engine.local import Local
from finetune.errors import GateRefused, InputError
from finetune.filters import basic, custom
from finetune.filters.registry import rules_of
from finetune.metrics import FilterMetrics, Headline
from finetune.recipe import Filter, Recipe, Section
from finetune.recipe.filters import Own

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000  # tokenised at once
COMPARED = 20  # texts of a batch that are tokenised in both ways
PART_ROWS = 4000  # judged by one worker at a time

Count = Callable[[Sequence[Example]], list[int | basic.Verdict]]
"""For each row its tokens, or why it has no count."""


class Rendering(Section):
    """The fields of the render section that determine a rendered row's length."""

    template: str
    merge_system: bool
    reasoning: Literal["auto", "keep", "last", "strip"] = "auto"
    template_file: Annotated[Path | None, Field(exclude=True)] = None


class Spec(Section):
    """The rules, and the template if they count rendered tokens."""

    rules: Filter
    rendering: Rendering | None = None


def spec(recipe: Recipe) -> Spec | None:
    """None if the recipe keeps every row."""
    rules, render = recipe.filter, recipe.render
    if rules is None:
        return None
    if rules.count == "raw" or (rules.max_length_tokens is None and rules.min_length_tokens is None):
        return Spec(rules=rules)
    merge = render.system == "merge"
    return Spec(
        rules=rules,
        rendering=Rendering(
            template=render.template,
            merge_system=merge,
            reasoning=render.reasoning,
            template_file=render.template_file,
        ),
    )


def fingerprint(spec: Spec) -> dict[str, object]:
    """The digests of a template and of own rules' files that the recipe names; the base's own is part of the base."""
    own = {rule.function: custom.digest(rule) for rule in spec.rules.rules if isinstance(rule, Own)}
    outside: dict[str, object] = {"own_rules": own} if own else {}
    if spec.rendering is None or spec.rendering.template == "auto":
        return outside
    from finetune.tokenization.chat_template import fingerprint_of

    return outside | fingerprint_of(spec.rendering.template, spec.rendering.template_file)


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> FilterMetrics:
    """Write rows.parquet and rejects.parquet. Raises GateRefused if no row is left."""
    parts = row_ranges(inputs["ingest"] / "rows.parquet", PART_ROWS)
    seen = parts[-1].stop if parts else 0
    rejected: Counter[str] = Counter()
    first = ""

    def kept(reject: Callable[[Reject], None]) -> Iterator[Example]:
        nonlocal first
        own = any(isinstance(rule, Own) for rule in spec.rules.rules)  # may keep state from row to row
        engine = Local(1) if own else ctx.engine
        judged = engine.map(partial(judge_of, spec, inputs.get("base")), parts, seen)
        for rows, rejects in ctx.track(judged, "filtering", len(parts)):
            yield from rows
            for failure in rejects:
                reject(failure)
                rejected[failure.reason] += 1
                first = first or f"; the first is {failure.id}: {failure.detail}"

    with reject_writer(out / "rejects.parquet") as reject:
        rows_out = write_rows(out / "rows.parquet", kept(reject))
    if not rows_out:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in rejected.most_common())
        raise GateRefused(
            f"the filter leaves none of {seen} rows ({reasons or 'there were none'}){first}; loosen filter"
        )
    ctx.say(f"filter keeps {rows_out:,} of {seen:,} rows")
    return {"rows_in": seen, "rows_out": rows_out, "rejected": dict(sorted(rejected.items()))}


def headline(m: FilterMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    return Headline(", ".join(f"{n:,} {reason}" for reason, n in m["rejected"].items()), m["rows_in"], m["rows_out"])


def judge_of(spec: Spec, base: Path | None) -> Callable[[RowRange], tuple[list[Example], list[Reject]]]:
    """Return the function from a range of rows to those that stay and those that do not, in their order."""
    judge = rules_of(spec.rules)
    least, most = spec.rules.min_length_tokens, spec.rules.max_length_tokens
    count = None if base is None or (least is None and most is None) else counter(spec, base)

    def judged(part: RowRange) -> tuple[list[Example], list[Reject]]:
        kept: list[Example] = []
        rejects: list[Reject] = []
        for batch in batches(part.read(), BATCH_ROWS):
            verdicts = [judge(row) for row in batch]
            if count is not None:
                open_rows = [i for i, verdict in enumerate(verdicts) if verdict is None]
                for i, length in zip(open_rows, count([batch[i] for i in open_rows]), strict=True):
                    verdicts[i] = basic.tokens_outside(length, least, most) if isinstance(length, int) else length
            for row, verdict in zip(batch, verdicts, strict=True):
                if verdict is None:
                    kept.append(row)
                else:
                    rejects.append(Reject.of(row, verdict.reason, verdict.detail, verdict.value, verdict.limit))
        return kept, rejects

    return judged


def counter(spec: Spec, base: Path) -> Count:
    """How tokens are counted, by the tokenizer in the base's folder.

    raw: the tokens of each turn's text, summed, without special tokens. rendered: the tokens of the whole chat as the
    template writes it; a raw text has no template and is counted raw.
    """
    from finetune.models.loading import load_tokenizer

    tokenizer = load_tokenizer(base)
    if spec.rendering is None:
        return lambda rows: raw_tokens(rows, tokenizer)
    render = chat_renderer(spec.rendering, tokenizer)

    def count(rows: Sequence[Example]) -> list[int | basic.Verdict]:
        texts = [render(row) for row in rows]
        lengths = iter(_lengths([text for text in texts if isinstance(text, str)], tokenizer))
        return [next(lengths) if isinstance(text, str) else text for text in texts]

    return count


def chat_renderer(rendering: Rendering, tokenizer: PreTrainedTokenizerBase) -> Callable[[Example], str | basic.Verdict]:
    """From a row to its text under the template, or to the reason why the template refuses it."""
    from finetune.tokenization.chat import chat_of
    from finetune.tokenization.chat_template import JinjaRenderer, base_template, template_text, tools_of
    from finetune.tokenization.template_profile import TemplateProfile
    from finetune.tokenization.template_sandbox import check_template

    if rendering.template != "auto":
        template, tool_use = template_text(rendering.template, rendering.template_file), None
    else:
        template, tool_use = base_template(tokenizer)
    special = tokenizer.special_tokens_map
    for text in filter(None, (template, tool_use)):
        check_template(text, special, "the chat template that filter.count: rendered uses")
    second = JinjaRenderer(tool_use, special) if tool_use else None
    try:
        profile = TemplateProfile(JinjaRenderer(template, special), second, reasoning=rendering.reasoning)
    except InputError as error:
        raise GateRefused(f"filter.count: rendered: {error}; set render.template to another") from None

    def render(row: Example) -> str | basic.Verdict:
        if row.text is not None:
            return row.text
        chat = chat_of(row.messages)
        if not rendering.merge_system and not profile.takes_system and chat and chat[0]["role"] == "system":
            return basic.Drop("template", "the template has no place for a system message")
        try:
            return profile.write(profile.adapt(chat), False, tools_of(row))[0]
        except InputError as error:
            return basic.Drop("template", str(error))

    return render


def raw_tokens(rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[int | basic.Verdict]:
    """Tokens of each row's turns and of their tool calls, each tokenised by itself without special tokens, summed."""
    texts = [[*basic.contents(row), *(m.extra for m in row.messages if m.extra)] for row in rows]
    lengths = iter(_lengths([text for turns in texts for text in turns], tokenizer))
    return [sum(islice(lengths, len(turns))) for turns in texts]


def _lengths(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not texts:
        return []
    from finetune.tokenization.encoder import watched_batch

    def encode(batch: list[str]) -> list[list[int]]:
        made = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = made["input_ids"]
        return ids

    def count(batch: list[str]) -> list[int]:
        whole = [len(ids) for ids in encode(batch[:COMPARED])]  # also makes the backend neither cut nor pad
        if not tokenizer.is_fast:
            return whole + [len(ids) for ids in encode(batch[COMPARED:])]
        # Without offsets and lists of ids: two thirds of the time.
        fast = [len(made) for made in tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
        return fast if fast[:COMPARED] == whole else [len(ids) for ids in encode(batch)]

    return watched_batch(count, texts)
