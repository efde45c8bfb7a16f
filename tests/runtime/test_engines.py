"""Bundles whose engine, device or version isn't here: the error says what is missing and what to do."""

import re
import sys
import threading
from dataclasses import replace

import pytest
from tests.bundles.samples import fill, manifest

from genbundle.bundles import BundleError, EngineError, InputError, MissingExtraError, open_bundle
from genbundle.bundles.manifest import Flow, Route
from genbundle.bundles.writer import new_bundle
from genbundle.runtime import load_bundle
from genbundle.runtime.backends import onnx_weights
from genbundle.runtime.backends import onnxruntime as onnxruntime_module
from genbundle.runtime.backends.executorch import ExecuTorchProgram
from genbundle.runtime.backends.onnx_file import external_weights, named_files
from genbundle.runtime.inspection import as_text


@pytest.fixture
def bundle(tmp_path):
    """`bundle(**changes)`: the sample bundle on disk with another manifest."""

    def make(**changes):
        with new_bundle(tmp_path / "sample.bundle") as writer:
            fill(writer.path)
            return writer.commit(manifest(**changes))

    return make


@pytest.mark.parametrize(
    ("backend", "module", "extra"),
    [
        ("cpu", "onnxruntime", "onnx"),
        ("cuda", "onnxruntime", "onnx-gpu"),
        ("torch", "torch", "torch"),
        ("xnnpack", "executorch.runtime", "executorch"),
    ],
)
def test_a_missing_engine_names_its_extra(backend, module, extra, bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    made = bundle(backend=backend, packages={"torch": "2.13.0"})
    with pytest.raises(MissingExtraError, match=rf"running an? '{backend}' bundle.*pip install 'genbundle\[{extra}\]'"):
        load_bundle(made.path)


def test_cuda_where_no_cuda_provider_is(bundle):
    made = bundle(backend="cuda")
    with pytest.raises(EngineError, match=r"no CUDA provider here \(ONNX Runtime has .*load it with device='cpu'"):
        load_bundle(made.path)
    assert load_bundle(made.path, device="cpu").backend.device == "cpu"


def test_a_device_that_is_none(bundle):
    with pytest.raises(EngineError, match="unknown device 'tpu': an ONNX bundle runs on 'cpu' or 'cuda'"):
        load_bundle(bundle().path, device="tpu")


@pytest.mark.parametrize("device", ["tpu", "cpu:x", "cpu:0", "cuda:", "cuda:x"])
def test_torch_devices_that_are_none(bundle, device):
    import torch

    made = bundle(backend="torch", packages={"torch": torch.__version__})
    with pytest.raises(EngineError, match=f"unknown device '{device}': a 'torch' bundle runs on 'cpu', 'cuda' or"):
        load_bundle(made.path, device=device)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "xnnpack"])
def test_only_torch_bundles_are_compiled(backend, bundle):
    expected = rf"a '{backend}' bundle can't be compiled: .*only bundles built with the backend 'torch' can"
    with pytest.raises(EngineError, match=expected):
        load_bundle(bundle(backend=backend).path, compiled=True)


def test_a_torch_bundle_of_another_version(bundle):
    with pytest.raises(EngineError, match=r"exported with torch 2\.1\.0, 2\.\d+\.\d+ is installed: install torch 2\.1"):
        load_bundle(bundle(backend="torch", packages={"torch": "2.1.0"}).path)


def test_a_program_that_is_none(bundle):
    with pytest.raises(EngineError, match=r"ONNX Runtime can't open decode\.onnx"):
        load_bundle(bundle().path).generate(input_ids=[[1, 2]])


def test_a_provider_that_does_not_start(bundle, monkeypatch):
    """ONNX Runtime lists the CUDA provider wherever its build has it, and falls back where no driver is."""
    import onnxruntime

    class Session:
        def __init__(self, *args, **kwargs):
            pass

        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime_module, "named_files", lambda content: set())
    monkeypatch.setattr(onnx_weights, "external_weights", lambda content: [])
    with pytest.raises(EngineError, match=r"couldn't start its CUDAExecutionProvider here .*device='cpu'"):
        load_bundle(bundle(backend="cuda").path).generate(input_ids=[[1, 2]])


def onnx_model(location, where="initializer"):
    """The bytes of a model with one weight at `location`."""
    import onnx_ir as ir
    from onnx_ir import serde

    made = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="g"), ir_version=9)
    proto = serde.serialize_model(made)
    tensor = type(proto.graph.initializer.add())(name="w", data_type=2, dims=[4], data_location=1)
    del proto.graph.initializer[:]
    for key, value in (("offset", "0"), ("location", location)):
        tensor.external_data.add(key=key, value=value)
    if where == "initializer":
        proto.graph.initializer.append(tensor)
    elif where == "sparse":
        proto.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif where == "constant":
        proto.graph.node.add(op_type="Constant").attribute.add(name="value", type=4).t.CopyFrom(tensor)
    elif where == "subgraph":
        inside = proto.graph.node.add(op_type="If").attribute.add(name="then_branch", type=5).g
        inside.initializer.append(tensor)
    else:
        node = proto.functions.add(name="f").node.add(op_type="Constant")
        node.attribute.add(name="value", type=9).tensors.append(tensor)
    return proto.SerializeToString()


