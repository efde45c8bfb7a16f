"""Mixtures of experts for engines that can't sort tokens by expert: every expert computes every token."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_NAME = "genbundle_dense"


@contextmanager
def dense_experts(model: torch.nn.Module) -> Iterator[None]:
    """While open, `model`'s experts run through `every_expert`; those outside transformers' registry as they are."""
    configs: dict[int, Any] = {
        id(module.config): module.config
        for module in model.modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "has_post_expert_norm")
    }
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    ALL_EXPERTS_FUNCTIONS[_NAME] = every_expert
    try:
        for config in configs.values():
            config._experts_implementation_internal = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        del ALL_EXPERTS_FUNCTIONS[_NAME]


def every_expert(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers' own experts functions give for `[tokens, width]`, with the same arguments.

    ExecuTorch has no kernel that sorts or counts (`aten::sort`, `aten::histc`), which the grouped form needs, and the
    batched form copies an expert's weights for each token. So all experts compute all tokens, and the routing weights
    (0 for an expert that wasn't picked) add them up.
    """
    up, up_bias = ("gate_up_proj", "gate_up_proj_bias") if experts.has_gate else ("up_proj", "up_proj_bias")
    bias = (lambda name: getattr(experts, name)) if experts.has_bias else (lambda _name: None)
    result = _each(hidden_states[None], getattr(experts, up), bias(up_bias), experts.is_transposed)
    count, tokens = result.shape[:2]
    flat = result.flatten(0, 1)
    flat = experts._apply_gate(flat) if experts.has_gate else experts.act_fn(flat)
    result = _each(flat.unflatten(0, (count, tokens)), experts.down_proj, bias("down_proj_bias"), experts.is_transposed)
    if experts.has_post_expert_norm:
        result = experts.post_expert_norm(result)
    picked = top_k_index[None] == torch.arange(count, device=top_k_index.device)[:, None, None]
    weights = torch.where(picked, top_k_weights[None], 0.0).sum(-1)  # [experts, tokens]
    return (result * weights[..., None]).sum(0).to(hidden_states.dtype)


def _each(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    """`[1 or experts, tokens, in]` by each expert's weights, `[out, in]` or transposed: `[experts, tokens, out]`."""
    values = values.expand(weight.shape[0], -1, -1)
    # Weights as they lie: a transposed copy of them would be made in every call.
    product = torch.bmm(values, weight) if transposed else torch.bmm(weight, values.transpose(1, 2)).transpose(1, 2)
    return product if bias is None else product + bias[:, None]
