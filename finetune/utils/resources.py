"""Where recipes lie and what they are called. Imports nothing, for shells ask for names at every press of Tab."""

from __future__ import annotations

from pathlib import Path


def recipe_folders() -> list[Path]:
    """Where a recipe's name is looked up: the working directory's recipes/, the checkout's, the installed package's."""
    package = Path(__file__).parents[1]
    return [Path("recipes"), package.parent / "recipes", package / "_recipes"]


def known_recipes() -> dict[str, Path]:
    """Every recipe that can be called by name, with its file; the nearer folder wins."""
    known: dict[str, Path] = {}
    for folder in recipe_folders():
        for found in sorted(folder.glob("*.yaml")):
            known.setdefault(found.stem, found)
    return known


def complete_recipe(incomplete: str) -> list[str]:
    """The names that begin so. None for a path: there the shell goes on by itself."""
    return sorted(name for name in known_recipes() if name.startswith(incomplete))


def resource(*parts: str) -> Path | None:
    """A file or folder shipped in recipes/ (templates, shapes), or None."""
    return next((f.joinpath(*parts) for f in recipe_folders()[1:] if f.joinpath(*parts).exists()), None)
