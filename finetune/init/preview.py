"""One row as the model will see it, with its labels marked, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.context import Context
from finetune.data.records import Example
from finetune.errors import FinetuneError
from finetune.pipeline import runner
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.utils.format import visible

MOST = 1200  # characters shown


def preview(recipe: Recipe, row: Example, store: Store) -> str:
    """Return the row rendered by the base's template, or its turns if the base's tokenizer cannot be had.

    The tokenizer of a base on the Hub is read from the cache or downloaded, a few megabytes.
    """
    why = "its tokens are shown by the run, once the base is here"
    try:
        base = _base_folder(recipe, store)
    except FinetuneError as error:
        base, why = None, f"{why}: {error}"
    if base is not None and row.text is None:
        try:
            text, labels, count = _rendered(recipe, row, base)
        except FinetuneError as error:
            return f"first row: not rendered: {error}"
        return f"first row as the model sees it, {labels} of {count} tokens learned (»…«):\n{_short(text)}"
    turns = [
        f"{m.role}: " + (f"»{m.content}«" if m.role == "assistant" and m.learn else m.content) for m in row.messages
    ]
    text = "\n".join(turns) if row.text is None else f"»{row.text}«"
    return f"first row, the learned text between » and « ({why}):\n{_short(text)}"


def _short(text: str) -> str:
    text = visible(text)
    return text if len(text) <= MOST else f"{text[: MOST // 2]} … {text[-MOST // 2 :]}"


def _base_folder(recipe: Recipe, store: Store) -> Path | None:
    """The base's folder with a tokenizer: the recipe's own, that of a finished base stage, or what the Hub has.

    Raises FinetuneError if the Hub cannot be reached and the cache does not hold it, InputError for a base that is not
    there or that this account may not read.
    """
    if recipe.model.folder is not None:
        return recipe.model.folder if any(recipe.model.folder.glob("tokenizer*")) else None
    if recipe.model.kind == "hub":
        from finetune.hub.client import resolve_revision
        from finetune.models.loading import hub_snapshot

        ctx = Context(store.scratch, recipe.runtime, recipe.tracking)
        revision = resolve_revision(recipe.model.id, recipe.model.revision, scratch=store.scratch)
        return hub_snapshot(recipe.model, revision, ctx, weights=False)
    step = next(s for s in runner.plan(recipe, store) if s.stage.name == "base")
    return step.folder if step.manifest else None


def _rendered(recipe: Recipe, row: Example, base: Path) -> tuple[str, int, int]:
    from finetune.models.loading import load_tokenizer
    from finetune.stages.render import _rules
    from finetune.tokenization.audit import Tally
    from finetune.tokenization.chat_template import choose_template
    from finetune.tokenization.encoder import Encoder
    from finetune.tokenization.inspection import marked
    from finetune.tokenization.row_tokenizer import RowTokenizer

    spec = recipe.render
    tokenizer: Any = load_tokenizer(base)  # PreTrainedTokenizerBase, whose decode has a wider type
    template = choose_template(spec.template, spec.template_file, tokenizer, [row], spec.system, spec.reasoning, base)
    row_tokenizer = RowTokenizer(template, Encoder(tokenizer), _rules(spec, tokenizer, template))
    rows = row_tokenizer.batch([row], Tally())
    if not rows:
        raise FinetuneError(f"row {row.id} does not fit {spec.max_length_tokens} tokens or has no answer to learn")
    ids, mask = list(rows[0].ids), [int(m) for m in rows[0].mask]
    return marked(tokenizer, ids, mask), sum(mask), len(ids)
