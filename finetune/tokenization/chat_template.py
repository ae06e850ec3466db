"""Which chat template is trained, and the proof that it writes what the base's own writes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import GateRefused, InputError
from finetune.tokenization.audit import check_system, marking_problem, shared_length
from finetune.tokenization.chat import (
    Chat,
    Renderer,
    Span,
    TemplateRefused,
    chat_of,
    merge_system,
    prompt_of,
    takes_system,
)
from finetune.tokenization.generation_markers import has_markers, strip_markers, with_markers
from finetune.tokenization.template_sandbox import RenderingTooLong, check_template, count_once, limited
from finetune.utils.resources import resource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.data.records import Example

# What a template's own expressions raise beside TemplateError: None + text where a turn lacks what is added, a role
# looked up in a mapping, a division, tool calls nested too deeply.
TEMPLATE_FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Template:
    """The decision: `training` has generation markers, `inference` is what the model is published with."""

    name: str
    training: str
    inference: str
    system: bool  # whether it takes a system message itself

    @property
    def digest(self) -> str:
        """SHA-256 of the template that travels with the model."""
        return sha256(self.inference)


class JinjaRenderer:
    """A template in transformers' own sandbox, so that bytes agree with `apply_chat_template`."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self.template = template
        self._special_tokens: dict[str, Any] = dict(special_tokens)
        self._marked = has_markers(template)

    def __call__(self, chat: Chat, generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The text and the ranges of generation blocks (none for a template without markers).

        Raises TemplateRefused, or GateRefused where it takes so long that the other rows would never be reached.
        """
        from jinja2 import TemplateError

        try:
            return self._written([chat], generation_prompt)[0]
        except RenderingTooLong:
            first = str(chat[0]["content"])[:60] if chat else ""
            raise GateRefused(
                f"the chat template does not come to an end on a conversation of {len(chat)} turns that begins "
                f"{first!r}; choose another by render.template, or leave the row out by a rule of filter"
            ) from None
        except (TemplateError, *TEMPLATE_FAULTS) as error:
            raise TemplateRefused(f"the chat template refused: {error}") from error

    def many(self, chats: Sequence[Chat]) -> list[tuple[str, list[Span]]] | None:
        """What each chat would give, in a third less time; None where one is refused or takes too long."""
        from jinja2 import TemplateError

        try:
            return self._written(chats)
        except (RenderingTooLong, TemplateError, *TEMPLATE_FAULTS):
            return None

    def _written(self, chats: Sequence[Chat], generation_prompt: bool = False) -> list[tuple[str, list[Span]]]:
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        with limited(sum(map(len, chats))):
            if self._marked:
                count_once(_compile_jinja_template(self.template).environment)
            found: Any = render_jinja_template(
                list(chats),
                chat_template=self.template,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
            )
        texts, spans = found  # annotated as one string
        if not self._marked:
            return [(text, []) for text in texts]
        return [(text, [(int(a), int(b)) for a, b in ranges]) for text, ranges in zip(texts, spans, strict=True)]


def named_templates() -> dict[str, Path]:
    """The templates a recipe may name."""
    folder = resource("templates")
    return {path.stem: path for path in sorted(folder.glob("*.jinja"))} if folder else {}


def template_text(name: str, file: Path | None) -> str:
    """The text of a template given by name or file.

    Raises InputError (with what there is) where there is none.
    """
    known = named_templates()
    path = file or known.get(name)
    if path is None or not path.is_file():
        raise InputError(f"render.template: found {str(file or name)!r}; allowed are {_choices()}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"render.template: {path} cannot be read as UTF-8 text: {error}") from None


def fingerprint_of(name: str, file: Path | None) -> dict[str, object]:
    """The digest of every template text that can decide the outcome; the base's own is part of the base."""
    if name != "auto":
        return {"template": sha256(template_text(name, file))}
    return {"templates": {n: sha256(template_text(n, None)) for n in named_templates()}}


def choose_template(
    name: str, file: Path | None, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], merge: bool
) -> Template:
    """The template for this recipe, proved on `rows`.

    auto: the base's own text always travels with the model. If it lacks generation markers, training uses it with
    markers added, or one of ours, whichever renders every one of `rows` byte by byte as the base's own does.
    Raises GateRefused where the base has no template, or none of the candidates agrees with it.
    """
    if name != "auto":
        own = template_text(name, file)
        label = file.name if file else name
    elif tokenizer.chat_template is None:
        raise GateRefused(f"the base has no chat template of its own: set render.template to {_choices(auto=False)}")
    else:
        own, label = tokenizer.get_chat_template(), "base"
    special = tokenizer.special_tokens_map
    if own not in {template_text(n, None) for n in named_templates()}:
        check_template(own, special, "the base's chat template" if name == "auto" else f"render.template {label}")
    reference = JinjaRenderer(own, special)
    system = takes_system(reference)
    chats = _chats(rows, merge and not system)
    if not (system or merge):
        for row_id, chat in chats:
            check_system(row_id, chat, label)
    if has_markers(own):
        plain = strip_markers(own)
        same = label != "base" and _disagreement(JinjaRenderer(plain, special), reference, chats) is None
        return Template(label, own, plain if same else own, system)
    control = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    candidates = [(label, text) for text in with_markers(own, control)]
    if label == "base":
        candidates += [(f"base, marked as {n}", template_text(n, None)) for n in named_templates()]
    reasons = []
    for candidate, text in candidates:
        reason = _unproved(JinjaRenderer(text, special), reference, chats)
        if reason is None:
            return Template(candidate, text, own, system)
        reasons.append(f"\n  {candidate}: {reason}")
    if why := _refuses_all(reference, chats):
        raise GateRefused(
            f"template {label} takes none of the {len(chats)} rows that it was tried on; of the first it says: {why}. "
            "Change the rows, or set render.template to one that takes them"
        )
    raise GateRefused(
        f"which tokens of template {label} are the assistant's is unknown: it has no {{% generation %}} markers, and "
        f"no marked template writes the same text; set render.template to {_choices(auto=False)}{''.join(reasons)}"
    )


