"""What another runtime can't open is refused at build, naming the runtime and the cause, and before the export."""

import pytest

from genbundle.builder import build_bundle
from genbundle.bundles import BuildError, UnsupportedModelError
from genbundle.runtime.cli import invoke
from tests.zoo import models


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"also": ["tflite"]}, "also: unknown runtime 'tflite': choose among ort-genai, transformers.js"),
        ({"also": "onnx"}, "also: unknown runtime 'onnx'"),
        (
            {"also": ["ort-genai"], "backend": "torch"},
            "also: ONNX Runtime GenAI opens bundles for the backend 'cpu' only, not those for 'torch'",
        ),
        (
            {"also": ["transformers.js"], "backend": "cuda", "precision": "fp16"},
            "also: transformers.js opens bundles for the backend 'cpu' only, not those for 'cuda'",
        ),
    ],
)
def test_arguments(arguments, message, tmp_path):
    with pytest.raises(BuildError) as raised:
        build_bundle(models.make("llama"), output=tmp_path / "b", progress=False, **arguments)
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "also", "message"),
    [
        ("llava", "ort-genai", "ONNX Runtime GenAI has no generic type for models with encoders (image_encoder)"),
        ("paligemma", "transformers.js", "transformers.js can't run it: PaliGemmaForConditionalGeneration: its "),
        ("qwen3_vl", "transformers.js", "transformers.js can't run it: Qwen3VLForConditionalGeneration: its "),
        (
            "idefics3",
            "transformers.js",
            "has nothing but pixel_values to feed image_encoder with, which takes pixel_values by",
        ),
    ],
)
def test_models(name, also, message, tmp_path):
    stages = []
    with pytest.raises(UnsupportedModelError) as raised:
        build_bundle(
            models.make(name), models.samples(name), also=[also], output=tmp_path / "b", progress=stages.append
        )
    assert message in str(raised.value)
    assert not any(stage.startswith("export") for stage in stages)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "also", "message"),
    [
        ("MambaForCausalLM", "ort-genai", "wants one program for prompt and step"),
        ("MambaForCausalLM", "transformers.js", "wants one program for prompt and step"),
        ("MptForCausalLM", "transformers.js", "keys and values, which grow, and decode also past_ids"),
        (
            "DeepseekV3ForCausalLM",
            "ort-genai",
            "keys and values of one size, and past_0_key has heads of 16, its values",
        ),
    ],
)
def test_state_that_it_does_not_carry(name, also, message, tmp_path):
    from tests.zoo import shrink

    model = shrink.make(name)
    with pytest.raises(UnsupportedModelError, match=message):
        build_bundle(
            model, shrink.variants(name, model)["build"], also=[also], output=tmp_path / "b",
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(("also", "label"), [("ort-genai", "ONNX Runtime GenAI"), ("transformers.js",) * 2])
def test_a_loop_that_begins_again(also, label, tmp_path):
    with pytest.raises(UnsupportedModelError, match=f"{label} doesn't run the sequence again at 60 tokens"):
        build_bundle(models.phi3(60), also=[also], output=tmp_path / "b", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_generation_config(tmp_path):
    model = models.make("llama")
    model.generation_config.suppress_tokens = [7]
    with pytest.raises(UnsupportedModelError, match="ONNX Runtime GenAI doesn't know suppress_tokens"):
        build_bundle(model, also=["ort-genai"], output=tmp_path / "b", progress=False)


def test_command(tmp_path, capsys):
    assert invoke(["build", str(tmp_path), "--also", "tflite", "--output", str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.strip() == (
        "genbundle: error: also: unknown runtime 'tflite': choose among ort-genai, transformers.js"
    )
