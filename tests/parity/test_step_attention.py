"""Steps that attend by products of matrices (`cpu`, four query heads and more to a key head), against eager."""

import numpy as np
import onnx
import pytest
import torch

from genbundle.runtime.rewind import rewind
from tests.zoo import models

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["qwen2", "llama_tied", "gemma3_text", "llava"])
def test_every_layer_chooses_and_says_its_shape(name, bundle):
    """test_parity.py compares their tokens; here is that they come this way."""
    graph = onnx.load(bundle(name).file("decode.onnx"), load_external_data=False).graph
    layers = [node for node in graph.node if node.op_type == "If" and len(node.output) == 3]
    assert len(layers) == 2 and not any(node.op_type == "GroupQueryAttention" for node in graph.node)
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    for node in layers:
        assert shapes[node.output[0]][:2] == ["batch", "sequence"]
    left = [node for node in graph.node if node.op_type == "MatMul"]
    assert left and all(shapes[node.output[0]][1] == "batch*sequence" for node in left)


def test_the_weights_of_programs_that_share_them_are_stored_once(bundle):
    """The halves of a gate and up projection, which is what the programs' graphs cut it into."""
    llava, model = bundle("llava"), models.make("llava")
    stored = llava.file(llava.manifest.weights).stat().st_size
    assert stored < 1.03 * sum(weight.nbytes for weight in model.parameters()) + 4096


def test_tokens_are_taken_back_whatever_was_computed_of_them(loaded):
    model, own = models.make("qwen2"), loaded("qwen2")
    ids, after = models.text_ids(30, seed=1), models.text_ids(4, seed=2)
    _, sequences = own.wiring.prompt({"input_ids": ids.numpy(), "attention_mask": np.ones((1, 30), np.int64)})
    for token in (7, 8):
        own.wiring.step(np.array([[token]]), sequences)
    for name, entry in sequences.state.tensors.items():
        own.backend.to_numpy(entry)[:, :, 20:] = np.nan
        assert np.isnan(own.backend.to_numpy(sequences.state.tensors[name])).any(), "no view of what the state holds"
    rewind(own.wiring, sequences, 20)
    logits = np.empty(0)
    for token in after[0]:
        logits = own.wiring.step(token.reshape(1, 1).numpy(), sequences)
    with torch.no_grad():
        expected = model(torch.cat([ids[:, :20], after], dim=1)).logits[:, -1]
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
