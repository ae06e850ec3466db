"""A base that is quantised already: what the recipe is told before anything is built."""

import pytest

from finetune.models.quantized_base import method_of, problem

METHODS = ("gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "bitsandbytes", "a method of next year")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_named_with_what_to_take(method):
    config = {"quantization_config": {"quant_method": method}}
    said = problem(config, "lab/Model-7B", quantizes=True, merges=True)
    assert said is not None and f"stored quantised ({method})" in said and "16-bit model" in said
    alone = problem(config, "lab/Model-7B", quantizes=False, merges=False)
    assert (alone is None) == (method == "bitsandbytes")


@pytest.mark.parametrize(
    "name",
    ["Model-7B-bnb-4bit", "Model-7B-unsloth-bnb-4bit", "Model-7B-GPTQ-Int4", "Model-7B-AWQ", "Model-7B-FP8",
     "Model-7B-FP8-dynamic", "Model-7B-4bit", "Model-7B-quantized.w4a16"],
)  # fmt: skip
def test_the_16_bit_base_is_named_where_its_name_tells(name):
    said = problem({"quantization_config": {"quant_method": "x"}}, f"lab/{name}", quantizes=True, merges=True)
    assert "take model: lab/Model-7B," in said


def test_only_what_is_wrong_is_asked_for():
    config = {"quantization_config": {"load_in_4bit": True}}
    assert method_of(config) == "bitsandbytes"
    said = problem(config, "lab/Model", quantizes=True, merges=False)
    assert "set quantization: null, or take" in said and "merge: null" not in said
    assert "merge: null" in problem(config, "lab/Model", quantizes=False, merges=True)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_base_in_16_bits_is_let_through(config):
    assert method_of(config) is None
    assert problem(config, "lab/Model-7B-4bit", quantizes=True, merges=True) is None
