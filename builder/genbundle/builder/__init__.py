"""The builder: `build_bundle(model, inputs, backend)` turns a transformers model into a bundle."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genbundle.builder.build import build_bundle

__all__ = ["build_bundle"]


def __getattr__(name: str) -> object:
    # Late, so that the command line's help needs no torch; quiet, since torchao and others log while they are imported.
    if name == "build_bundle":
        from genbundle.builder.noise import quiet

        with quiet():
            from genbundle.builder.build import build_bundle
        return build_bundle
    raise AttributeError(name)
