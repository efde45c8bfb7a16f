"""The xnnpack backend: what a .pte's programs give, against eager generation, for every family."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from tests.zoo import models as zoo
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genbundle.builder.formats.executorch import PROGRAM_FILE, Method, export_executorch, lower
from genbundle.builder.limits import limits_of
from genbundle.builder.plan import capture, make_plan
from genbundle.builder.samples import make_samples
from genbundle.builder.stateful import probe_layers
from genbundle.builder.stateful_attention import check_attention_call
from genbundle.bundles import Bundle, EngineError, UnsupportedModelError
from genbundle.bundles.manifest import (
    FORMAT,
    FORMAT_VERSION,
    File,
    Flow,
    Generation,
    Input,
    Manifest,
    Model,
    Output,
    Program,
    Route,
    Source,
)
from genbundle.bundles.parsing import parse_manifest
from genbundle.runtime.backends import open_backend
from genbundle.runtime.wiring import Wiring

CAPACITY, NEW_TOKENS, TOLERANCE = 64, 12, 1e-4
_TINY = {"hidden_size": 64, "vocab_size": 200, "num_hidden_layers": 2}


def build(model: hf.PreTrainedModel, folder: Path, samples: list[dict[str, torch.Tensor]] = []) -> Bundle:  # noqa: B006
    """A bundle of `model` with nothing in it but the .pte."""
    captures = (
        capture(model, make_samples(model, samples, limits_of(model, "xnnpack", None)).capture) if samples else []
    )
    positions = make_plan(model, captures).step.sources.get("position_ids") if samples else None
    exported = export_executorch(
        model, max_length=CAPACITY, eos_token_ids=(2,), captures=captures, positions=positions,
        path=folder / PROGRAM_FILE,
    )  # fmt: skip
    manifest = Manifest(
        format=FORMAT,
        version=FORMAT_VERSION,
        backend="xnnpack",
        model=Model(architecture=type(model).__name__, name="tiny", parameters=0, weight_bytes=0),
        flow=exported.flow,
        programs=exported.programs,
        state=exported.state,
        generation=Generation(),
        files={exported.programs[0].file: File(size=1, sha256="0" * 64)},
        packages={"executorch": "1.4.1"},
    )
    return Bundle(path=folder, manifest=parse_manifest(manifest.to_json()))


def open_wiring(bundle: Bundle) -> Wiring:
    return Wiring(bundle.manifest, open_backend(bundle, device=None, threads=None))


def eager(model: hf.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[list[int], np.ndarray]:
    """Eager's greedy tokens, and the logits `[NEW_TOKENS, vocabulary]` they were chosen by."""
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    model.generation_config.eos_token_id = None
    found = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return found.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(found.logits).numpy()


def replay(wiring: Wiring, inputs: dict[str, torch.Tensor]) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens and logits that the bundle's programs give."""
    arrays = {"attention_mask": np.ones_like(inputs["input_ids"]), **{k: v.numpy() for k, v in inputs.items()}}
    logits, sequences = wiring.prompt(arrays)
    for _ in range(NEW_TOKENS):
        token = int(logits[0].argmax())
        yield token, logits[0].copy()
        logits = wiring.step(np.array([[token]]), sequences)


