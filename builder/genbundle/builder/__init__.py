"""The builder: `build_bundle(model, inputs, backend)` makes a bundle of a transformers model, `pack_bundle(directory)`
of what transformers exported."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genbundle.builder.build import build_bundle
    from genbundle.builder.pack import pack_bundle

__all__ = ["build_bundle", "pack_bundle"]


def __getattr__(name: str) -> object:
    # Late, so that the command line's help needs no torch; quiet, since torchao and others log while they are imported.
    if name in __all__:
        from genbundle.builder.noise import quiet

        with quiet():
            from genbundle.builder.build import build_bundle
            from genbundle.builder.pack import pack_bundle
        return {"build_bundle": build_bundle, "pack_bundle": pack_bundle}[name]
    raise AttributeError(name)
