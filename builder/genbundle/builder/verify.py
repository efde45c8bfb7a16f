"""Record what eager gives for held-out inputs, and replay the finished bundle on them through the runtime."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from genbundle.builder.exporting import first_line, quiet
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.golden import GoldenCase

NEW_TOKENS = 12
GOLDEN_LOGITS = 16


def record(
    model: PreTrainedModel, name: str, inputs: Mapping[str, torch.Tensor], new_tokens: int = NEW_TOKENS
) -> GoldenCase:
    """Eager's greedy generation for `inputs` with every logit; UnsupportedModelError when generate refuses them."""
    config: Any = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, temperature=None, top_k=None, top_p=None, min_p=None)
    config.update(max_new_tokens=new_tokens, max_length=None, return_dict_in_generate=True, output_logits=True)
    config.force_unique_generate_call = True  # of a model that goes on with the next window of sound by itself
    try:
        with quiet(), torch.no_grad():
            generate: Any = model.generate
            output = generate(**{key: value.clone() for key, value in inputs.items()}, generation_config=config)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}.generate refuses the inputs {sorted(inputs)}: {first_line(error)}"
        ) from error
    logits = torch.stack(output.logits, 1).float().numpy()
    return GoldenCase(
        name=name,
        inputs={key: value.numpy() for key, value in inputs.items()},
        sequences=output.sequences.numpy(),
        top_ids=np.broadcast_to(np.arange(logits.shape[-1]), logits.shape),
        top_logits=logits,
        options={"max_new_tokens": new_tokens, "do_sample": False},
    )
