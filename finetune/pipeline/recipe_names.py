"""Load a recipe by its path, its name in recipes/, or the name of a recipe that has run from anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.errors import InputError
from finetune.pipeline.runs import named_run, read_record
from finetune.recipe.load import LoadedRecipe, find_recipe
from finetune.recipe.load import load_recipe as load_file


def load_recipe(name: str, sets: Sequence[str], artifacts: Path) -> LoadedRecipe:
    """Load `name`: a path, a name in recipes/, NAME.yaml in the working folder, or the recipe that run NAME[@RUN] read.

    A recorded run's own `--set` come before `sets`. Raises InputError with every error of the file, or if there is
    neither a file nor a run of that name.
    """
    recipe, at, run = name.partition("@")
    if not at:
        try:
            find_recipe(name)
        except InputError:
            if Path(name).suffix in (".yaml", ".yml") or "/" in name:
                raise
        else:
            return load_file(name, sets)
        if Path(f"{name}.yaml").is_file():
            return load_file(f"{name}.yaml", sets)
    try:
        folder = named_run(artifacts, recipe, run or None)
    except InputError:
        if at:
            raise
        return load_file(name, sets)  # its error lists the known recipes
    return load_file(str(folder / "recipe.yaml"), [*read_record(folder).get("sets", []), *sets])


def check(names: Sequence[str], edits: Sequence[str], artifacts: Path, scratch: Path) -> Iterator[str]:
    """Check recipes and yield a line for each that is fine; then raise InputError with every error of the others."""
    from finetune.pipeline.recipe_checks import absent, unreadable
    from finetune.pipeline.store import Store

    problems = []
    for name in names:
        try:
            loaded = load_recipe(name, edits, artifacts)
            missing = absent(loaded) or unreadable(loaded)
            if not missing and loaded.recipe.lora.start_from is not None:
                from finetune.pipeline.preflight import start_mismatches

                missing = start_mismatches(loaded, Store(artifacts, scratch))
            if missing:
                raise InputError("\n".join(missing))
            yield f"{loaded.path}: fine ({loaded.recipe.name})"
            yield from loaded.notes
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
