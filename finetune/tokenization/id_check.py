"""Compare token ids with the base's own apply_chat_template, without the encoder that made them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from finetune.data.records import Example
from finetune.errors import GateRefused, InputError
from finetune.tokenization.audit import check_ids, check_special_counts
from finetune.tokenization.chat_template import TEMPLATE_FAULTS, Template, tools_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.tokenization.rendering import Rendered
    from finetune.tokenization.row_tokenizer import RowTokenizer


class IdCheck:
    """Counts rows whose ids are those of the base's own apply_chat_template, and refuses the others.

    Rows with a typed string of a special token are compared by their count of special ids, since there the base's own
    function would make a token of the text. Rows that differ from the template on purpose (render.reasoning: keep, an
    opened reasoning block) are compared up to the end of their last prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, meant: Collection[str] = ()) -> None:
        self._tokenizer: Any = tokenizer
        self._template = template
        added = tokenizer.added_tokens_decoder.items()
        self._special = {t.content: i for i, t in added if t.special and t.content.strip() and t.content not in meant}
        self._ordinary = [i for i, t in added if not t.special]
        self.equal = 0
        self.other: Counter[str] = Counter()  # why a row's ids are not those of apply_chat_template -> rows

    def compare(self, row: Example, row_tokenizer: RowTokenizer) -> None:
        """Compare one row. Raises GateRefused if its ids differ; a row that is left out later is skipped."""
        if row.text is not None:
            return
        try:
            rendered = row_tokenizer.render(row)
        except InputError:
            return
        ids = row_tokenizer.encoder.encode_rendered([rendered], [f"row {row.id}"])[0][0]
        self.check(row, rendered, ids)

    def check(self, row: Example, rendered: Rendered, ids: list[int]) -> None:
        """Compare the ids of one rendered row. Raises GateRefused if they differ."""
        from jinja2 import TemplateError

        chat, show = rendered.chat or [], self._tokenizer.convert_ids_to_tokens
        if not rendered.own:
            self.other["they keep reasoning that it leaves out, or close a block that its prompt opens"] += 1
            return
        try:
            wanted = self._own_ids(row, chat)
        except (TemplateError, *TEMPLATE_FAULTS) as error:  # it drops fields that are None before it renders
            self.other[f"it refuses them itself ({str(error)[:80]})"] += 1
            return
        if rendered.added:
            self.other[f"the end {rendered.added.strip()!r} was added to the last answer"] += 1
            ids = ids[: len(wanted)]
        typed = self._typed(row)
        try:
            if typed:
                check_special_counts(row.id, ids, wanted, typed | dict.fromkeys(self._ordinary, 0), show)
            else:
                check_ids(row.id, ids, wanted, show)
        except GateRefused:
            if all(turn["content"] is not None for turn in chat):
                raise
            self.other["it leaves out a content that is null, which the template writes calls by"] += 1
            return
        self.equal += 1

    def notes(self) -> Iterator[str]:
        """A line for each kind of row whose ids are not compared as a whole."""
        for why, count in sorted(self.other.items()):
            yield f"{count} sampled rows differ from apply_chat_template: {why}"

    def _own_ids(self, row: Example, chat: list[dict[str, Any]]) -> list[int]:
        tools, template = tools_of(row), self._template
        text = template.tool_use if tools and template.tool_use else template.training
        if tools is None and template.profile.wants_tools:
            tools = []
        return list(
            self._tokenizer.apply_chat_template(
                chat, tools=tools, chat_template=text, tokenize=True, return_dict=False, add_generation_prompt=False
            )
        )

    def _typed(self, row: Example) -> dict[int, int]:
        """Special token id -> how often a person typed its text in the row, longer strings first."""
        text = "\0".join([*(part for m in row.messages for part in (m.content, m.extra or "")), row.tools or ""])
        counts = {}
        for string in sorted(self._special, key=len, reverse=True):
            if count := text.count(string):
                counts[self._special[string]] = count
                text = text.replace(string, "\0")
        return counts
