"""Finished bundles against `model.generate`: the same sequences for inputs that neither capture nor build saw."""

import gc
import itertools
import re
import shutil
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from genbundle.builder import build_bundle
from genbundle.bundles import BundleError, EngineError, InputError
from genbundle.runtime import load_bundle
from genbundle.runtime.state import State
from tests.benchmarks import answers
from tests.zoo import models

BACKENDS = ("cpu", "torch", "xnnpack")
# Those of test_stock_runners.py and test_limits.py, and one that differs from llama by where its norms are.
REPEATED = {("gemma2", "xnnpack"), ("phi3", "xnnpack"), ("olmo2", "xnnpack")}
pytestmark = pytest.mark.slow


def eager(model, inputs, **options):
    """The sequences of `model.generate`, greedily unless asked otherwise."""
    with torch.no_grad():
        return model.generate(**inputs, do_sample=False, **options).numpy()


def arrays(inputs):
    """Generate kwargs as numpy."""
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def padded(*rows):
    """Single sequences as one left-padded batch."""
    longest = max(row.shape[1] for row in rows)
    pad = torch.nn.functional.pad
    return {
        "input_ids": torch.cat([pad(row, (longest - row.shape[1], 0)) for row in rows]),
        "attention_mask": torch.cat([pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows]),
    }


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(*case, marks=pytest.mark.long if case in REPEATED else ())
        for case in itertools.product(models.TEXT, BACKENDS)
    ],
)
def test_text(name, backend, loaded):
    model, bundle = models.make(name), loaded(name, backend)
    single = {"input_ids": models.text_ids(21, seed=5)}
    batch = padded(models.text_ids(3, seed=6), models.text_ids(14, seed=7), models.text_ids(8, seed=8))
    for inputs, options in (
        (single, {"max_new_tokens": 15}),
        (batch, {"max_new_tokens": 15}),
        (single, {"max_new_tokens": 9, "repetition_penalty": 1.4}),
        (batch, {"max_new_tokens": 9, "repetition_penalty": 1.4}),
    ):
        expected = eager(model, inputs, **options)
        got = bundle.generate(**arrays(inputs), do_sample=False, **options)
        np.testing.assert_array_equal(got.sequences, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_end_at_different_steps(backend, loaded):
    """An end token that one row reaches before the others: it goes on with padding, as in transformers."""
    model, bundle = models.make("llama"), loaded("llama", backend)
    batch = padded(models.text_ids(3, seed=6), models.text_ids(14, seed=7), models.text_ids(8, seed=8))
    free = eager(model, batch, max_new_tokens=12, eos_token_id=None)[:, 14:]
    ends = [int(free[0, 2]), int(free[1, 6])]
    expected = eager(model, batch, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    got = bundle.generate(**arrays(batch), max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    np.testing.assert_array_equal(got.sequences, expected)
    assert got.finish_reasons[0] == "eos"
    assert (expected[0, 14 + 3 :] == 0).all(), "the first row was meant to end at its third token at the latest"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", models.IMAGE_TEXT)
def test_image_text(name, backend, loaded):
    model, bundle = models.make(name), loaded(name, backend)
    grid = (1, 4, 4)
    for seed, (before, after) in enumerate(((6, 9), (2, 3))):
        inputs = models.image_inputs(name, before, after, seed=20 + seed, grid=grid)
        expected = eager(model, inputs, max_new_tokens=14)
        got = bundle.generate(**arrays(inputs), max_new_tokens=14)
        np.testing.assert_array_equal(got.sequences, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen3_vl"])
def test_two_pictures_in_one_prompt(name, backend, loaded):
    model, bundle = models.make(name), loaded(name, backend)
    first = models.image_inputs(name, 3, 2, seed=30, grid=(1, 4, 4))
    second = models.image_inputs(name, 1, 4, seed=31, grid=(1, 4, 4))
    inputs = {
        key: torch.cat([value, second[key]], 1 if value.shape == first["input_ids"].shape else 0)
        for key, value in first.items()
    }
    expected = eager(model, inputs, max_new_tokens=10)
    got = bundle.generate(**arrays(inputs), max_new_tokens=10)
    np.testing.assert_array_equal(got.sequences, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stream_gives_the_same_tokens(backend, loaded):
    bundle = loaded("qwen2", backend)
    ids = models.text_ids(9, seed=3).numpy()
    whole = bundle.generate(input_ids=ids, max_new_tokens=8)
    streamed = [chunk.token_id for chunk in bundle.stream(input_ids=ids, max_new_tokens=8)]
    assert streamed == whole.sequences[0, 9:].tolist()
    assert whole.timings.new_tokens == len(streamed)


def test_what_a_streams_reader_does_is_no_time_of_the_loop(loaded):
    ids = models.text_ids(9, seed=3).numpy()
    timings = None
    for chunk in loaded("qwen2", "cpu").stream(input_ids=ids, max_new_tokens=8, eos_token_id=()):
        timings = chunk.timings
        time.sleep(0.2)
    assert timings.new_tokens == 8 and 0 < timings.overhead < timings.steps < 0.7  # of 1.4


def test_streams_in_turns_keep_their_own_buffers(loaded, monkeypatch):
    """Also where these grow, and nothing of them is left afterwards."""
    bundle, take, held = loaded("qwen2", "cpu"), State.buffers, []

    def recording(*given, **options):
        buffers = take(*given, **options)
        held.append(weakref.ref(buffers))
        return buffers

    monkeypatch.setattr(State, "buffers", recording)
    prompts = [models.text_ids(length, seed=length).numpy() for length in (9, 5)]
    options = {"max_new_tokens": 90, "eos_token_id": (), "do_sample": False}
    expected = [bundle.generate(input_ids=ids, **options).sequences[0, ids.shape[1] :].tolist() for ids in prompts]
    streams = [bundle.stream(input_ids=ids, **options) for ids in prompts]
    taken = [[chunk.token_id for chunk in chunks] for chunks in zip(*streams, strict=True)]
    assert [list(each) for each in zip(*taken, strict=True)] == expected
    del streams
    gc.collect()
    assert len(held) == 4 * 90 and not any(buffers() for buffers in held)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_state_that_the_program_does_not_give_is_refused(backend, bundle, tmp_path):
    made = shutil.copytree(bundle("qwen2", backend).path, tmp_path / "b")
    text = (made / "manifest.json").read_text(encoding="utf-8")
    (made / "manifest.json").write_text(re.sub(r'"present[._]0[._]key"', '"present_00"', text), encoding="utf-8")
    with pytest.raises(BundleError, match="gives no present_00, as it should"):
        load_bundle(made).generate(input_ids=[[5, 6]], max_new_tokens=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_repeats_with_a_seed(backend, loaded):
    bundle = loaded("llama", backend)
    ids = models.text_ids(9, seed=3).numpy()
    options = {"max_new_tokens": 20, "temperature": 1.5, "top_k": 0, "eos_token_id": ()}
    one, same, other = (bundle.generate(input_ids=ids, seed=seed, **options).sequences for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_longest_length_counts_padding_and_pad_tokens_are_masked(backend, loaded):
    model, bundle = models.make("llama"), loaded("llama", backend)
    batch = padded(models.text_ids(3, seed=6), models.text_ids(14, seed=7))
    expected = eager(model, {"input_ids": batch["input_ids"]}, max_length=17)
    found = bundle.generate(input_ids=batch["input_ids"].numpy(), max_length=17, do_sample=False).sequences
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_least_length_counts_padding(backend, loaded):
    model, bundle = models.make("llama"), loaded("llama", backend)
    batch = padded(models.text_ids(2, seed=6), models.text_ids(6, seed=7))
    end = int(eager(model, batch, max_new_tokens=1)[0, -1])
    options = {"min_length": 9, "eos_token_id": end, "max_new_tokens": 8}
    found = bundle.generate(**arrays(batch), **options, do_sample=False).sequences
    np.testing.assert_array_equal(found, eager(model, batch, **options))


def test_the_callers_pad_token_is_padding(loaded):
    model, bundle = models.make("llama"), loaded("llama")
    ids = torch.tensor([[9, 9, 5, 6]])
    for options in ({"pad_token_id": 9}, {"pad_token_id": 9, "eos_token_id": 9}):
        expected = eager(model, {"input_ids": ids}, max_new_tokens=6, **options)
        found = bundle.generate(input_ids=ids.numpy(), max_new_tokens=6, do_sample=False, **options).sequences
        np.testing.assert_array_equal(found, expected)


def test_threads_never_read_each_others_state(loaded):
    """Each call gives its own tokens or says that another began: never another's."""
    bundle, ids, before = loaded("llama", "xnnpack"), models.text_ids(5, seed=1).numpy(), sys.getswitchinterval()
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_ids": ()}
    asked = [ids, models.text_ids(11, seed=2).numpy()]
    right = [bundle.generate(input_ids=each, **options).sequences.tolist() for each in asked]
    wrong = []

    def ask(index: int) -> None:
        for _ in range(40):
            try:
                found = bundle.generate(input_ids=asked[index], **options).sequences.tolist()
            except EngineError:
                continue
            if found != right[index]:
                wrong.append(found)

    threads = [threading.Thread(target=ask, args=(index,)) for index in (0, 1)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_one_generation_at_a_time_where_programs_keep_the_state(loaded):
    bundle, ids = loaded("llama", "xnnpack"), models.text_ids(5, seed=1).numpy()
    first = bundle.stream(input_ids=ids, max_new_tokens=4, do_sample=False)
    next(first)
    next(bundle.stream(input_ids=ids + 1, max_new_tokens=4, do_sample=False))
    with pytest.raises(EngineError, match="another generation began"):
        next(first)


@pytest.mark.parametrize(
    "grid",
    [np.array([1, 4, 4]), np.zeros((0, 3), np.int64), np.array([[1, 0, 0]]), np.array([[1, 4]]), np.ones((2, 3))],
)
def test_grids_that_do_not_fit_are_refused(grid, loaded):
    inputs = arrays(models.samples("qwen3_vl")[0]) | {"image_grid_thw": grid}
    with pytest.raises(InputError):
        loaded("qwen3_vl").generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_of_another_shape_are_refused(backend, loaded):
    inputs = arrays(models.samples("llava")[0])
    inputs["pixel_values"] = inputs["pixel_values"][..., :-1]
    with pytest.raises(InputError, match="pixel_values: expected shape"):
        loaded("llava", backend).generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_ids_beyond_the_vocabulary_are_an_error(backend, loaded):
    with pytest.raises((EngineError, InputError)):
        loaded("llama", backend).generate(input_ids=np.array([[5, 10**6]]), max_new_tokens=2)


def test_chat_templates_get_their_variables(loaded):
    bundle = loaded("chat")
    messages = [{"role": "user", "content": "hello"}]
    bundle.generate(messages, chat_template_kwargs={"tools": []}, max_new_tokens=1)
    with pytest.raises(InputError, match="chat_template_kwargs belong to chat messages"):
        bundle.generate("hello", chat_template_kwargs={"tools": []})
    with pytest.raises(InputError, match="chat_template_kwargs: expected names with values, without 'messages'"):
        bundle.generate(messages, chat_template_kwargs={"messages": []})


def test_a_window_is_crossed_by_the_held_out_inputs(bundle):
    checks = bundle("mistral").manifest.verification.checks
    assert max(check.prompt_length for check in checks) > models.make("mistral").config.sliding_window


def test_a_long_limit_reserves_no_memory(loaded):
    stream = loaded("gpt2").stream(input_ids=np.array([[5, 6]]), max_new_tokens=10**15)
    assert next(stream).token_id >= 0


def test_pictures_without_their_grid_are_not_ignored(loaded):
    inputs = arrays(models.samples("qwen3_vl")[0])
    del inputs["image_grid_thw"]
    with pytest.raises(InputError, match="'pixel_values' needs image_grid_thw"):
        loaded("qwen3_vl").generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_pictures_as_placeholders(backend, loaded):
    inputs = arrays(models.samples("llava")[0])
    inputs["pixel_values"] = np.concatenate([inputs["pixel_values"]] * 2)
    with pytest.raises(InputError, match=r"the prompt holds \d+ image tokens, the pictures give \d+ features"):
        loaded("llava", backend).generate(**inputs, max_new_tokens=2)


# The others by tests/benchmarks/answers.py.
@pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("torch", marks=pytest.mark.long), pytest.param("xnnpack", marks=pytest.mark.long)]
)
def test_the_demo_models_answers_are_eagers(backend, loaded):
    asked = answers.held_out_questions(12)
    assert answers.bundle_answers(loaded("demo", backend), asked) == answers.eager_answers(asked)


def test_a_prompt_longer_than_a_chunk_and_a_cache_that_grows(tmp_path):
    model = models.make("qwen2")
    model.config.max_position_embeddings = 1100
    bundle = load_bundle(build_bundle(model, None, "cpu", output=tmp_path / "bundle", progress=False).path)
    assert bundle.bundle.manifest.flow.chunk == 512
    inputs = {"input_ids": models.text_ids(700, seed=5)}
    # The cache's buffers, which have room for some 70 more, are copied on the way.
    expected = eager(model, inputs, max_new_tokens=300, eos_token_id=None)
    found = bundle.generate(**arrays(inputs), max_new_tokens=300, eos_token_id=())
    np.testing.assert_array_equal(found.sequences, expected)
    *_, last = bundle.stream(**arrays(inputs), eos_token_id=(), max_new_tokens=2)
    assert last.token_id == expected[0, 701]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps, which is Linux's")
def test_a_model_that_the_build_loaded_is_gone_when_the_bundle_is_verified(tmp_path):
    """Its weights are mapped: as long as anything holds one of them, they count beside the engine's. On ONNX backends
    onnxscript's rewriting rules do: they keep the node that they tried last, with its graph."""
    models.make("llama").save_pretrained(tmp_path / "model")
    mapped = {}

    def look(stage: str) -> None:
        gc.collect()
        mapped[stage] = str(tmp_path / "model" / "model.safetensors") in Path("/proc/self/maps").read_text()

    build_bundle(tmp_path / "model", models.samples("llama"), "torch", output=tmp_path / "b", progress=look)
    assert mapped["capture"] and not mapped["verify"]
