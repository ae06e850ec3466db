"""Private text is counted by kind; nothing of it is shown; ordinary text counts as none."""

import random

import pytest

from finetune.data.records import Example, Message
from finetune.filters.private_text import KINDS, count_private, kinds_in, luhn, warning

FOUND = {
    KINDS[0]: ["write to anna.b+x@mail.example.co.uk", "<erik@firma.de>"],
    KINDS[1]: ["call +49 30 901820", "(030) 90-18-20-11", "ring 0171/1234567 now", "+1 (212) 555-0199"],
    KINDS[2]: ["card 4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005 amex"],
    KINDS[3]: ["hf_" + "a1" * 12, "api_key = 'q8w7e6r5t4y3'", "password: hunter2hunter2", "sk-proj-" + "Ab1" * 10],
}
PLAIN = [
    "order 12345678 of 2026-11-30 cost 1,234,567.89 euros", "version 10.2.30.4 of 2024", "pi is 3.14159265358979",
    "the password reset mail never arrives", "ISBN 978-3-16-148410-0 is a book", "use @dataclass(frozen=True)",
    "token: the unit a model reads", "from 0800 to 1700", "1 000 000 people", "0.05 0.10 0.15", "12:30-14:45",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, texts in FOUND.items() for t in texts])
def test_each_kind_is_found(kind, text):
    assert kind in kinds_in(text)


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_is_not_private(text):
    assert kinds_in(text) == []


def test_a_wrong_check_digit_is_no_card():
    chance = random.Random(0)
    for _ in range(200):
        body = str(chance.randint(10**14, 10**15 - 1))
        right = [d for d in "0123456789" if luhn(body + d)]
        assert len(right) == 1
        wrong = str((int(right[0]) + 1) % 10)
        assert KINDS[2] in kinds_in(f"n {body}{right[0]}") and KINDS[2] not in kinds_in(f"n {body}{wrong}")


def test_counts_are_of_rows_and_show_no_text():
    rows = [Example(f"a:{i}", "a", (Message("user", t), Message("assistant", "ok"))) for i, t in enumerate(
        ["a@b.example and c@d.example", "hello", "+49 30 901820 or a@b.example"])]  # fmt: skip
    counts = count_private(rows)
    assert counts == {"rows": 3, KINDS[0]: 2, KINDS[1]: 1}
    said = warning(counts, "training")
    assert "2 with e-mail addresses" in said and "example" not in said and "901820" not in said
    assert warning({"rows": 3}, "training") == ""
