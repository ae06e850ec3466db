"""Render a few made-up conversations by an untrusted template, in a process that may fail.

Run as a script, by `template_limits.check_template`: it reads {"template", "special", "cpu_seconds", "memory_bytes"}
from its standard input and writes {"problem"}, a sentence or null. A loop without end, or a text that outgrows the
memory, ends this process alone. Nothing of the package is imported here, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROLES = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "tool", "assistant"),
)


class Strict(ImmutableSandboxedEnvironment):
    """The sandbox that transformers uses, but a forbidden attribute is an error when it is only looked at, too."""

    def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
        """Raise SecurityError."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r}")


def main() -> None:
    """Say on standard output what is wrong with the template on standard input, if anything."""
    asked = json.loads(sys.stdin.read())
    _limit(asked["cpu_seconds"], asked["memory_bytes"])
    print(json.dumps({"problem": problem_of(asked["template"], asked["special"])}))  # noqa: T201 - its result


def problem_of(template: str, special: dict[str, str]) -> str | None:
    """Why the template cannot be used at all, or None. A refused conversation does not count."""
    environment = Strict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals.update(
        raise_exception=_refuse, strftime_now=lambda form: datetime.datetime.now().strftime(form)
    )
    try:
        tree = environment.parse(template)
        for loads in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
            if node := tree.find(loads):
                return f"line {node.lineno}: it loads another file ({loads.__name__.lower()}); write all in one file"
        compiled = environment.from_string(template)
        for roles, prompt in itertools.product(ROLES, (False, True)):
            chat = [{"role": role, "content": f"words of turn {i}"} for i, role in enumerate(roles)]
            problem = _rendering(compiled, {"messages": chat, "add_generation_prompt": prompt, **special})
            if problem:
                return problem
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: it is not valid Jinja: {error.message}"
    except MemoryError:
        return "it builds a text that outgrows the memory"
    except RecursionError:
        return "it is nested too deeply"
    return None


def _rendering(compiled: Template, given: dict[str, Any]) -> str | None:
    try:
        compiled.render(tools=None, documents=None, **given)
    except SecurityError as error:
        return f"the sandbox forbids what it does: {error}"
    except OverflowError as error:  # range() of the sandbox, or a text longer than any text can be
        return f"it asks for too much: {error}"
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError):
        return None  # it refuses this conversation; it may take others
    return None


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Ask the system to end this process; if it cannot, the parent's own clock does."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # SIGXCPU comes at the first limit; SIGKILL, which another process may have sent too, only at the second.
    limits = [(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_AS, memory_bytes, memory_bytes))
    for kind, soft, hard in limits:
        most = resource.getrlimit(kind)[1]  # a user's own limit may be lower, and stays
        resource.setrlimit(kind, (soft, hard) if most < 0 else (min(soft, most), min(hard, most)))


if __name__ == "__main__":
    main()
