"""The README stays short, its links lead somewhere, and its recipe is valid."""

import re
from pathlib import Path

from finetune.recipe.load import parse_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_it_has_800_words_at_most():
    assert len(PAGES[0].read_text(encoding="utf-8").split()) <= 800


def test_every_link_to_a_file_leads_to_one():
    gone = [
        f"{page.name}: {link}"
        for page in PAGES
        for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]
    assert gone == []


def test_its_recipe_is_valid(tmp_path):
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    assert parse_recipe(recipe, tmp_path / "tickets.yaml").pack is None


def test_the_glossary_has_the_limits_of_the_verdict():
    from finetune.eval import verdict

    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    shares = (f"{verdict.ENDS_WELL:.0%}".replace("%", " %"), f"{verdict.MEMORISED_NATS} nats")
    for value in (f"{verdict.FEW_ROWS} rows", *shares,
                  f"{verdict.COPIED_NATS} nats", f"Fewer than {verdict.FEW_STEPS}"):  # fmt: skip
        assert value in text, value
