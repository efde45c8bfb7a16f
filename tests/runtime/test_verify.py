"""Replaying records on a model without an engine: what differs, and records that the bundle can't be compared with."""

from dataclasses import replace

import numpy as np
import pytest
from tests.bundles.samples import manifest, program

from genbundle.bundles import VerificationError
from genbundle.bundles.golden import GoldenCase
from genbundle.bundles.manifest import Flow, Input, Output, Route, Source
from genbundle.runtime.model import Model
from genbundle.runtime.verify import locate, replay

VOCABULARY = 6


class Engine:
    """A program whose logits grow with the token: the last one always wins."""

    def program(self, name):
        return lambda feeds, buffers=None: {
            "logits": np.tile(np.arange(VOCABULARY, dtype=np.float32), (len(feeds["input_ids"]), 1, 1))
        }

    def to_numpy(self, tensor):
        return np.asarray(tensor)


class FakeBundle:
    manifest = manifest(
        programs=(
            program(
                inputs=(Input(name="input_ids", dtype="int64", shape=("batch", "n"), source=Source(kind="tokens")),),
                outputs=(Output(name="logits", dtype="float32", shape=("batch", 1, VOCABULARY)),),
            ),
        ),
        flow=Flow(prompt=(Route(programs=("decode",)),), step=("decode",)),
        state=(),
        text=None,
        generation=replace(manifest().generation, eos_token_ids=(), options={}),
    )


def case(steps=2, batch=1):
    logits = np.tile(np.arange(VOCABULARY, dtype=np.float32), (batch, steps, 1))
    return GoldenCase(
        name="one",
        inputs={"input_ids": np.full((1, 3), 1)},
        sequences=np.concatenate([np.full((batch, 3), 1), np.full((batch, 2), VOCABULARY - 1)], axis=1),
        top_ids=np.tile(np.arange(VOCABULARY), (batch, steps, 1)),
        top_logits=logits,
        options={"max_new_tokens": 2, "do_sample": False},
    )


def check(given):
    return replay(Model(FakeBundle(), Engine()), given)  # pyright: ignore[reportArgumentType]


def test_equal():
    report = check(case())
    assert (report.new_tokens, report.prompt_length, report.max_logit_difference) == (2, 3, 0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (replace(case(), sequences=case().sequences - 1), "gives token 5, eager gave 4"),
        (replace(case(), top_logits=case().top_logits + 1), "differ from eager's by 1"),
        (replace(case(), top_logits=case().top_logits * np.float32(np.nan)), "differ from eager's by nan"),
        (replace(case(), top_ids=case().top_ids + 10**6), "beyond the model's 6"),
        (case(steps=1), "step 1 of sequence 0: the record has no logits of it"),
        (case(batch=2), "records 2 sequences for inputs of 1"),
        (replace(case(), options={"max_new_tokens": 3, "do_sample": False}), "no logits of it"),
    ],
)
def test_different(given, words):
    with pytest.raises(VerificationError, match=words):
        check(given)


def test_logits_may_differ_as_much_as_the_models_own_rounding():
    off = case()
    off = replace(off, top_logits=off.top_logits + np.float32(0.02))  # of 5
    with pytest.raises(VerificationError, match=r"the logits differ from eager's by 0\.02"):
        check(off)
    rounding = np.full(off.top_logits.shape[:2], 0.002, np.float32)
    assert check(replace(off, rounding=rounding)).tokens_equal
    # A step that comes later excuses nothing before it.
    rounding[:, 0] = 0
    with pytest.raises(VerificationError, match="step 0 of sequence 0: the logits differ"):
        check(replace(off, rounding=rounding))


def test_the_programs_that_can_be_at_fault_are_named():
    """Text alone goes through one program, pictures through an encoder before it: where text holds, that is left."""
    encoder = program(
        name="image_encoder",
        roles=("encoder",),
        inputs=(Input(name="pixels", dtype="float32", shape=("n",), source=Source(kind="user", name="pixels")),),
        outputs=(Output(name="features", dtype="float32", shape=("n",)),),
    )
    bundle = FakeBundle()
    routes = (Route(programs=("image_encoder", "decode"), needs=("pixels",)), Route(programs=("decode",)))
    bundle.manifest = replace(
        FakeBundle.manifest, programs=(encoder, *FakeBundle.manifest.programs),
        flow=replace(FakeBundle.manifest.flow, prompt=routes),
    )  # fmt: skip

    class WithEncoder(Engine):
        def program(self, name):
            return (
                (lambda feeds, buffers=None: {"features": feeds["pixels"]})
                if name == "image_encoder"
                else super().program(name)
            )

    model = Model(bundle, WithEncoder())  # pyright: ignore[reportArgumentType]
    text, off = case(), case().top_logits.copy()
    off[:, 0] += 1
    picture = replace(text, name="picture", inputs={**text.inputs, "pixels": np.zeros(2, np.float32)}, top_logits=off)

    def told(*cases):
        with pytest.raises(VerificationError) as raised:
            replay(model, cases[0])
        locate(model, cases, raised.value)
        return raised.value.case, raised.value.step, raised.value.programs, raised.value.held

    assert told(picture, text) == ("picture", 0, ("image_encoder",), ("decode",))
    assert told(picture) == ("picture", 0, ("image_encoder", "decode"), ())
    assert told(picture, replace(text, top_logits=off)) == ("picture", 0, ("image_encoder", "decode"), ())
    later = case().top_logits.copy()
    later[:, 1] += 1
    assert told(replace(picture, top_logits=later), text) == ("picture", 1, ("image_encoder", "decode"), ())
    # A case that the bundle refuses is another error's matter.
    refused = replace(text, name="refused", inputs={**text.inputs, "sound": np.zeros(2, np.float32)})
    assert told(picture, text, refused) == ("picture", 0, ("image_encoder",), ("decode",))
