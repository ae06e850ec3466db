"""Find recipes by name. Imports nothing heavy, because shell completion calls it at every press of Tab."""

from __future__ import annotations

from pathlib import Path


def recipe_folders() -> list[Path]:
    """Return the folders searched: recipes/ of the working directory, of the checkout, of the installed package."""
    package = Path(__file__).parents[1]
    return [Path("recipes"), package.parent / "recipes", package / "_recipes"]


def known_recipes() -> dict[str, Path]:
    """Return recipe name → file; the earlier folder of `recipe_folders` wins."""
    known: dict[str, Path] = {}
    for folder in recipe_folders():
        for path in sorted(folder.glob("*.yaml")):
            known.setdefault(path.stem, path)
    return known


def complete_recipe(incomplete: str) -> list[str]:
    """Return the recipe names with this prefix; none for a path, which the shell completes itself."""
    return sorted(name for name in known_recipes() if name.startswith(incomplete))


def resource(*parts: str) -> Path | None:
    """Return a file or folder shipped in recipes/ (templates, shapes), or None."""
    return next((f.joinpath(*parts) for f in recipe_folders()[1:] if f.joinpath(*parts).exists()), None)
