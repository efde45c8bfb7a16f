"""The builder: `build_bundle(model, inputs, backend)` turns a transformers model into a bundle."""

from genbundle.builder.noise import quiet

with quiet():  # torchao and the exporters' registries log while they are imported
    from genbundle.builder.build import build_bundle

__all__ = ["build_bundle"]
