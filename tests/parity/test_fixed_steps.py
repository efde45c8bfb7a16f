"""Steps of fixed sizes, as a GPU records them, on ONNX Runtime's CPU provider: the same sessions, weights and buffers,
but for the recording itself."""

import gc
import logging

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from genbundle.builder import build_bundle
from genbundle.builder.attention import BufferLayer
from genbundle.bundles import open_bundle
from genbundle.runtime import Model
from genbundle.runtime.backends import onnx_steps
from genbundle.runtime.backends.onnx_device import overwrite
from genbundle.runtime.backends.onnxruntime import OnnxRuntimeBackend
from genbundle.runtime.generate import steps
from tests.parity.test_parity import arrays, eager, padded
from tests.zoo import models

pytestmark = pytest.mark.slow
ONE = {"input_ids": models.text_ids(21, seed=5)}
THREE = padded(models.text_ids(3, seed=6), models.text_ids(14, seed=7), models.text_ids(8, seed=8))


def kept(made) -> Model:
    """The bundle as a GPU runs it."""
    return Model(made, OnnxRuntimeBackend(onnxruntime, made, "cpu", None, kept=True))


def fixed(model) -> dict:
    """Sizes -> the session for them, of the program of the steps."""
    found = model.backend.program(model.bundle.manifest.flow.step[-1])._steps._steps
    return {(dict(key)["batch"], dict(key)["capacity"]): step for key, step in found.items()}


def steps_of(model, inputs):
    """Twelve steps, with their logits."""
    return steps(model.wiring, *model._prepare(None, None, None, {**arrays(inputs), "max_new_tokens": 12}))


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(onnx_steps, "WORTHWHILE", 3)


def test_one_recording_for_each_size_however_many_generations(bundle):
    model, source = kept(bundle("llama", "cuda")), models.make("llama")
    for inputs in (ONE, THREE, ONE, ONE):
        expected = eager(source, inputs, max_new_tokens=12)
        got = model.generate(**arrays(inputs), max_new_tokens=12)
        np.testing.assert_array_equal(got.sequences, expected)
        gc.collect()
    assert {size: step._made for size, step in fixed(model).items()} == {(1, 256): 1, (3, 256): 1}


def test_a_generation_that_outgrows_its_buffers(bundle, monkeypatch):
    monkeypatch.setattr("genbundle.runtime.state._ROOM", 16)
    model, source = kept(bundle("llama", "cuda")), models.make("llama")
    expected = eager(source, ONE, max_new_tokens=60, eos_token_id=None)
    got = model.generate(**arrays(ONE), max_new_tokens=60, eos_token_id=())
    np.testing.assert_array_equal(got.sequences, expected)
    assert set(fixed(model)) == {(1, 32), (1, 64), (1, 128)}


def test_two_generations_at_once_have_buffers_of_their_own(bundle):
    model, source = kept(bundle("llama", "cuda")), models.make("llama")
    prompts = [{"input_ids": models.text_ids(size, seed=size)} for size in (9, 17)]
    streams = [model.stream(**arrays(prompt), max_new_tokens=12) for prompt in prompts]
    together = [(one.token_id, other.token_id) for one, other in zip(*streams, strict=True)]
    for index, prompt in enumerate(prompts):
        expected = eager(source, prompt, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
        assert [pair[index] for pair in together] == expected.tolist()
    assert fixed(model)[1, 256]._made == 2


def test_logits_of_a_step_stay_when_the_next_is_taken(bundle):
    model = kept(bundle("llama", "cuda"))
    logits = [step.logits for step in steps_of(model, ONE)]
    again = [step.logits.copy() for step in steps_of(model, ONE)]
    for one, other in zip(logits, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_steps_go_on_without_a_recording_where_the_engine_refuses_one(bundle, caplog):
    model, source = kept(bundle("llama", "cuda")), models.make("llama")
    program = model.backend.program("decode")

    def refuse(sizes):
        raise RuntimeError("This session cannot use the graph capture feature\nas requested")

    program._steps._open_session = refuse
    with caplog.at_level(logging.WARNING):
        got = model.generate(**arrays(ONE), max_new_tokens=12)
    np.testing.assert_array_equal(got.sequences, eager(source, ONE, max_new_tokens=12))
    assert [record.getMessage().partition(" at ")[0] for record in caplog.records] == ["decode: steps aren't recorded"]
    assert "cannot use the graph capture feature" in caplog.text


def test_sessions_read_one_copy_of_the_weights(bundle):
    model = kept(bundle("llama_tied", "cuda"))
    last = list(steps_of(model, ONE))[-1]
    assert np.abs(last.logits).max() > 0.1
    for value, shared in zip(model.backend._weights._owned, model.backend._weights._kept.values(), strict=True):
        overwrite(value, np.zeros_like(shared.numpy()))
    for step in steps_of(model, ONE):  # the prompt's session, then the steps' two
        assert np.abs(step.logits).max() < 1e-6
    assert fixed(model)[1, 256]._made > 0


def test_sessions_of_fixed_sizes_compute_no_shapes(bundle, tmp_path):
    made = bundle("llama", "cuda")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fixed.onnx")
    options.log_severity_level = 3
    for symbol, size in {"batch": 1, "sequence": 1, "capacity": 256}.items():
        options.add_free_dimension_override_by_name(symbol, size)
    onnxruntime.InferenceSession(made.file("decode.onnx"), options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in ir.load(tmp_path / "fixed.onnx").graph.all_nodes()}
    assert not operators & {"Shape", "Size", "Range", "ConstantOfShape", "NonZero", "If", "Loop"}
    assert "ScatterElements" in operators


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bits(precision, tmp_path):
    """At bfloat16 through the twin that the build verifies, since the CPU has no such kernels."""
    from genbundle.builder.twins import runnable

    source, path = models.make("llama"), tmp_path / "b"
    samples = models.samples("llama")
    build_bundle(source, samples, "cuda", precision=precision, quality_floor=None, output=path, progress=False)
    with runnable(open_bundle(path)) as made:
        plain = OnnxRuntimeBackend(onnxruntime, made, "cpu", None)
        expected = Model(made, plain).generate(**arrays(THREE), max_new_tokens=12)
        got = kept(made).generate(**arrays(THREE), max_new_tokens=12)
    np.testing.assert_array_equal(got.sequences, expected.sequences)
    assert {item.shape[2] for item in made.manifest.state} == {"capacity"}


def test_a_model_that_answers_otherwise_so_keeps_growing_state(monkeypatch, tmp_path):
    """Its own code wouldn't follow buffers: here, since they say that no token came before."""
    monkeypatch.setattr(BufferLayer, "get_seq_length", lambda self: self.start[0] * 0)
    source, samples = models.make("llama"), models.samples("llama")
    made = build_bundle(source, samples, "cuda", output=tmp_path / "b", progress=False)
    assert {item.shape[2] for item in made.manifest.state} == {"past"}
    assert any("no CUDA graph can record" in note for note in made.manifest.notes)
    got = kept(made).generate(**arrays(THREE), max_new_tokens=12)
    np.testing.assert_array_equal(got.sequences, eager(source, THREE, max_new_tokens=12))
