"""How far a model's logits in float32 are from its own in float64."""

import torch
import transformers as hf
from tests.zoo import models

from genbundle.builder.conditioning import with_rounding
from genbundle.builder.verify import record


class Cancelling(hf.LlamaForCausalLM):
    """Loses digits: what is left of a difference of large numbers is partly rounding."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = (output.logits + 30000) - 30000
        return output


def rounding(cls: type[hf.LlamaForCausalLM]) -> float:
    model = cls(models.make("llama").config).eval()
    model.load_state_dict(models.make("llama").state_dict())
    case = record(model, "one", {"input_ids": torch.tensor([[5, 6, 7]])})
    found = with_rounding(model, model.num_parameters(), [case])[0].rounding
    assert with_rounding("no such model", 2**40, [case])[0].rounding is None, "not loaded only to see that"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32
    assert found is not None and found.shape == (1, case.top_logits.shape[1])
    return float(found.max())


def test_the_rounding_of_a_model_is_measured():
    assert 0 < rounding(hf.LlamaForCausalLM) < 1e-4 < rounding(Cancelling) < 0.01
