"""Bad input to `build_bundle`: a typed error that says what was given and what to do, and nothing is left behind."""

import errno
import io
import json
import os

import numpy as np
import pytest
import torch
import transformers as hf
from tests.zoo import models

from genbundle.builder import attempts, build_bundle
from genbundle.builder import verify as verify_module
from genbundle.builder.loading import borrowed
from genbundle.bundles import BuildError, EngineError, InputError, UnsupportedModelError


class Mystery(hf.LlamaForCausalLM):
    """A decoder that takes an argument for which no rule is known: what its generate makes of the prompt."""

    secret = 0.0

    def generate(self, input_ids=None, **kwargs):
        self.secret = float(input_ids.sum()) / 100
        return super().generate(input_ids, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        mystery = torch.full((1, 1), self.secret)
        return {**super().prepare_inputs_for_generation(*args, **kwargs), "mystery": mystery}

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, mystery=None, **kwargs):
        output = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        if mystery is not None:
            output.logits = output.logits * (1 + mystery)
        return output


class Dice(hf.LlamaForCausalLM):
    """Draws at random in its forward, as models do that take samples of a sound's features."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits + torch.rand_like(output.logits)
        return output


class Turncoat(hf.LlamaForCausalLM):
    """Goes over to another way for good at its first short prompt, as BigBird's sparse attention does."""

    way = "sparse"

    def forward(self, input_ids=None, **kwargs):
        if not torch.compiler.is_compiling() and input_ids.shape[1] == 3:
            self.way = "full"
        output = super().forward(input_ids, **kwargs)
        output.logits = -output.logits if self.way == "full" else output.logits
        return output


