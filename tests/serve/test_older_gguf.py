"""A GGUF whose chat template is not the model's is not served."""

import pytest

from finetune.cli import serve
from finetune.errors import InputError
from finetune.serve.engines import Served
from finetune.utils.console import Screen
from tests.helpers.exported import merged
from tests.stages.test_export import run

pytest.importorskip("gguf")


def test_a_gguf_of_an_older_template_and_a_file_that_is_none_are_refused(tmp_path, monkeypatch):
    folder = merged(tmp_path / "merge")
    run(folder, tmp_path / "out", "f16")
    gguf, template = tmp_path / "out" / "model-f16.gguf", folder / "chat_template.jinja"
    serve._refuse_older(gguf, Served("x", gguf=gguf, template=template), Screen())
    serve._refuse_older(gguf, Served("x", gguf=gguf), Screen())
    template.write_text(template.read_text() + " ")
    served = Served("x", gguf=gguf, template=template)
    with pytest.raises(InputError, match="another chat template"):
        serve._refuse_older(gguf, served, Screen())
    monkeypatch.setattr(serve.engines, "installed", lambda: dict.fromkeys(serve.engines.ENGINES, True))
    with pytest.raises(InputError, match="another chat template"):
        serve._serve(
            "x", served, "llama-server", "127.0.0.1", 8123, check=False, roots=(tmp_path, tmp_path), screen=Screen()
        )
    gguf.write_bytes(b"GGUF but no more")
    with pytest.raises(InputError, match="no GGUF"):
        serve._refuse_older(gguf, served, Screen())
