"""Conditions on other columns: numbers as numbers, texts as texts, a missing value leaves the row out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.records import Example
from finetune.filters.conditions import check_of
from finetune.recipe.filters import Filter, parse_condition
from finetune.utils.files import canonical_json


def keeps(condition, **columns):
    return (
        check_of([condition])(Example("a:1", "a", text="x", extra=canonical_json(columns) if columns else None)) is None
    )


@given(st.integers(-50, 50), st.integers(-50, 50), st.booleans())
def test_numbers_compare_as_python_does_also_as_text(value, limit, as_text):
    found = str(value) if as_text else value
    for sign, holds in {
        ">=": value >= limit, "<=": value <= limit, ">": value > limit, "<": value < limit,
        "==": value == limit, "!=": value != limit, "=": value == limit,
    }.items():  # fmt: skip
        assert keeps(f"rating {sign} {limit}", rating=found) == holds


def test_texts_and_names_with_blanks():
    assert keeps("channel == mail", channel="mail") and not keeps("channel != 'mail'", channel="mail")
    assert keeps("agent rating>=4", **{"agent rating": "4"}) and keeps("rating >= 4", rating="4,5")


@pytest.mark.parametrize("columns", [{}, {"other": 3}, {"rating": "good"}, {"rating": True}])
def test_a_row_without_a_number_there_is_left_out(columns):
    assert not keeps("rating >= 4", **columns)


@pytest.mark.parametrize("text", ["rating", ">= 4", "rating >= good", ""])
def test_what_is_no_condition_is_refused_by_the_recipe(text):
    with pytest.raises(ValueError, match=r"condition|compares numbers"):
        parse_condition(text)
    with pytest.raises(ValueError, match="keep_where"):
        Filter(keep_where=[text])
