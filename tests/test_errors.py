"""Words for what became of a child process."""

import pytest

from finetune.errors import how_it_ended


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (3, "failed with status 3"),
        (-9, "was killed by SIGKILL (out of memory?)"),
        (-15, "was killed by SIGTERM"),
        (-63, "was killed by signal 63"),
    ],
)
def test_how_a_child_ended(status, words):
    assert how_it_ended(status) == words
