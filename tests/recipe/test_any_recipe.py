"""Any tree, text or `--set` is a valid recipe or is refused with a sentence."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.recipe import Recipe
from finetune.recipe.load import _Loader, load_recipe, parse_recipe
from finetune.recipe.messages import written_fields
from finetune.recipe.reference import _models
from tests.recipe.test_load import GOOD

ROOT = Path(__file__).parents[2]
RECIPE_MODELS = _models(Recipe)


SHIPPED = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.yaml"))]
NAMES = sorted({n for model in RECIPE_MODELS for n in written_fields(model)})
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(
        ["auto", "a/b", "~", "no", "1_000", "2e-4", "<<", "builtin:x", "../x", ".jinja", "(", "𝔘", "١", "~x/y.jinja",
         "~x"]
    )
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), x, max_size=4),
    max_leaves=12,
)


def valid_or_refused(text, sets=()):
    """Every refusal is a sentence that says where; anything else than InputError fails the test."""
    try:
        parse_recipe(text, Path("r.yaml"), sets)
    except InputError as error:
        for line in str(error).split("\n"):
            assert line.strip(), str(error)
        assert str(error).startswith(("r.yaml:", "--set "))


@settings(deadline=None)
@given(TREES)
def test_any_tree_is_a_recipe_or_is_refused_cleanly(tree):
    valid_or_refused(yaml.safe_dump(tree, allow_unicode=True))


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(written_fields(Recipe))), TREES, max_size=3))
def test_a_recipe_with_any_tree_for_a_section_is_fine_or_refused_cleanly(sections):
    tree = {"name": "a", "model": "a/b", "data": [{"source": "pydoc"}], **sections}
    valid_or_refused(yaml.safe_dump(tree, allow_unicode=True))


@settings(deadline=None)
@given(st.data())
def test_a_shipped_recipe_with_one_change_is_fine_or_refused_cleanly(data):
    """A tree of a real recipe in which one value, at any depth, is another, is gone, or has another name."""
    tree = yaml.load(data.draw(st.sampled_from(SHIPPED)), _Loader)
    at = tree
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    change = data.draw(st.sampled_from(["value", "gone", "name"]))
    value = at.pop(key) if change != "value" else None
    if change == "value":
        at[key] = data.draw(TREES)
    elif change == "name" and isinstance(at, dict):
        at[data.draw(st.sampled_from(NAMES) | st.text(max_size=4))] = value
    valid_or_refused(yaml.safe_dump(tree, allow_unicode=True))


@settings(deadline=None)
@given(
    st.sampled_from(SHIPPED),
    st.integers(0, 2000),
    st.integers(0, 40),
    st.text("{}[]:,-#&*!|>'\"%@` \n\t\0a1é", max_size=5),
)
def test_a_shipped_recipe_with_any_text_in_it_is_fine_or_refused_cleanly(text, start, length, piece):
    valid_or_refused(text[:start] + piece + text[start + length :])


STEPS = st.lists(st.sampled_from([*NAMES, "0", "1", "²", "", " "]) | st.text(max_size=4), min_size=1, max_size=4)


@settings(deadline=None)
@given(st.lists(st.text(max_size=30) | st.tuples(STEPS, st.text(max_size=10) | SCALARS.map(str)), max_size=3))
def test_any_set_is_applied_or_refused_cleanly(options):
    sets = [o if isinstance(o, str) else f"{'.'.join(o[0])}={o[1]}" for o in options]
    valid_or_refused(GOOD, sets)


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_validates_and_names_its_hardware(path):
    recipe = load_recipe(str(path)).recipe
    assert recipe.name == path.stem
    assert "# Hardware: " in path.read_text()
