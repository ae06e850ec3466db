"""What a stage is handed: here, that progress is heard by more than the screen."""

from finetune.context import Context
from finetune.recipe import Runtime, Tracking
from finetune.utils.progress import SilentBar


class Counted(SilentBar):
    def __init__(self):
        self.moves = []

    def advance(self, steps=1, note=""):
        self.moves.append((steps, note))


def test_lines_and_progress_reach_the_screen_and_whoever_listens(tmp_path):
    said, heard, bar = [], [], Counted()
    ctx = Context(tmp_path, Runtime(), Tracking(), say=said.append, bar=lambda label, total: bar).heard_by(heard.append)
    ctx.say("train …")
    assert list(ctx.track("ab", "count")) == ["a", "b"]
    training = ctx.bar("training", 12)
    training.advance(4)
    training.advance(note="loss 2.50")
    assert said == ["train …"] and bar.moves == [(1, ""), (1, ""), (4, ""), (1, "loss 2.50")]
    assert heard == ["train …", "count 1", "count 2", "training 4/12", "training 5/12 loss 2.50"]
