"""What transformers' own export wrote becomes a bundle without exporting again; what it lacks is named."""

import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from tests.zoo import models, tokenizers

from genbundle.builder import pack_bundle
from genbundle.builder.cli import pack as command
from genbundle.builder.noise import quiet
from genbundle.bundles import BuildError, UnsupportedModelError, VerificationError
from genbundle.runtime import load_bundle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny llama as transformers' `export_for_generation` and `save_pretrained` leave it, with its tokenizer."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    folder, model = tmp_path_factory.mktemp("exported"), models.make("llama_tied")
    ids = torch.randint(5, 190, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with quiet():
        whole = OnnxExporter().export_for_generation(
            model, {"input_ids": ids, "attention_mask": mask}, OnnxConfig(dynamic=True)
        )
        whole.save_pretrained(folder)
    tokenizers.chat_tokenizer(models.VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(exported, tmp_path):
    """A copy to damage."""
    return shutil.copytree(exported, tmp_path / "exported")


def edit(folder, change):
    described = json.loads((folder / "export.json").read_text())
    change(described)
    (folder / "export.json").write_text(json.dumps(described))


def pack(folder, tmp_path, **arguments):
    return pack_bundle(folder, output=tmp_path / "b", progress=False, **arguments)


def test_with_the_model_it_is_verified_as_a_build_is(exported, tmp_path):
    bundle = pack(exported, tmp_path, model=models.make("llama_tied"))
    assert bundle.manifest.verification is not None
    assert {check.name for check in bundle.manifest.verification.checks} >= {"one token", "padded batch"}
    assert bundle.manifest.settings == {"packed": True}
    # Prompt, step, and each one's embedding and head hold the weights once; transformers' export four times.
    size = bundle.manifest.files["weights.safetensors"].size
    assert size < 1.1 * bundle.manifest.model.weight_bytes
    assert bundle.manifest.model.parameters == models.make("llama_tied").num_parameters()
    model = load_bundle(bundle)
    prompt = model.text.encode("hello", add_special_tokens=False)
    with torch.no_grad():
        expected = models.make("llama_tied").generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert model.generate(input_ids=np.array([prompt]), max_new_tokens=8).sequences.tolist() == expected.tolist()


def test_without_the_model_it_says_what_was_compared(exported, tmp_path):
    bundle = pack(exported, tmp_path)
    assert bundle.manifest.verification is None
    assert "golden.msgpack" not in bundle.manifest.files
    notes = " ".join(bundle.manifest.notes)
    assert "not compared with the model that was exported" in notes
    assert "prompts of 3 to 13 tokens give what steps give, a padded batch what its sequences give alone" in notes
    assert "no generation_config.json" in notes


def test_command(exported, tmp_path, capsys):
    command.main([str(exported), "--output", str(tmp_path / "c"), "--no-tokenizer", "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["verification"] is None and told["backend"] == "cpu"
    assert load_bundle(tmp_path / "c").generate(input_ids=np.array([[7, 8]]), max_new_tokens=2).sequences.shape == (
        1,
        4,
    )
    with pytest.raises(BuildError, match="no such directory"):
        command.main([str(tmp_path / "missing")], standalone_mode=False)


def test_another_model_is_told_apart(exported, tmp_path):
    other = models.make("llama_tied")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(VerificationError, match="differ from eager's"):
        pack(exported, tmp_path, model=other)
    with pytest.raises(BuildError, match="a LlamaForCausalLM was exported, and the model to compare with is a Qwen2"):
        pack(exported, tmp_path, model=models.make("qwen2"))
    assert not (tmp_path / "b").exists()


def cut(name, size):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return damage


def without(stage):
    return lambda folder: edit(folder, lambda described: described["components"].pop(stage))


def traced(stage, name, value):
    return lambda folder: edit(
        folder, lambda described: described["components"][stage]["metadata"]["kwargs"].update({name: value})
    )


def recorded(stage, name, value):
    return lambda folder: edit(
        folder, lambda described: described["components"][stage]["metadata"].update({name: value})
    )


def told(name, value):
    return lambda folder: edit(folder, lambda described: described.update({name: value}))


def named(stages):
    """The same components under other names."""

    def change(described):
        entry = described["components"]["decode"]
        described["components"] = dict.fromkeys(stages, entry)

    return lambda folder: edit(folder, change)


def outside(folder):
    edit(folder, lambda described: described["components"]["decode"].update(file="../decode.onnx"))


def configured(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def claiming(length):
    """A weight that says it is 4 * 10^18 bytes, of which the graph reads `length`."""

    def change(folder):
        proto = onnx.load(folder / "decode.onnx", load_external_data=False)
        weight = next(item for item in proto.graph.initializer if item.external_data)
        weight.dims[:] = [10**9, 10**9]
        kept = [(entry.key, entry.value) for entry in weight.external_data if entry.key != "length"]
        del weight.external_data[:]
        for key, value in [*kept, *([] if length is None else [("length", str(length))])]:
            weight.external_data.add(key=key, value=value)
        (folder / "decode.onnx").write_bytes(proto.SerializeToString())

    return change


def constant_elsewhere(folder):
    proto = onnx.load(folder / "decode.onnx", load_external_data=False)
    value = onnx.TensorProto(name="far", dims=[4], data_type=onnx.TensorProto.FLOAT, data_location="EXTERNAL")
    value.external_data.add(key="location", value="../secret")
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["far"], value=value))
    (folder / "decode.onnx").write_bytes(proto.SerializeToString())


def function_elsewhere(folder):
    """A function's own default for an attribute that one of its nodes refers to."""
    proto = onnx.load(folder / "decode.onnx", load_external_data=False)
    value = onnx.TensorProto(name="far", dims=[4], data_type=onnx.TensorProto.FLOAT, data_location="EXTERNAL")
    value.external_data.add(key="location", value="../secret")
    node = onnx.helper.make_node("Constant", [], ["far"])
    node.attribute.add(name="value", ref_attr_name="given", type=onnx.AttributeProto.TENSOR)
    function = onnx.helper.make_function(
        "mine", "Far", [], ["far"], [node], [onnx.helper.make_opsetid("", 18)],
        attribute_protos=[onnx.helper.make_attribute("given", value)],
    )  # fmt: skip
    proto.functions.append(function)
    (folder / "decode.onnx").write_bytes(proto.SerializeToString())


def with_fixed_length(folder):
    model = ir.load(folder / "prefill.onnx")
    model.graph.inputs[0].shape = ir.Shape([2, 9])
    ir.save(model, folder / "prefill.onnx")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / "export.json").unlink(), BuildError, "holds no export.json: expected a directory"),
        (lambda folder: (folder / "export.json").write_text("{"), BuildError, "export.json' is damaged"),
        (lambda folder: (folder / "export.json").write_text("[]"), BuildError, "isn't transformers'"),
        (told("schema_version", 2), BuildError, "is of schema 2, and known here is 1"),
        (told("export_format", "tflite"), BuildError, "unknown format 'tflite': expected 'onnx'"),
        (told("export_format", "executorch"), BuildError, "in the format 'executorch', and only 'onnx' can be packed"),
        (without("decode"), UnsupportedModelError, "the component 'decode' is missing"),
        (without("prefill"), UnsupportedModelError, "the component 'prefill' is missing, and 'decode' takes one token"),
        (named(["model"]), UnsupportedModelError, "the components 'prefill' and 'decode' are missing"),
        (named(["language_model", "lm_head", "decode"]), UnsupportedModelError, "(the merge) is missing"),
        (named(["decode", "rerank"]), UnsupportedModelError, "nothing says what the component 'rerank' is for"),
        (lambda folder: (folder / "decode.onnx").unlink(), BuildError, "the file 'decode.onnx' of the component"),
        (outside, BuildError, "the file '../decode.onnx' of the component 'decode' is missing"),
        (cut("prefill.onnx", 5000), BuildError, "the graph 'prefill.onnx' of the component 'prefill' is damaged"),
        (cut("prefill.onnx", 0), BuildError, "the graph 'prefill.onnx' of the component 'prefill'"),
        (cut("decode.onnx.data", 9000), BuildError, "the file 'decode.onnx.data' with the weights of the component"),
        (
            with_fixed_length,
            UnsupportedModelError,
            "prompt: input_ids has the sizes [2, 9], and lengths have to be free",
        ),
        (
            traced("decode", "past_key_values", {"container": "StaticCache"}),
            UnsupportedModelError,
            "decode: its past is a StaticCache",
        ),
        (
            traced("decode", "token_type_ids", {"rank": 2, "shape": [2, 1], "dtype": "int64"}),
            UnsupportedModelError,
            "decode: its input 'token_type_ids' has no explanation without the model",
        ),
        (recorded("decode", "export_dtype", "bfloat16"), UnsupportedModelError, "decode: exported at bfloat16"),
        (recorded("decode", "architecture", "MyModel"), UnsupportedModelError, "architecture 'MyModel' isn't one of"),
        (
            recorded("decode", "architecture", "LlamaForSequenceClassification"),
            UnsupportedModelError,
            "architecture 'LlamaForSequenceClassification' isn't one of the causal language models",
        ),
        (configured(num_hidden_layers=10**9), BuildError, "config.json says 1000000000 layers, 0 of them with another"),
        (configured(num_hidden_layers="2"), BuildError, "config.json' makes no LlamaForCausalLM"),
        (
            lambda folder: (folder / "export.json").write_text("[" * 200_000),
            BuildError,
            "export.json' is damaged: maximum recursion depth",
        ),
        (recorded("decode", "kwargs", [1]), BuildError, "export.json: 'kwargs' of the component 'decode' isn't an"),
        (recorded("decode", "packages", "all"), BuildError, "'packages' of the component 'decode' isn't an object"),
        (recorded("prefill", "export_config", [1]), BuildError, "'export_config' of the component 'prefill' isn't an"),
        (traced("decode", "input_ids", 3), BuildError, "'input_ids' in 'kwargs' of the component 'decode' isn't an"),
        (claiming(16), BuildError, "of the component 'decode' is 4000000000000000000 bytes, and its graph reads 16"),
        (claiming(None), BuildError, "with the weights of the component 'decode' is cut short"),
        (function_elsewhere, BuildError, "'far' inside a node of the component 'decode' reads from another file"),
        (constant_elsewhere, BuildError, "'far' inside a node of the component 'decode' reads from another file"),
        (lambda folder: (folder / "config.json").unlink(), BuildError, "config.json' makes no LlamaForCausalLM"),
        (
            lambda folder: (folder / "tokenizer_config.json").unlink(),
            BuildError,
            "holds no tokenizer: save it there (tokenizer.save_pretrained), name where it is",
        ),
    ],
)
def test_bad_directories(damage, error, message, copy, tmp_path):
    damage(copy)
    with pytest.raises(error) as raised:
        pack(copy, tmp_path)
    assert message in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_programs_that_do_not_agree(copy, tmp_path):
    data = bytearray((copy / "prefill.onnx.data").read_bytes())
    data[:4096] = np.frombuffer(data[:4096], np.float32)[::-1].tobytes()
    (copy / "prefill.onnx.data").write_bytes(data)
    with pytest.raises(VerificationError, match="the exported programs don't agree: step 0 of a prompt of 7 tokens"):
        pack(copy, tmp_path)


def test_a_program_of_several_tokens_is_enough(tmp_path):
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    ids = torch.randint(5, 190, (2, 9), generator=torch.Generator().manual_seed(0))
    with quiet():
        whole = OnnxExporter().export_for_generation(
            models.make("gpt2"), {"input_ids": ids}, OnnxConfig(dynamic=True), multi_token_decode=True
        )
        del whole.components["prefill"]
        whole.save_pretrained(tmp_path / "exported")
    bundle = pack(tmp_path / "exported", tmp_path, processor=False, model=models.make("gpt2"))
    assert [program.name for program in bundle.manifest.programs] == ["decode"]
    assert bundle.manifest.flow.continues
    assert bundle.manifest.verification is not None