def expect_equal(wiring: Wiring, model: hf.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    expected_tokens, expected_logits = eager(model, inputs)
    tokens, logits = zip(*replay(wiring, inputs), strict=True)
    assert list(tokens) == expected_tokens
    np.testing.assert_allclose(np.stack(logits), expected_logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "llama" else pytest.mark.long) for name in zoo.TEXT]
)
def test_text_decoder(name: str, tmp_path: Path) -> None:
    model = zoo.make(name)
    wiring = open_wiring(build(model, tmp_path))
    for length in (1, 5, 23):
        expect_equal(wiring, model, {"input_ids": zoo.text_ids(length, seed=length)})
    # A prompt in two chunks, then a rewind into the middle and on with other tokens: beyond the windows of 8.
    ids, other = zoo.text_ids(21, seed=1), zoo.text_ids(14, seed=2)
    with torch.no_grad():
        whole = model(ids).logits[:, -1].numpy()
        rewound = model(torch.cat([ids[:, :9], other], 1)).logits[:, -1].numpy()
    first = {"input_ids": ids[:, :13].numpy(), "attention_mask": np.ones((1, 13), np.int64)}
    _, sequences = wiring.prompt(first)
    np.testing.assert_allclose(wiring.step(ids[:, 13:].numpy(), sequences), whole, rtol=0, atol=TOLERANCE)
    sequences.state.length = 9
    np.testing.assert_allclose(wiring.step(other.numpy(), sequences), rewound, rtol=0, atol=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("name", zoo.IMAGE_TEXT)
def test_image_text(name: str, tmp_path: Path) -> None:
    model = zoo.make(name)
    wiring = open_wiring(build(model, tmp_path, [zoo.image_inputs(name)]))
    expect_equal(wiring, model, zoo.image_inputs(name, 6, 7, seed=3))
    expect_equal(wiring, model, zoo.image_inputs(name, 1, 2, seed=4, grid=(1, 6, 4)))
    expect_equal(wiring, model, {"input_ids": zoo.text_ids(9, seed=5)})
    if name != "paligemma":
        parts = zoo.image_inputs(name, 3, 2, seed=6), zoo.image_inputs(name, 2, 4, seed=7, grid=(1, 4, 4))
        axes = {
            key: 0 if key in ("image_grid_thw",) or (key == "pixel_values" and name != "idefics3") else 1
            for key in parts[0]
        }
        expect_equal(wiring, model, {key: torch.cat([part[key] for part in parts], axes[key]) for key in parts[0]})


def test_the_model_is_as_before() -> None:
    model = zoo.make("gemma2")
    names = set(ALL_ATTENTION_FUNCTIONS.keys()), set(ALL_MASK_ATTENTION_FUNCTIONS.keys())
    assert [layer.keys for layer in probe_layers(model)] == [(2, 16), (2, 16)]
    assert model.config._attn_implementation == "eager"
    assert (set(ALL_ATTENTION_FUNCTIONS.keys()), set(ALL_MASK_ATTENTION_FUNCTIONS.keys())) == names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=200)),
            "can't be replaced",
        ),
        (lambda: hf.MambaForCausalLM(hf.MambaConfig(**_TINY)), "layer 0 keeps LinearAttention state"),
        (
            lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_model=64, num_layers=2, num_heads=4)),
            "has no decoder of its own",
        ),
    ],
)
def test_models_it_can_not_express(make, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        probe_layers(make().eval())


def test_an_unknown_attention_keyword_is_named() -> None:
    layer = torch.nn.Module()
    layer.layer_idx = 3  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    check_attention_call(layer, {"scaling": 0.5, "position_ids": torch.zeros(1), "position_bias": None})
    with pytest.raises(UnsupportedModelError, match="language_model: layer 3 calls attention with `position_bias`"):
        check_attention_call(layer, {"position_bias": torch.zeros(1)})


def fake_bundle(folder: Path, content: bytes | None, packages: dict[str, str]) -> Bundle:
    """A bundle with these bytes (None: what is there) as its program of one input and one output."""
    if content is not None:
        (folder / "model.pte").write_bytes(content)
    values = Input(name="values", dtype="float32", shape=(1, 3), source=Source(kind="user", name="values"))
    logits = Output(name="logits", dtype="float32", shape=(1, 3))
    manifest = Manifest(
        format=FORMAT, version=FORMAT_VERSION, backend="xnnpack", generation=Generation(), state=(), packages=packages,
        model=Model(architecture="", name="", parameters=0, weight_bytes=0),
        programs=(Program(name="decode", file="model.pte", roles=("decode",), inputs=(values,), outputs=(logits,)),),
        flow=Flow(prompt=(Route(programs=("decode",)),), step=("decode",)),
        files={"model.pte": File(size=1, sha256="0" * 64)},
    )  # fmt: skip
    return Bundle(path=folder, manifest=manifest)


def test_a_program_of_another_executorch_is_refused(tmp_path: Path) -> None:
    bundle = fake_bundle(tmp_path, b"", {"executorch": "0.7.0"})
    with pytest.raises(EngineError, match=r"built for ExecuTorch 0\.7\.0, and 1\.4\.1 is installed: pip install"):
        open_backend(bundle, device=None, threads=None)


def test_only_the_cpu_is_a_device(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="unknown device 'cuda'"):
        open_backend(fake_bundle(tmp_path, b"", {}), device="cuda", threads=None)


@pytest.mark.parametrize("content", [b"", b"no program at all" * 100, b"\x1c\0\0\0ET12" + b"\0" * 4096])
def test_a_damaged_program_is_an_error(content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backend = open_backend(fake_bundle(tmp_path, content, {"executorch": "1.4.1"}), device=None, threads=None)
    with pytest.raises(EngineError, match=r"can't load the method 'forward' of model\.pte"):
        backend.program("decode")
    assert capfd.readouterr() == ("", "")


def test_the_tanh_form_of_gelu_is_kept(tmp_path: Path) -> None:
    """XNNPACK 1.4.1 would compute the exact form: https://github.com/pytorch/executorch/pull/22851."""
    values, module = torch.tensor([[-2.7, 0.3, 1.2]]), torch.nn.GELU(approximate="tanh")
    lower({"forward": Method(module=module, args=(values,))}, {}, tmp_path / "model.pte")
    program = open_backend(fake_bundle(tmp_path, None, {}), device=None, threads=None).program("decode")
    found = program({"values": values})["logits"]
    np.testing.assert_allclose(found.numpy(), module(values).numpy(), rtol=0, atol=1e-6)


def test_lowering_leaves_no_weights_in_memory(tmp_path: Path) -> None:
    """Caches of PyTorch and ExecuTorch would keep them, and their bytes besides, until the process ends."""
    from executorch.exir._serialize._named_data_store import NamedDataStoreOutput

    arrays = [np.ones((16, 8), np.float32), np.ones((16, 8), np.float32)]  # a weak reference to one sees its storage
    embedding, head = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16)
    embedding.weight, head.weight = (torch.nn.Parameter(torch.from_numpy(array)) for array in arrays)
    # Flattening is refused, since integers aren't for XNNPACK.
    module = torch.nn.Sequential(torch.nn.Flatten(), embedding, head)
    method = Method(module=module, args=(torch.zeros(1, 3, 1, dtype=torch.long),))
    lower({"forward": method}, {}, tmp_path / "model.pte")
    kept = [weakref.ref(array) for array in arrays]
    del arrays, embedding, head, module, method
    gc.collect()
    assert all(array() is None for array in kept)
    stores = [item for item in gc.get_objects() if type(item) is NamedDataStoreOutput]
    assert not any(store.buffers for store in stores)
