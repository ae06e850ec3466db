"""What differs between an adapter and the recipe that goes on from it, found from the files alone."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from finetune.errors import InputError
from finetune.lora.resume import require_same
from finetune.lora.start import Adapter, Base, problems, read_adapter
from finetune.models.architecture import read_modules
from finetune.recipe import Lora
from finetune.utils.files import read_json, write_json
from tests.helpers.tiny_models import VOCABULARY, save_adapter, save_tiny

OURS = {"r": 4, "alpha": 12, "targets": ["q_proj", "down_proj"]}
BASE = "builtin:tiny-mistral"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "base", tie_word_embeddings=False)


def known(base):
    sizes = {"q_proj": (64, 64), "down_proj": (112, 64), "v_proj": (64, 32)}
    return Base(BASE, read_modules(base, False), read_json(base / "config.json"), sizes)


def found(base, folder, **lora):
    return problems(Lora(**{**OURS, **lora}), read_adapter(folder), known(base))


# peft's settings of the adapter -> the recipe's fields that must be named
SETTABLE = {
    "another rank": ({"r": 8}, ["r"]),
    "another alpha": ({"lora_alpha": 3}, ["alpha"]),
    "rslora": ({"use_rslora": True}, ["rslora"]),
    "dora": ({"use_dora": True}, ["dora"]),
    "ranks by name": ({"rank_pattern": {"q_proj": 2}}, ["rank_pattern"]),
    "alphas by name": ({"alpha_pattern": {"q_proj": 2}}, ["alpha_pattern"]),
    "other targets": ({"target_modules": ["v_proj"]}, ["targets"]),
    "targets by an expression": ({"target_modules": r".*\.0\.(self_attn\.v_proj|mlp\.up_proj)"}, ["targets"]),
    "the last layer": ({"layers_to_transform": [1]}, ["last_layers"]),
    "a head trained whole": ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
    "several at once": (
        {"r": 2, "target_modules": ["k_proj", "o_proj"], "use_rslora": True},
        ["r", "rslora", "targets"],
    ),
}
REFUSED = {
    "biases": ({"bias": "lora_only"}, "bias is 'lora_only' in the adapter"),
    "a bias of B": ({"lora_bias": True}, "lora_bias is set"),
    "trainable tokens": ({"trainable_token_indices": [3, 5]}, "trainable tokens"),
    "LoRA on the head": ({"target_modules": ["q_proj", "down_proj", "lm_head"]}, "LoRA on lm_head"),
    "LoRA on embeddings": ({"target_modules": ["q_proj", "down_proj", "embed_tokens"]}, "LoRA on embeddings"),
    "the first layer": ({"layers_to_transform": [0]}, "not the last 1"),
}


def test_an_adapter_of_the_recipe_has_no_problem(base, tmp_path):
    save_adapter(base, tmp_path / "a")
    assert found(base, tmp_path / "a") == []
    require_same(Lora(**OURS), tmp_path / "a", base, BASE, False)


@pytest.mark.parametrize("name", SETTABLE)
def test_every_field_that_differs_is_named_and_setting_it_as_told_helps(base, tmp_path, name):
    settings, fields = SETTABLE[name]
    save_adapter(base, tmp_path / "a", **settings)
    told = found(base, tmp_path / "a")
    assert sorted(at[1] for at, _ in told) == sorted(fields), told
    fixed = {}
    for (_, field), why in told:
        fixed[field] = yaml.safe_load(re.search(r"set (?:lora\.\w+|it to):? (.+)$", why)[1])
    assert found(base, tmp_path / "a", **fixed) == []
    with pytest.raises(InputError) as error:
        require_same(Lora(**OURS), tmp_path / "a", base, BASE, False)
    assert len(str(error.value).splitlines()) == len(fields)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_continued_says_why_and_can_be_imported(base, tmp_path, name):
    settings, words = REFUSED[name]
    save_adapter(base, tmp_path / "a", **settings)
    told = [why for _, why in found(base, tmp_path / "a")]
    assert any(words in why and "finetune merge" in why for why in told), told
    assert problems(Lora(**OURS), read_adapter(tmp_path / "a"), known(base), importing=True) == []


def test_another_vocabulary_and_another_base_are_named(base, tmp_path):
    wider = save_tiny(tmp_path / "wider", vocab_size=VOCABULARY + 8, tie_word_embeddings=False)
    save_adapter(wider, tmp_path / "a", modules_to_save=["lm_head", "embed_tokens"])
    told = found(base, tmp_path / "a", modules_to_save=["lm_head", "embed_tokens"])
    assert len(told) == 2 and all("136 rows" in why and at == ("model",) for at, why in told)
    broad = save_tiny(tmp_path / "broad", hidden_size=96)
    save_adapter(broad, tmp_path / "b")
    ((at, why),) = found(base, tmp_path / "b")
    assert at == ("model",) and "96" in why
    deep = save_tiny(tmp_path / "deep", num_hidden_layers=3)
    save_adapter(deep, tmp_path / "c")
    ((at, why),) = found(base, tmp_path / "c")
    assert at == ("model",) and "layers.2" in why


def test_an_adapter_on_modules_that_are_not_trained_here_can_be_imported(tmp_path):
    shape = {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    gpt2 = save_tiny(tmp_path / "gpt2", "gpt2", **shape)  # its layers are Conv1D
    save_adapter(gpt2, tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    known_base = Base(BASE, read_modules(gpt2, False), read_json(gpt2 / "config.json"))
    adapter = read_adapter(tmp_path / "a")
    assert problems(Lora(**OURS), adapter, known_base, importing=True) == []
    other = Base(BASE, read_modules(save_tiny(tmp_path / "b"), False))
    ((at, why),) = problems(Lora(**OURS), adapter, other, importing=True)
    assert at == ("model",) and "which the base does not have" in why


@pytest.mark.parametrize("importing", [False, True])
def test_a_base_of_another_name_is_refused_unless_the_recipe_says_that_it_is_the_same(base, importing):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "base_model_name_or_path": "them/theirs-bnb-4bit"}
    adapter = Adapter("them/adapter", config)
    mine = Base("them/theirs")
    lora = Lora(**OURS, start_from="./x", start_folder="/x")
    ((at, why),) = problems(lora, adapter, mine, importing=importing)
    assert at == ("model",) and "set model: them/theirs-bnb-4bit" in why and "lora.start_base" in why
    same = lora.model_copy(update={"start_base": "them/theirs-bnb-4bit"})
    assert problems(same, adapter, mine, importing=importing) == []
    assert problems(lora, adapter, Base("folder:theirs"), importing=importing) == []  # a folder's name says nothing


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "must hold a JSON object"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickle"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 40), "cut short"),
    ],
)
def test_a_folder_that_is_no_adapter_is_named(base, tmp_path, spoil, words):
    save_adapter(base, tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(InputError, match=words):
        read_adapter(tmp_path / "a")


def test_an_adapter_of_another_type_is_refused(base, tmp_path):
    save_adapter(base, tmp_path / "a")
    config = read_json(tmp_path / "a" / "adapter_config.json")
    write_json(tmp_path / "a" / "adapter_config.json", {**config, "peft_type": "IA3"})
    ((at, why),) = found(base, tmp_path / "a")
    assert at == ("lora", "start_from") and "type IA3" in why


def test_validate_tells_every_mismatch_with_its_line_and_without_torch(base, tmp_path):
    save_adapter(base, tmp_path / "a", r=8, use_rslora=True)
    recipe = tmp_path / "one.yaml"
    recipe.write_text(
        f"schema: 1\nname: one\nmodel: {base}\ndata:\n  - {{source: pydoc}}\n"
        "lora:\n  r: 4\n  alpha: 12\n  targets: [q_proj, down_proj]\n  start_from: ./a\n"
    )
    code = (
        "import sys; sys.argv = ['finetune', 'validate', sys.argv[1]]\n"
        "from finetune.cli.main import main\n"
        "try: main()\nfinally: assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "one.yaml:7: lora.r: r is 8 in the adapter and 4 here; set lora.r: 8" in done.stderr
    assert "lora.rslora" in done.stderr and "AssertionError" not in done.stderr
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 8
