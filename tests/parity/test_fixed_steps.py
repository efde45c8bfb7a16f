"""Steps of fixed sizes, as a GPU records them, on ONNX Runtime's CPU provider: the same sessions, weights and buffers,
but for the recording itself."""

import gc
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from genbundle.builder import build_bundle
from genbundle.builder.attention import BufferLayer
from genbundle.bundles import EngineError, open_bundle
from genbundle.runtime import Model, load_bundle
from genbundle.runtime.backends import onnx_device, onnx_steps
from genbundle.runtime.backends.onnx_device import overwrite
from genbundle.runtime.backends.onnxruntime import OnnxRuntimeBackend
from genbundle.runtime.generate import steps
from genbundle.runtime.rewind import rewind
from genbundle.runtime.verify import verify_bundle
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
    assert set(fixed(model)) == {(1, 256), (3, 256)} and all(step.recorded for step in fixed(model).values())


def test_a_recording_is_one_of_buffers_that_go_from_generation_to_generation(bundle):
    model = kept(bundle("llama", "cuda"))
    model.generate(**arrays(ONE), max_new_tokens=12)
    gc.collect()
    before = fixed(model)[1, 256]
    for _ in range(3):
        model.generate(**arrays(ONE), max_new_tokens=12)
        gc.collect()
    assert fixed(model)[1, 256] is before
    assert all(len(sizes) == 1 for sizes in model.backend._pool._kept.values())


def test_buffers_that_no_longer_stay_are_recorded_anew(bundle, monkeypatch):
    monkeypatch.setattr(onnx_device, "_SIZES", 1)
    model, source = kept(bundle("llama", "cuda")), models.make("llama")
    for inputs in (ONE, THREE, ONE, ONE):
        expected = eager(source, inputs, max_new_tokens=12)
        np.testing.assert_array_equal(model.generate(**arrays(inputs), max_new_tokens=12).sequences, expected)
        gc.collect()
    pool = model.backend._pool
    assert len(pool._addresses) == len(pool._kept)
    assert pool.stay(fixed(model)[1, 256].recorded)


def test_the_replay_goes_through_the_sessions_that_a_gpu_records(bundle, monkeypatch):
    monkeypatch.undo()
    model = load_bundle(bundle("llama", "cuda"), device="cpu")
    assert len(verify_bundle(model)) >= 5
    assert {batch for batch, _ in fixed(model)} == {1, 3} and all(step.recorded for step in fixed(model).values())


def test_a_generation_that_outgrows_its_buffers(bundle, monkeypatch):
    monkeypatch.setattr("genbundle.runtime.state._SMALLEST_ROOM", 16)
    model, source = kept(bundle("llama", "cuda")), models.make("llama")
    expected = eager(source, ONE, max_new_tokens=60, eos_token_id=None)
    got = model.generate(**arrays(ONE), max_new_tokens=60, eos_token_id=())
    np.testing.assert_array_equal(got.sequences, expected)
    assert set(fixed(model)) == {(1, 32), (1, 64), (1, 128)}


def test_two_generations_at_once_have_buffers_of_their_own(bundle):
    model, source = kept(bundle("llama", "cuda")), models.make("llama")
    prompts = [{"input_ids": models.text_ids(size, seed=size)} for size in (9, 17, 5)]
    streams = [model.stream(**arrays(prompt), max_new_tokens=12) for prompt in prompts]
    together = [[chunk.token_id for chunk in chunks] for chunks in zip(*streams, strict=True)]
    for index, prompt in enumerate(prompts):
        expected = eager(source, prompt, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
        assert [row[index] for row in together] == expected.tolist()
    gc.collect()
    assert all(len(sizes) == 1 for sizes in model.backend._pool._kept.values())


def test_threads(bundle):
    model, source = kept(bundle("llama", "cuda")), models.make("llama")
    prompts = [{"input_ids": models.text_ids(size, seed=size)} for size in (9, 17, 5, 30)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda prompt: model.generate(**arrays(prompt), max_new_tokens=12).sequences, prompts))
    for prompt, sequences in zip(prompts, got, strict=True):
        np.testing.assert_array_equal(sequences, eager(source, prompt, max_new_tokens=12))


def test_rewound_sequences_go_on(bundle):
    model, source = kept(bundle("llama", "cuda")), models.make("llama")
    expected = eager(source, ONE, max_new_tokens=12, eos_token_id=None)[0, 21:]
    logits, sequences = model.wiring.prompt({**arrays(ONE), "attention_mask": np.ones((1, 21), np.int64)})
    for _ in range(2):
        taken = []
        for _ in range(8):
            taken.append(int(logits[0].argmax()))
            logits = model.wiring.step(np.array([[taken[-1]]]), sequences)
        assert taken == expected[:8].tolist()
        rewind(model.wiring, sequences, 21)
        logits = model.wiring.step(np.array([[expected[0]]]), sequences)
        rewind(model.wiring, sequences, 20)
        logits = model.wiring.step(arrays(ONE)["input_ids"][:, 20:], sequences)


def test_tokens_of_another_type_are_refused_not_misread(bundle):
    model = kept(bundle("llama", "cuda"))
    list(steps_of(model, ONE))
    _, sequences = model.wiring.prompt({**arrays(ONE), "attention_mask": np.ones((1, 21), np.int64)})
    with pytest.raises(EngineError, match="int32"):
        model.wiring.step(np.array([[5]], np.int32), sequences)


@pytest.mark.parametrize("name", ["mistral", "llava"])
def test_windows_and_pictures(name, bundle):
    model, source = kept(bundle(name, "cuda")), models.make(name)
    inputs = models.image_inputs(name, 6, 9, seed=20, grid=(1, 4, 4)) if name == "llava" else THREE
    np.testing.assert_array_equal(
        model.generate(**arrays(inputs), max_new_tokens=14).sequences, eager(source, inputs, max_new_tokens=14)
    )
    assert fixed(model)


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
    assert fixed(model)[1, 256].recorded


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


@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=pytest.mark.long), "bf16"])
def test_16_bits(precision, tmp_path):
    """At bfloat16 through the twin that the build verifies, since the CPU has no such kernels."""
    from genbundle.builder.twins import runnable

    source, path = models.make("llama"), tmp_path / "b"
    samples = models.samples("llama")
    build_bundle(source, samples, "cuda", precision=precision, quality_floor=None, output=path, progress=False)
    with runnable(open_bundle(path)) as made:
        plain = OnnxRuntimeBackend(onnxruntime, made, "cpu", None, kept=False)
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
    assert any("no CUDA graph records its steps: " in note for note in made.manifest.notes)
    got = kept(made).generate(**arrays(THREE), max_new_tokens=12)
    np.testing.assert_array_equal(got.sequences, eager(source, THREE, max_new_tokens=12))
