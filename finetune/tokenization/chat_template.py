"""The chat template of a training: the base's own, a named one or a file, in transformers' own sandbox."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from finetune.data.records import Example
from finetune.errors import GateRefused, InputError
from finetune.tokenization.answers import Finder, NoEnd
from finetune.tokenization.audit import check_system
from finetune.tokenization.chat import Chat, Renderer, Span, TemplateRefused, chat_of, has_markers, strip_markers, turn
from finetune.tokenization.template_profile import Reasoning, TemplateProfile
from finetune.tokenization.template_sandbox import RenderingTooLong, check_template, count_once, limited
from finetune.utils.files import write_bytes, write_json
from finetune.utils.resources import resource
from finetune.utils.upstream import compile_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.tokenization.template_sandbox import MarkedEnvironment

# What a template's own expressions raise beside TemplateError: None + text where a turn lacks what is added, a role
# looked up in a mapping, a division, tool calls nested too deeply.
TEMPLATE_FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
PLAIN = {"role", "content"}
TOOL_USE = "tool_use"  # transformers' name of the template for rows with tools, beside "default"


@dataclass(frozen=True, slots=True)
class Template:
    """The decision: `training` is the text that rows are rendered with, `inference` is published with the model.

    They differ only in generation markers. `tool_use` is the base's second template, for rows with tools, or None.
    """

    name: str
    training: str
    inference: str
    tool_use: str | None
    profile: TemplateProfile
    finder: Finder

    @property
    def digest(self) -> str:
        """SHA-256 of the template that travels with the model."""
        return sha256(self.inference)

    @property
    def text(self) -> str:
        """All template text that can be rendered, to look for strings in it."""
        return self.training + (self.tool_use or "")


class JinjaRenderer:
    """A template in transformers' own sandbox, so that bytes agree with `apply_chat_template`."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self.template = template
        self._special_tokens: dict[str, Any] = dict(special_tokens)
        self._marked = has_markers(template)

    def __call__(
        self, chat: Chat, generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """The text and the ranges of generation blocks (none for a template without markers).

        Raises TemplateRefused, also if the template does not finish in the allowed time.
        """
        from jinja2 import TemplateError

        try:
            return self._written(chat, generation_prompt, tools)
        except RenderingTooLong:
            raise TemplateRefused(
                f"the chat template does not finish in the allowed time on a conversation of {len(chat)} turns"
            ) from None
        except (TemplateError, *TEMPLATE_FAULTS) as error:
            raise TemplateRefused(f"the chat template refused: {error}") from error

    def _written(self, chat: Chat, generation_prompt: bool, tools: Sequence[Any] | None) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        with limited(len(chat)):
            compiled = compile_template(self.template)
            if not self._marked and not tools and all(turn.keys() <= PLAIN for turn in chat):
                # what render_jinja_template does with plain text, without its copies of every value
                text = compiled.render(
                    messages=chat, tools=tools, documents=None, add_generation_prompt=generation_prompt,
                    **self._special_tokens,
                )  # fmt: skip
                return str(text), []
            if self._marked:
                count_once(cast("MarkedEnvironment", compiled.environment))
            rendered: Any = render_jinja_template(
                [chat],
                tools=tools,  # type: ignore[arg-type]
                chat_template=self.template,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
            )
        text, spans = rendered[0][0], rendered[1]  # annotated as one string
        return str(text), [(int(a), int(b)) for a, b in spans[0]] if self._marked else []


def named_templates() -> dict[str, Path]:
    """The templates a recipe may name."""
    folder = resource("templates")
    return {path.stem: path for path in sorted(folder.glob("*.jinja"), key=lambda path: path.stem)} if folder else {}


def template_text(name: str, file: Path | None) -> str:
    """The text of a template given by name or file.

    Raises InputError (with what there is) if there is none.
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
    """The digest of a template that the recipe names; the base's own is part of the base."""
    return {"template": sha256(template_text(name, file))} if name != "auto" else {}


def base_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """The base's own template, and its second one for rows with tools if there is one.

    Raises GateRefused if the base has no template, or several of which none is the default.
    """
    own: Any = tokenizer.chat_template
    if not own:
        raise GateRefused(f"the base has no chat template of its own: set render.template to {_choices(auto=False)}")
    if isinstance(own, str):
        return own, None
    if "default" not in own:
        raise GateRefused(
            f"the base has the chat templates {', '.join(map(repr, own))}, and none is named 'default'; "
            f"set render.template to {_choices(auto=False)}"
        )
    return own["default"], own.get(TOOL_USE)


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that `apply_chat_template` uses for a conversation without tools, or None."""
    own: Any = tokenizer.chat_template  # transformers returns a mapping if the folder has additional_chat_templates
    return own.get("default") if isinstance(own, dict) else own


def stop_strings(tokenizer: PreTrainedTokenizerBase, base: Path | None) -> frozenset[str]:
    """The tokens that end generation by the base's own configuration: the tokenizer's EOS and, from
    generation_config.json or config.json in the folder `base`, every eos_token_id.
    """
    ids = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = base / name if base else None
        if path is not None and path.is_file():
            ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            ids |= set(ends) if isinstance(ends, list) else {ends}
    known = [i for i in ids if isinstance(i, int) and 0 <= i < len(tokenizer)]
    return frozenset(str(t) for t in tokenizer.convert_ids_to_tokens(known) if t)


def special_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The strings of the base's special tokens (`special: true`), white space apart.

    Other added tokens (`<tool_call>`, `<think>`) are ordinary vocabulary: typed or not, the base's tokenizer gives
    them one id.
    """
    return [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()]


def choose_template(
    name: str,
    file: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    system: Literal["merge", "refuse"] = "merge",
    reasoning: Reasoning = "auto",
    base: Path | None = None,
) -> Template:
    """The template for this recipe, tried on `rows`. `base` is the folder that has the base's generation_config.json.

    Raises GateRefused if the base has no template, if the template takes no conversation or none of the rows, or if
    no token it writes could end an answer.
    """
    if name != "auto":
        own, tool_use, label = template_text(name, file), None, file.name if file else name
    else:
        (own, tool_use), label = base_template(tokenizer), "base"
    special = tokenizer.special_tokens_map
    known = {template_text(n, None) for n in named_templates()}
    for text in {own, tool_use} - known - {None}:
        check_template(str(text), special, "the base's chat template" if name == "auto" else f"render.template {label}")
    reference: Renderer = JinjaRenderer(own, special)
    try:
        profile = TemplateProfile(reference, JinjaRenderer(tool_use, special) if tool_use else None, system, reasoning)
    except TemplateRefused as error:
        raise GateRefused(
            f"template {label} takes no conversation of a question and an answer: {error}; set render.template to "
            f"{_choices(auto=False)}"
        ) from None
    finder = Finder(special_strings(tokenizer), stop_strings(tokenizer, base))
    _require_end(profile, finder, label)
    if system == "refuse" and not profile.takes_system:
        for row in rows:
            check_system(row.id, chat_of(row.messages), label)
    _require_one_row(profile, rows, label)
    same = label != "base" and _same_without_markers(own, reference, profile, special, rows)
    inference = strip_markers(own) if same else own
    return Template(label, own, inference, tool_use, profile, finder)


def write_template(
    folder: Path, template: Template, terminators: list[int], pad: str, bos: bool, typed: Sequence[str] = ()
) -> None:
    """Write the template's texts and template.json: name, sha256, terminators (ids), pad_token, bos.

    `typed`: special tokens that a typed text becomes; the field is absent if there is none.
    """
    folder.mkdir()
    write_bytes(folder / "chat_template.jinja", template.training.encode())
    write_bytes(folder / "inference.jinja", template.inference.encode())
    if template.tool_use:
        write_bytes(folder / "inference_tool_use.jinja", template.tool_use.encode())
    facts = {"name": template.name, "sha256": template.digest, "terminators": terminators, "pad_token": pad, "bos": bos}
    facts |= {"typed": list(typed)} if typed else {}
    write_json(folder / "template.json", facts)


def sha256(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _choices(auto: bool = True) -> str:
    return ", ".join([*(["auto"] if auto else []), *named_templates()]) + " or a .jinja file"


def _require_end(profile: TemplateProfile, finder: Finder, label: str) -> None:
    """Raise GateRefused if an answer under this template has no end that generation could stop at."""
    chat = [turn("user", "a question"), turn("assistant", "an answer")]
    try:
        finder.find(lambda c, prompt: profile.write(c, prompt), profile.adapt(chat))
    except NoEnd as error:
        raise GateRefused(
            f"template {label}: {error}, so the model would never learn to stop; set render.template to one that ends "
            "an answer with a token of this base (alpaca and mistral use its EOS)"
        ) from None
    except InputError:
        return  # of this conversation only; the rows are checked too


def _require_one_row(profile: TemplateProfile, rows: Sequence[Example], label: str) -> None:
    """Raise GateRefused if the template takes none of the rows."""
    why = None
    for row in rows:
        try:
            profile.write(profile.adapt(chat_of(row.messages)), False, tools_of(row))
        except InputError as error:
            why = why or f"row {row.id}: {error}"
        else:
            return
    if why:
        raise GateRefused(
            f"template {label} takes none of the {len(rows)} rows that it was tried on; {why}. "
            "Change the rows, or set render.template to one that takes them"
        )


def tools_of(row: Example) -> list[Any] | None:
    """The row's tool definitions, or None."""
    return list(json.loads(row.tools)) if row.tools else None


def _same_without_markers(
    own: str, reference: Renderer, profile: TemplateProfile, special: Mapping[str, str], rows: Iterable[Example]
) -> bool:
    """Whether the template writes the same text without its generation markers."""
    if not has_markers(own):
        return False
    plain = JinjaRenderer(strip_markers(own), special)
    probes = [[turn("user", "one "), turn("assistant", " two\n"), turn("user", "3"), turn("assistant", "four")]]
    for chat in [*probes, *(chat_of(row.messages) for row in rows if not row.tools)]:
        try:
            adapted = profile.adapt(chat)
            same = all(plain(adapted, prompt)[0] == reference(adapted, prompt)[0] for prompt in (False, True))
        except InputError:
            continue
        if not same:
            return False
    return True
