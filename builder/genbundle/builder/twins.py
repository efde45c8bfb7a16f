"""A staged bundle as this machine can run it, where the CPU has no kernels for what it is made of."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import onnx_ir as ir

from genbundle.builder.passes.half_precision import compute_in_float32
from genbundle.bundles import Bundle
from genbundle.bundles.writer import trial_bundle


@contextmanager
def runnable(staged: Bundle) -> Iterator[Bundle]:
    """`staged` itself, or a twin of it, which stands as long as the context does.

    ONNX Runtime's CPU provider computes in float16, by casts of its own, and not at all in bfloat16. In the twin each
    operator of such a program computes in float32 between roundings to bfloat16, as a GPU does but for the order of
    sums.
    """
    programs = staged.manifest.programs
    narrow = {program.file for program in programs if program.precision == "bf16"}
    if not narrow:
        yield staged
        return
    with trial_bundle(staged.path) as twin:
        for name in staged.manifest.files:
            target = twin.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in narrow:
                model = ir.load(staged.path / name)
                compute_in_float32(model)
                ir.save(model, target)
            else:
                _share(str(staged.path / name), str(target))
        wide = tuple(replace(item, precision="fp32") if item.file in narrow else item for item in programs)
        yield twin.stage(replace(staged.manifest, programs=wide))


def _share(source: str, target: str) -> None:
    """The same file under a second name, or a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