def sha256(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _choices(auto: bool = True) -> str:
    return ", ".join([*(["auto"] if auto else []), *named_templates()]) + " or a .jinja file"


PROBES: tuple[tuple[str, ...], ...] = (("a question", "an answer"), ("  one\n", "\ntwo  ", "three", "four\n"))


def _chats(rows: Sequence[Example], merge: bool) -> list[tuple[str, Chat]]:
    chats = [(row.id, chat_of(row.messages)) for row in rows if row.messages]
    if not chats:  # raw text only: any conversation will do
        roles = ("user", "assistant")
        chats = [("probe", [{"role": roles[i % 2], "content": c} for i, c in enumerate(p)]) for p in PROBES]
    if not merge:
        return chats
    return [(i, merge_system(c) if len(c) > 1 and c[1]["role"] == "user" else c) for i, c in chats]


def _disagreement(candidate: Renderer, reference: Renderer, chats: Sequence[tuple[str, Chat]]) -> str | None:
    for row_id, chat in chats:
        prompt = prompt_of(chat)
        for messages, generation_prompt in ((chat, False), *(((prompt, True),) if prompt else ())):
            wanted = _written(reference, messages, generation_prompt)
            found = _written(candidate, messages, generation_prompt)
            if wanted is None:  # where both refuse a row, it is dropped when it is rendered
                if found is not None and messages is chat:
                    return f"row {row_id}: it would train on what the template itself refuses"
            elif found is None:
                return f"row {row_id}: it refuses what the template itself takes"
            elif found != wanted:
                return f"row {row_id} differs from character {shared_length(found, wanted)} on"
    return None


def _refuses_all(render: Renderer, chats: Sequence[tuple[str, Chat]]) -> str | None:
    """What the template says of the first chat where it takes none of them."""
    why = None
    for row_id, chat in chats:
        try:
            render(chat)
        except TemplateRefused as error:
            why = why or f"row {row_id}: {error}"
        else:
            return None
    return why


def _written(render: Renderer, chat: Chat, generation_prompt: bool) -> str | None:
    """The text, or None where the template refuses the chat."""
    try:
        return render(chat, generation_prompt)[0]
    except TemplateRefused:
        return None


def _unproved(candidate: Renderer, reference: Renderer, chats: Sequence[tuple[str, Chat]]) -> str | None:
    """Why the candidate's text or markers are wrong on these chats, or None where all is proved."""
    reason = _disagreement(candidate, reference, chats)
    if reason:
        return reason
    proved = 0
    for row_id, chat in chats:
        try:
            text, spans = candidate(chat)
        except TemplateRefused as error:
            reason = str(error)
            continue
        problem = marking_problem(text, spans, chat)
        prompt = prompt_of(chat)
        if problem is None and prompt and spans and spans[-1][0] != len(candidate(prompt, True)[0]):
            problem = "its answers do not begin where the generation prompt ends"
        if problem:
            return f"row {row_id}: {problem}"
        proved += 1
    return None if proved else f"no row could be rendered ({reason})"
