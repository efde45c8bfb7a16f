"""State in any object: found, explained, put into copies; prompts whose code loops over their length."""

import copy

import pytest
import torch
import transformers as hf
from tests.zoo import shrink

from genbundle.builder.exporting import to_exported_program
from genbundle.builder.lengths import loop_over_length
from genbundle.builder.limits import limits_of
from genbundle.builder.objects import leaves, with_leaves
from genbundle.builder.samples import make_samples
from genbundle.builder.turns import turn_components
from genbundle.bundles import UnsupportedModelError


class Holder:
    """Anything that holds tensors."""

    def __init__(self):
        self.keys = torch.zeros(2, 3)
        self.values = self.keys
        self.parts = {"conv": [torch.ones(1), (torch.full((1,), 2.0), None)]}
        self.seen, self.config = 3, hf.LlamaConfig()


def test_leaves_are_found_by_path():
    found = leaves(Holder())
    assert set(found) == {("keys",), ("values",), ("parts", "conv", 0), ("parts", "conv", 1, 0),
                          ("parts", "conv", 1, 1), ("seen",)}  # fmt: skip


def test_a_copy_gets_other_leaves_and_the_original_keeps_its_own():
    holder, new = Holder(), torch.rand(2, 5)
    made = with_leaves(holder, {("keys",): new, ("seen",): 5, ("parts", "conv", 1, 0): new})
    assert made.keys is new and made.values is new and made.parts["conv"][1][0] is new
    assert made.seen == 5 and made.config is holder.config
    assert holder.seen == 3 and holder.keys.shape == (2, 3) and holder.parts["conv"][0] is not made.parts["conv"][0]


def test_a_loop_over_the_length_is_seen():
    class Scan(torch.nn.Module):
        def forward(self, x):
            state = x[:, 0]
            for place in range(1, x.shape[1]):
                state = state * 0.5 + x[:, place]
            return {"y": state}

    class Sum(torch.nn.Module):
        def forward(self, x):
            return {"y": x.cumsum(1)}

    class Chunks(torch.nn.Module):
        """Does something more for several chunks of 256, once."""

        def forward(self, x):
            return {"y": x.sum(1) if x.shape[1] <= 256 else x.sum(1) + 1}

    def sample(length):
        return {"x": torch.rand(2, length)}

    assert loop_over_length(Chunks(), sample) is None
    assert "loops over the prompt's length" in (loop_over_length(Scan(), sample) or "")
    assert loop_over_length(Sum(), sample) is None


def turns_of(name):
    model = shrink.make(name)
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}
               for ids in (torch.randint(10, 200, (2, 9)), torch.randint(10, 200, (1, 12)))]  # fmt: skip
    return turn_components(model, samples, UnsupportedModelError("the usual programs don't do"))


def test_a_model_without_a_cache_carries_its_tokens():
    components, flow, notes = turns_of("MptForCausalLM")
    assert [component.name for component in components] == ["decode"] and flow.continues
    assert list(components[0].sample) == ["input_ids", "attention_mask", "past_ids"]
    assert "runs the whole sequence again" in notes[0]


def test_any_object_is_carried():
    components, flow, notes = turns_of("MiniMaxForCausalLM")
    step = components[-1]
    assert step.name == "decode" and not notes
    assert {name for name, source in step.sources.items() if source.kind == "state"} == {
        "past_cache_layers_0_keys", "past_cache_layers_0_values", "past_cache_linear_cache_1"}  # fmt: skip
    assert step.axes["past_cache_layers_0_keys"] == {0: "batch", 2: "past"}
    assert components[0].obstacle is not None and flow.prompt[-1].one_by_one and not flow.prompt[-1].padded


def test_sounds_go_in_with_the_prompt_and_windows_stay_whole():
    name = "VoxtralRealtimeForConditionalGeneration"
    model = shrink.make(name)
    samples = make_samples(model, shrink.variants(name, model)["build"], limits_of(model, "torch", 200)).capture
    (prompt, step), flow, _ = turn_components(model, samples, UnsupportedModelError("the usual programs don't do"))
    assert flow.prompt[0].needs == ("input_features",) and not flow.prompt[0].one_by_one
    assert prompt.axes["input_features"] == {0: "batch", 2: "input_features_2"}
    assert step.axes["past_encoder_inputs_embeds"] == {0: "batch", 1: "encoder_inputs_embeds_1"}
    assert step.axes["past_cache_layers_0_keys"] == {0: "batch", 2: "past"}
    assert step.axes["past_encoder_past_key_values_layers_0_keys"] == {0: "batch", 2: "past_times4"}


def test_what_the_loop_only_hands_on_is_the_prompts_alone():
    name = "IdeficsForVisionText2Text"
    model = shrink.make(name)
    samples = make_samples(model, shrink.variants(name, model)["build"], limits_of(model, "torch", 200)).capture
    (prompt, step), _, _ = turn_components(model, samples, UnsupportedModelError("the usual programs don't do"))
    assert "pixel_values" in prompt.sample
    assert "past_image_hidden_states" in step.sample and "past_pixel_values" not in step.sample


def test_what_cannot_be_replayed_is_refused_with_the_cause():
    with pytest.raises(UnsupportedModelError, match=r"the usual programs don't do .*turn 1"):
        turns_of("ReformerModelWithLMHead")


def test_the_callers_model_is_left_alone():
    model = shrink.make("MptForCausalLM")
    before = copy.copy(model.__dict__)
    ids = torch.randint(10, 200, (1, 5))
    turn_components(model, [{"input_ids": ids}], UnsupportedModelError("x"))
    assert model.__dict__.keys() == before.keys()


def test_the_least_of_open_sizes_stays_open():
    class Window(torch.nn.Module):
        def forward(self, x):
            return {"y": x.topk(min(4, x.shape[1]), dim=1).values}

    sample = {"x": torch.rand(2, 9)}
    program = to_exported_program(Window(), sample, {"x": {0: "batch", 1: "sequence"}}, None)
    for length in (2, 4, 20):
        x = torch.rand(3, length)
        torch.testing.assert_close(program.module()(x=x)["y"], x.topk(min(4, length), dim=1).values)
    assert "min" not in globals()


def test_a_size_asked_for_as_a_number_stays_open():
    class Counted(torch.nn.Module):
        def forward(self, x):
            length = int(x.shape[1])
            return {"y": x * length + int(2.5)}

    program = to_exported_program(Counted(), {"x": torch.rand(2, 9)}, {"x": {0: "batch", 1: "sequence"}}, None)
    for length in (2, 4, 20):
        x = torch.rand(3, length)
        torch.testing.assert_close(program.module()(x=x)["y"], x * length + 2)
    assert "int" not in globals()
