"""The prompts that a writing or judging model is given: Jinja files, which a recipe can replace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune.errors import InputError
from finetune.utils.files import file_digest
from finetune.utils.format import nearest
from finetune.utils.resources import resource

MOST_BYTES = 100_000
GIVEN = ("count", "first", "instruction", "operation", "question", "second", "tasks")  # to one prompt or another


class Prompts:
    """Our prompts, with the files of `own` in place of those of the same name."""

    def __init__(self, own: Path | None = None) -> None:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._files = files(own)
        self._texts: dict[str, str] = {}
        self._environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )

    def render(self, name: str, values: Mapping[str, object]) -> str:
        """Return the prompt `name` without blanks around it. Raises InputError with the file if it cannot be used."""
        from jinja2 import TemplateError

        from finetune.tokenization.template_sandbox import RenderingTooLong, limited

        path = self._files[name]
        if name not in self._texts:
            self._texts[name] = _text(path)
        try:
            with limited(1):
                template = self._environment.from_string(self._texts[name])
                text = template.render(**values).strip()
        except RenderingTooLong:
            raise InputError(f"prompt {path}: it does not end; fix the template") from None
        except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError, LookupError) as error:
            raise InputError(f"prompt {path}: {error}; it is given {', '.join(sorted(values))}") from None
        if not text:
            raise InputError(f"prompt {path}: it renders to nothing")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise InputError(f"prompt {path}: it writes a lone surrogate (U+D800–U+DFFF), which UTF-8 cannot encode")
        return text


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if len(content) > MOST_BYTES:
            raise InputError(f"prompt {path}: {len(content):,} bytes, allowed are {MOST_BYTES:,}; is it a prompt?")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt {path}: cannot be read as UTF-8 text: {error}") from None


def files(own: Path | None) -> dict[str, Path]:
    """Return name → file of every prompt. Raises InputError for a missing folder, or an unknown name in it."""
    folder = resource("prompts")
    ours = {path.stem: path for path in sorted(folder.glob("*.jinja"))} if folder else {}
    if own is None:
        return ours
    if not own.is_dir():
        raise InputError(f"no such folder: {own}")
    theirs = {path.stem: path for path in sorted(own.glob("*.jinja"))}
    for name in theirs:
        if name not in ours:
            near = nearest(name, ours)
            hint = f"; did you mean {near}.jinja?" if near else ""
            raise InputError(f"{theirs[name]}: no prompt has this name{hint} (there is {', '.join(ours)})")
    if not theirs:
        raise InputError(f"{own} holds no .jinja file; allowed names: {', '.join(f'{n}.jinja' for n in ours)}")
    return ours | theirs


def problem(own: Path | None) -> str:
    """Return why the prompts in `own` cannot be used, or "". Each is tried in a process with little time and memory."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from finetune.tokenization.template_sandbox import problem_of

    try:
        for path in sorted(own.glob("*.jinja")) if own is not None and files(own) else ():
            ImmutableSandboxedEnvironment().parse(_text(path))
            if why := problem_of(_text(path), tuple((name, "words") for name in GIVEN)):
                return f"{path}: {why.removesuffix(' on conversations of four turns')}"
    except InputError as error:
        return str(error)
    except (TemplateSyntaxError, RecursionError) as error:
        return f"{path}: {error}"
    return ""


def digests(own: Path | None) -> dict[str, str]:
    """Return name → digest of every prompt, which decides what is written."""
    return {name: file_digest(path) for name, path in files(own).items()}
