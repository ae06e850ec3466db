"""The detector that lies in the wheel: no network, and sure of what is plain."""

from __future__ import annotations

import importlib.util

import pytest

from finetune.errors import InputError
from finetune.filters import language

pytest.importorskip("py3langid")

TEXTS = {
    "en": "The river rises in the hills above the town and runs east for forty miles before it meets the sea.",
    "de": "Der Fluss entspringt in den Hügeln über der Stadt und fließt vierzig Meilen nach Osten bis ans Meer.",
    "fr": "La rivière prend sa source dans les collines au-dessus de la ville et coule vers l'est jusqu'à la mer.",
    "es": "El río nace en las colinas sobre la ciudad y corre hacia el este durante cuarenta millas hasta el mar.",
    "ru": "Река берёт начало в холмах над городом и течёт на восток сорок миль, прежде чем впасть в море.",
    "zh": "这条河发源于城镇上方的山丘，向东流四十英里后汇入大海。春天雪融化，水位很高。",
    "ja": "川は町の上の丘から流れ出て、東へ四十マイル進んで海に注ぎます。春には雪が溶けます。",
}


def test_plain_texts():
    detect = language.detector(["en"])
    for code, text in TEXTS.items():
        found, confidence = detect(text)
        assert found == code and 0.7 < confidence <= 1.0001, (found, confidence)
    assert detect("")[1] < 0.5
    assert detect("x = [i**2 for i in range(10)]; print(x)")[1] < 0.9


def test_a_language_it_does_not_know():
    with pytest.raises(InputError, match=r"filter\.rules: language: found xx; known are .*en"):
        language.detector(["en", "xx"])


def test_its_absence_is_one_line(monkeypatch):
    assert language.missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs py3langid, which is not installed") as error:
        language.detector(["en"])
    assert "\n" not in str(error.value)