def tiny_llama(cls=hf.LlamaForCausalLM):
    config = models.make("llama").config
    return cls(config).eval()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "tpu"}, BuildError, "unknown backend 'tpu': choose one of cpu, cuda, xnnpack, torch"),
        ({"precision": "int3"}, BuildError, "precision 'int3' isn't available on 'cpu': it can fp32"),
        ({"max_length": 1}, BuildError, "max_length: expected an integer of at least 2, got 1"),
        ({"inputs": 7}, BuildError, "expected generate kwargs (a dict) or a list of them, got int"),
        ({"inputs": {"input_ids": [[1, 2], [3]]}}, BuildError, "inputs: expected tensors, or lists of equal lengths"),
        ({"inputs": {"pixel_values": np.zeros((1, 3, 4, 4))}}, BuildError, "with input_ids [batch, length]"),
        (
            {"inputs": {"input_ids": [[5, 6]], "pixels": [[1.0]]}},
            UnsupportedModelError,
            "LlamaForCausalLM.generate refuses the inputs ['attention_mask', 'input_ids', 'pixels']",
        ),
    ],
)
def test_arguments(arguments, error, message, tmp_path):
    with pytest.raises(error) as raised:
        build_bundle(tiny_llama(), output=tmp_path / "b", progress=False, **arguments)
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_generate(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.BertModel(hf.BertConfig(**sizes, vocab_size=20))
    with pytest.raises(
        UnsupportedModelError, match="BertModel can't generate: give a model with a language-modeling head"
    ):
        build_bundle(model, output=tmp_path / "b", progress=False)


@pytest.mark.parametrize("model", ["/no/such/folder", "./missing"])
def test_missing_directory(model, tmp_path):
    with pytest.raises(BuildError, match="no such directory"):
        build_bundle(model, output=tmp_path / "b", progress=False)


def test_directory_without_a_model(tmp_path):
    with pytest.raises(BuildError, match=r"holds no config\.json"):
        build_bundle(tmp_path, output=tmp_path / "b", progress=False)


def test_unexplained_input_is_named(tmp_path):
    with pytest.raises(UnsupportedModelError, match="Mystery: the decoder's step input 'mystery' has no explanation"):
        build_bundle(tiny_llama(Mystery), output=tmp_path / "b", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_what_a_model_draws_at_random_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="Dice: generate gives other logits for the same inputs each time"):
        build_bundle(tiny_llama(Dice), output=tmp_path / "b", progress=False)


def test_option_that_is_not_replayed(tmp_path):
    model = tiny_llama()
    model.generation_config.num_beams = 2
    with pytest.raises(UnsupportedModelError, match="num_beams=2, which the runtime doesn't replay"):
        build_bundle(model, output=tmp_path / "b", progress=False)


def test_output_that_exists_is_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    for overwrite in (False, True):
        with pytest.raises(BuildError):
            build_bundle(tiny_llama(), output=tmp_path / "mine", overwrite=overwrite, progress=False)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def tamper(monkeypatch, place):
    """Eager's record with one token changed stands for a program that gives another token."""
    record = attempts.record

    def tampered(*args, **kwargs):
        case = record(*args, **kwargs)
        case.sequences[0, place] = (case.sequences[0, place] + 1) % 190
        return case

    monkeypatch.setattr(attempts, "record", tampered)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "place", "kind"),
    [
        ("cpu", -1, "a step after the prompt"),
        ("torch", -12, "the prompt"),
        pytest.param("xnnpack", -1, "a step after the prompt", marks=pytest.mark.long),
    ],
)
def test_mismatch_fails_the_build_and_keeps_nothing(tmp_path, monkeypatch, backend, place, kind):
    tamper(monkeypatch, place)
    words = rf"^decode: {kind} gives something else than the model does \(one token: step {12 + place} of sequence 0 "
    with pytest.raises(UnsupportedModelError, match=words + r"gives token \d+, eager gave \d+ .*\)$"):
        build_bundle(tiny_llama(), backend=backend, output=tmp_path / "b", max_length=64, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_rounding_may_change_hides_no_mistake(tmp_path, monkeypatch):
    """The programs of a lossy bundle are replayed at float32 first, where a floor of 0 excuses nothing."""
    tamper(monkeypatch, -1)
    with pytest.raises(UnsupportedModelError, match=r"^decode: a step after the prompt gives something else"):
        build_bundle(
            tiny_llama(), precision="int8", quality_floor=0.0, output=tmp_path / "b", max_length=64, progress=False
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_callers_model_is_as_before(dtype):
    model = tiny_llama().to(dtype).train()
    model.model.norm.eval()
    model.lm_head.weight.requires_grad_(False)
    before = {name: item.clone() for name, item in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop here"), borrowed(model):
        assert not any(module.training for module in model.modules())
        assert {item.dtype for item in model.parameters()} == {torch.float32}
        raise RuntimeError("stop here")
    assert model.training and not model.model.norm.training and model.model.layers.training
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad
    for name, item in model.state_dict().items():
        assert item.dtype == before[name].dtype and torch.equal(item, before[name]), name


def test_a_directorys_own_code_is_not_run(tmp_path, monkeypatch):
    """transformers would ask on standard input, which a script may answer, and the question would not be seen."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(BuildError, match="it needs Python code of its own beside its weights, which a build doesn't"):
        build_bundle(model, output=tmp_path / "b", progress=False)
    assert not (tmp_path / "ran").exists()


def test_a_processor_that_cannot_be_loaded(tmp_path):
    with pytest.raises(BuildError, match="processor: the one of '/no/such/folder' can't be loaded"):
        build_bundle(tiny_llama(), processor="/no/such/folder", output=tmp_path / "b", progress=False)
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(BuildError, match=r"processor: the one of '.*' can't be loaded"):
        build_bundle(folder, output=tmp_path / "b", progress=False)


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights.safetensors")

    monkeypatch.setattr(attempts.Exporting, "_export", full)
    with pytest.raises(BuildError, match=r"can't be written to .*b: no space is left there; nothing was kept"):
        build_bundle(tiny_llama(), output=tmp_path / "b", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="can't be written to"):
        build_bundle(tiny_llama(), output=tmp_path / "file" / "b", progress=False)


def test_a_model_that_changes_itself_is_refused_and_given_back_as_it_was(tmp_path):
    model = tiny_llama(Turncoat)
    model.way = "sparse"
    with pytest.raises(UnsupportedModelError, match="the model's code changes its 'way' for good"):
        build_bundle(model, backend="torch", output=tmp_path / "b", progress=False)
    assert model.way == "sparse" and list(tmp_path.iterdir()) == []


def test_a_bundle_that_refuses_what_eager_takes_is_a_build_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise InputError("pixel_values: expected shape [32, 384], got [16, 384]")

    monkeypatch.setattr(verify_module, "check_cases", refuse)
    with pytest.raises(UnsupportedModelError, match="give inputs that differ in what shall be dynamic"):
        build_bundle(tiny_llama(), backend="torch", output=tmp_path / "b", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_programs_that_the_engine_fails_at_are_a_build_error(tmp_path, monkeypatch):
    def fail(*_):
        raise EngineError("torch failed in the program 'decode' on inputs of shapes {'input_ids': [1, 1]}")

    monkeypatch.setattr(verify_module, "check_cases", fail)
    with pytest.raises(
        UnsupportedModelError, match="can't run what the model became: torch failed in the program 'dec"
    ):
        build_bundle(tiny_llama(), backend="torch", output=tmp_path / "b", progress=False)
    assert list(tmp_path.iterdir()) == []