@pytest.mark.parametrize("where", ["initializer", "sparse", "constant", "subgraph", "function"])
@pytest.mark.parametrize("location", ["unlisted.bin", "../secret", "/etc/passwd", "x/../weights.safetensors", ""])
def test_programs_that_read_files_which_the_manifest_does_not_list(tmp_path, where, location):
    assert named_files(onnx_model(location, where=where)) == {location}
    with new_bundle(tmp_path / "sample.bundle") as writer:
        fill(writer.path)
        (writer.path / "decode.onnx").write_bytes(onnx_model(location, where=where))
        made = writer.commit(manifest())
    (made.path / "unlisted.bin").write_bytes(bytes(4))
    with pytest.raises(BundleError, match=rf"decode\.onnx: reads the file '{re.escape(location)}', which the manifest"):
        load_bundle(made.path).generate(input_ids=[[1, 2]])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cpu_instead_of_a_gpu_but_for_bfloat16(bundle, precision):
    program = replace(manifest().programs[0], precision=precision)
    with pytest.raises(EngineError) as caught:
        load_bundle(bundle(backend="cuda", programs=(program,)).path)
    assert ("device='cpu'" in str(caught.value)) == (precision == "fp32")


def test_weights_as_programs_have_them():
    """Against onnx_ir's reading: shape, type and place of each, however the shape is written."""
    import onnx_ir as ir

    shapes = [(3, 4), (300, 2, 1), ()]
    tensors = [
        ir.ExternalTensor("w.bin", 64 * n, 12, ir.DataType.BFLOAT16, shape=ir.Shape(shape), name=f"w{n}")
        for n, shape in enumerate(shapes)
    ]
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="g")
    for tensor in tensors:
        graph.register_initializer(ir.Value(name=tensor.name, const_value=tensor))
    content = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    found = external_weights(content)
    assert [(item.name, item.shape, item.dtype, item.location) for item in found] == [
        (f"w{n}", shape, 16, "w.bin") for n, shape in enumerate(shapes)
    ]
    assert [(item.offset, item.length) for item in found] == [(0, 12), (64, 12), (128, 12)]
    packed = b"\x0a\x03\x03\xac\x02"  # 3 and 300 in one field
    entries = b"".join(
        b"\x6a" + bytes([len(entry)]) + entry
        for entry in (b"\x0a\x08location\x12\x01f", b"\x0a\x06offset\x12\x010", b"\x0a\x06length\x12\x018")
    )
    tensor = packed + b"\x10\x01" + entries
    graph_bytes = b"\x2a" + bytes([len(tensor)]) + tensor
    assert external_weights(b"\x3a" + bytes([len(graph_bytes)]) + graph_bytes)[0].shape == (3, 300)


def test_locations_written_as_no_library_writes_them():
    """Value before key, lengths in more bytes than needed, keys twice: every protobuf reader takes them."""
    entry = b"\x12\x83\x00a.b" + b"\x0a\x01x" + b"\x0a\x08location"
    tensor = b"\x6a" + bytes([len(entry)]) + entry
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    assert named_files(b"\x08\x09" + b"\x3a" + bytes([len(graph)]) + graph) == {"a.b"}
    wide = b"\xba\x80\x80\x80\x10" + bytes([len(graph)]) + graph  # protobuf drops the tag's 33rd bit
    for broken in (b"\x3a", b"\x3a\x05ab", b"\xff" * 20, b"\x3b", b"\x02\x00", wide):
        with pytest.raises(ValueError):
            named_files(broken)


def test_steps_whose_positions_no_prompt_begins(bundle):
    first = manifest().programs[0]
    without = type(first)(
        name="prompt", file=first.file, roles=first.roles, inputs=first.inputs[:1], outputs=first.outputs
    )
    made = bundle(programs=(first, without), flow=Flow(prompt=(Route(programs=("prompt",)),), step=("decode",)))
    with pytest.raises(BundleError, match=r"the steps go on with \['cumsum .*'\], which the prompt .* never begins"):
        load_bundle(made.path)


def test_a_prompt_without_tokenizer_or_template(bundle):
    model = load_bundle(bundle(text=None).path)
    with pytest.raises(InputError, match="holds no tokenizer: give `input_ids`"):
        model.generate("Hello")


def test_words_that_steer_a_terminal_are_shown_as_what_they_are(bundle):
    name = "\x1b]0;owned\x07\x1b[31mred\u202e"
    shown = as_text(bundle(notes=(f"note {name}",), model=replace(manifest().model, name=name)))
    assert all(line.isprintable() for line in shown.split("\n"))
    assert shown.count(r"\x1b]0;owned\x07\x1b[31mred\u202e") == 2


def test_programs_without_inputs_and_outputs_are_shown(bundle):
    assert "decode  [merge" in as_text(bundle(programs=(replace(manifest().programs[0], inputs=(), outputs=()),)))


def test_opened_bundles_load_too(bundle):
    assert load_bundle(open_bundle(bundle().path)).bundle.manifest.backend == "cpu"


def test_a_method_of_other_outputs_than_the_manifest_names_is_an_engine_error():
    class Method:
        def execute(self, _):
            return []

    entry = replace(manifest().programs[0], inputs=())
    with pytest.raises(EngineError, match=f"gives 0 outputs, the manifest names {len(entry.outputs)}"):
        ExecuTorchProgram(entry, Method(), threading.Lock())({})
