"""The image encoder as the ExecuTorch runtimes call it: positional inputs, one picture at a time, one output or two."""

import torch

from genbundle.builder.components import Component
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Input


class PictureEncoder(torch.nn.Module):
    """An encoder component for one picture: `pixel_values [1, C, H, W] -> features [1, N, D]`.

    Where the model also takes features of deeper levels, they are a second output `[levels, N, D]`.
    """

    def __init__(self, component: Component):
        super().__init__()
        self.module, self.names = component.module, tuple(component.sample)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The features of one picture."""
        outputs = self.module(**dict(zip(self.names, inputs, strict=True)))
        features, *levels = (output.reshape(-1, output.shape[-1]) for output in outputs.values())
        return (features[None], torch.stack(levels)) if levels else features[None]


def one_picture(component: Component) -> tuple[torch.Tensor, ...]:
    """The first picture of the component's sample; UnsupportedModelError for inputs that aren't one row per picture."""
    for name, tensor in component.sample.items():
        if not tensor.is_floating_point() or tensor.dim() != 4:
            raise UnsupportedModelError(
                f"{component.name}: its input {name!r} of shape {list(tensor.shape)} isn't pictures of one size, which "
                "the xnnpack backend needs: build for another backend, for instance cpu"
            )
    return tuple(tensor[:1] for tensor in component.sample.values())


def picture_inputs(component: Component) -> tuple[Input, ...]:
    """The manifest's inputs: any number of pictures, of which the engine gives the method one at a time."""
    return tuple(
        Input(name=name, dtype="float32", shape=("pictures", *tensor.shape[1:]), source=component.sources[name])
        for name, tensor in component.sample.items()
    )
