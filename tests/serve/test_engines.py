"""Which engine serves which files, and with which words."""

import json
from pathlib import Path

import pytest

from finetune.errors import InputError
from finetune.serve import engines
from finetune.serve.engines import Served, choose, command

ALL = dict.fromkeys(engines.ENGINES, True)
MERGED = Served("mine", merged=Path("/m"), template=Path("/m/chat_template.jinja"), context=4096, dtype="bfloat16")
ADAPTER = Served("mine", base="o/base", adapter=Path("/a"), rank=24, template=Path("/a/t.jinja"), dtype="bfloat16")
GGUF = Served("mine", gguf=Path("/g/model-q8_0.gguf"), template=Path("/t.jinja"), context=2048)


def test_auto_takes_the_first_engine_that_is_installed_and_can_read_the_files():
    assert choose("auto", MERGED, ALL) == "vllm"
    assert choose("auto", GGUF, ALL) == "llama-server"
    assert choose("auto", MERGED, {**ALL, "vllm": False}) == "transformers"


@pytest.mark.parametrize(
    ("asked", "served", "installed", "words"),
    [
        ("tgi", MERGED, ALL, "allowed: auto, vllm"),
        ("vllm", MERGED, {**ALL, "vllm": False}, "pip install vllm"),
        ("llama-server", MERGED, ALL, "export.gguf"),
        ("transformers", ADAPTER, ALL, "--until merge"),
        ("vllm", Served("x", adapter=Path("/a"), limits=("DoRA is not supported",)), ALL, "DoRA is not supported"),
        ("auto", ADAPTER, {**ALL, "vllm": False}, "no merged model"),
    ],
)
def test_an_engine_that_cannot_is_refused_with_the_way_out(asked, served, installed, words):
    with pytest.raises(InputError, match=words):
        choose(asked, served, installed)


def test_the_adapter_is_served_on_its_base_with_the_next_rank_that_vllm_knows():
    words = command("vllm", ADAPTER, "127.0.0.1", 8000)
    assert words[:3] == ["vllm", "serve", "o/base"]
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert words[words.index("--lora-modules") + 1] == "mine=/a"


@pytest.mark.parametrize(("engine", "served"), [("vllm", MERGED), ("llama-server", GGUF), ("transformers", MERGED)])
def test_template_context_and_type_are_stated(engine, served):
    words = command(engine, served, "127.0.0.1", 8000)
    assert words[-4:] == ["--host", "127.0.0.1", "--port", "8000"]
    if engine != "transformers":  # which reads both from the folder
        assert str(served.template) in words and str(served.context) in words
    if engine != "llama-server":
        assert words[words.index("--dtype") + 1] == served.dtype


def test_a_key_is_handed_over_in_the_environment_only():
    told = engines.environment("vllm", "secret", {engines.KEY: "secret", "PATH": "/bin"})
    assert told["VLLM_API_KEY"] == "secret" and engines.KEY not in told and told["PATH"] == "/bin"
    assert engines.environment("llama-server", "secret", {})["LLAMA_API_KEY"] == "secret"
    with pytest.raises(InputError, match="has no keys"):
        engines.environment("transformers", "secret", {})
    assert "secret" not in engines.environment("transformers", "secret", {}, loopback=True).values()
    assert "secret" not in " ".join(command("vllm", MERGED, "0.0.0.0", 1))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"r": 1024}, "rank 1024"),
        ({"r": 8, "rank_pattern": {"q_proj": 600}}, "rank 600"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 8, "use_dora": True}, "DoRA"),
        ({"r": 8, "trainable_token_indices": {"embed_tokens": [1]}}, "trained tokens"),
        ({"r": 8, "bias": "all"}, "biases"),
        ({"r": 512, "bias": "none", "modules_to_save": None, "use_dora": False}, None),
    ],
)
def test_what_vllm_cannot_apply(config, reason):
    found = engines.adapter_limits(config)
    assert found == [] if reason is None else len(found) == 1 and reason in found[0]


@pytest.mark.parametrize(
    ("host", "here"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_loopback(host, here):
    assert engines.is_loopback(host) is here


def vllm_parsed(words):
    """What vLLM's own parser makes of a command. It is imported without its compiled parts, as on a CPU."""
    platforms = pytest.importorskip("vllm.platforms")
    from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.platforms.cpu import CpuPlatform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    platforms._current_platform = CpuPlatform()
    return make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:])


@pytest.mark.parametrize("served", [MERGED, ADAPTER])
def test_every_word_for_vllm_is_one_of_its_parser(served):
    known = json.loads((Path(__file__).parent / "vllm_flags.json").read_text())
    words = command("vllm", served, "127.0.0.1", 8000)
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        if flag.startswith("--"):
            choices = known["flags"][flag]
            assert choices is None or value in choices
    assert tuple(map(int, known["flags"]["--max-lora-rank"])) == engines.VLLM_RANKS
    assert set(known["environment"]) & set(engines.environment("vllm", "k", {}))


@pytest.mark.slow
@pytest.mark.parametrize("served", [MERGED, ADAPTER])
def test_vllms_own_parser_takes_the_command(served):
    found = vllm_parsed(command("vllm", served, "127.0.0.1", 8000))
    assert found.model_tag == str(served.merged or served.base) and found.dtype == served.dtype
    assert found.chat_template == str(served.template) and (found.host, found.port) == ("127.0.0.1", 8000)
    assert found.max_model_len == served.context
    if served is ADAPTER:
        assert found.enable_lora and found.max_lora_rank == 32
        assert [(m.name, m.path) for m in found.lora_modules] == [("mine", "/a")]


def test_a_check_without_a_merged_model_is_refused_before_an_engine_starts(tmp_path):
    from finetune.cli.serve import _serve
    from finetune.utils.console import Screen

    served = engines.Served("tiny", base=str(tmp_path), adapter=tmp_path)
    with pytest.raises(InputError, match="no merged model to compare with"):
        _serve("tiny", served, "auto", "127.0.0.1", 8000, check=True, roots=(tmp_path, tmp_path), screen=Screen())
    assert not (tmp_path / "serve").exists()
