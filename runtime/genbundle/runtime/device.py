"""`genbundle device`: a bundle as a folder for a phone app, with the calls of ExecuTorch's own runner for it.

Runs nothing, unless the bundle is of a lossy precision: then what it answers is recorded here.
"""

import json
import shutil
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from genbundle.bundles import Bundle, InputError, open_bundle
from genbundle.bundles.golden import GOLDEN_NAME, GoldenCase, read_golden
from genbundle.bundles.manifest import Input, Program, Runner
from genbundle.runtime.phone_code import PLATFORMS, code_files
from genbundle.runtime.questions import Parts, split_ids
from genbundle.runtime.text import TextProcessor


def write_device_folder(bundle: Bundle | str | Path, platform: str, output: str | Path) -> dict[str, Any]:
    """Write what an app on `platform` ("android", "ios") needs to run `bundle` into the new folder `output`.

    Returns what stands in its device.json. Raises InputError for a bundle that ExecuTorch's runner can't run, with the
    cause, for an unknown platform and for an output that exists.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    output = Path(output)
    if platform not in PLATFORMS:
        raise InputError(f"unknown platform {platform!r}: choose one of {', '.join(PLATFORMS)}")
    runner = _runner(opened)
    if output.exists() or output.is_symlink():
        raise InputError(f"{output} exists: give another output, or remove it first")
    phone = Phone(bundle=opened, platform=platform, runner=runner)
    _expect_fitting(opened, phone.media)
    staged = output.absolute().with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        staged.mkdir(parents=True)
        facts = phone.write(staged)
        staged.rename(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return facts


def _runner(bundle: Bundle) -> Runner:
    """The runner of ExecuTorch that runs the bundle; InputError with the cause where none does."""
    manifest = bundle.manifest
    if manifest.backend != "xnnpack":
        raise InputError(
            f"{bundle.path} is a {manifest.backend!r} bundle: phones take a .pte, build one with --backend xnnpack"
        )
    for runner in manifest.runners:
        if runner.obstacle is None:
            return runner
    causes = "; ".join(f"{runner.name}: {runner.obstacle}" for runner in manifest.runners)
    raise InputError(f"{bundle.path}: no runner of ExecuTorch runs it ({causes or 'its manifest names none'})")


def _expect_fitting(bundle: Bundle, media: Input | None) -> None:
    """InputError for a manifest that names a runner and lacks what that takes, as no build writes it."""
    if bundle.manifest.text is None:
        raise InputError(f"{bundle.path}: ExecuTorch's runners read text, and it holds no tokenizer")
    if bundle.manifest.flow.capacity is None:
        raise InputError(f"{bundle.path}: its manifest doesn't say how many tokens it holds (flow.capacity)")
    sizes = () if media is None else media.shape[1:]
    if media is not None and (len(sizes) not in (2, 3) or not all(isinstance(size, int) for size in sizes)):
        raise InputError(
            f"{bundle.path}: ExecuTorch's runner gives a picture [channels, height, width] or a sound [bins, frames], "
            f"and {media.name!r} is of shape {list(media.shape)}"
        )


@dataclass(frozen=True, kw_only=True)
class Phone:
    """A bundle for one platform."""

    bundle: Bundle
    platform: str
    runner: Runner

    @cached_property
    def processor(self) -> TextProcessor:
        """The bundle's tokenizer and chat template."""
        return TextProcessor(self.bundle)

    @cached_property
    def encoder(self) -> Program | None:
        """The program that takes pictures or sounds."""
        return next((item for item in self.bundle.manifest.programs if item.modality is not None), None)

    @cached_property
    def media(self) -> Input | None:
        """What it takes: `[1, channels, height, width]` or `[1, bins, frames]`, row by row."""
        fed = [] if self.encoder is None else self.encoder.inputs
        return next((item for item in fed if item.source.options.get("pieces") == "each"), None)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write everything into `folder`; what stands in its device.json."""
        manifest = self.bundle.manifest
        assert manifest.text is not None
        names = {"model.pte": manifest.programs[0].file, "tokenizer.json": manifest.text.tokenizer}
        for name, source in names.items():
            shutil.copyfile(self.bundle.file(source), folder / name)
        cases = self._write_golden(folder)
        planned = {program.method: program.memory or 0 for program in manifest.programs}
        facts = {
            "platform": self.platform,
            "runner": self.runner.name,
            "executorch": manifest.packages.get("executorch"),
            "model": manifest.model.name,
            "precision": manifest.precision,
            "capacity": manifest.flow.capacity,
            "model_bytes": manifest.files[names["model.pte"]].size,
            "tokenizer_bytes": manifest.files[names["tokenizer.json"]].size,
            "weight_bytes": manifest.model.weight_bytes,
            "planned_bytes": sum(planned.values()) or None,
            "golden_cases": cases,
            "golden_from": "this bundle" if self.lossy else "the original model",
        }
        _write_json(folder / "device.json", facts)
        for name, text in code_files(self.bundle, self.runner, self.media, self.processor, facts).items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        return facts

    def _write_golden(self, folder: Path) -> int:
        """golden.json and its arrays; how many cases."""
        manifest = self.bundle.manifest
        path = self.bundle.path / GOLDEN_NAME
        recorded = read_golden(self.bundle.file(GOLDEN_NAME)) if path.name in manifest.files else []
        cases, arrays = [], 0
        for case in recorded:
            parts, rows = self._parts_of(case), self._rows_of(case)
            if parts is None or rows is None or sum(part is None for part in parts) != len(rows):
                continue
            ids = case.inputs["input_ids"][0].tolist()
            new, ended = self._answer(case, len(ids))
            text = self.processor.decode(new, skip_special_tokens=False)
            # Of a text that can't be seen nothing is left to compare with.
            if "\ufffd" in text or not any(letter.isprintable() and not letter.isspace() for letter in text):
                continue
            given: list[dict[str, Any]] = []
            media = iter(rows)
            for part in parts:
                if part is not None:
                    given.append({"text": part})
                    continue
                row, name = next(media), f"golden-{arrays}.f32"
                row.astype("<f4").tofile(folder / name)
                given.append({"file": name, "shape": list(row.shape)})
                arrays += 1
            expected = {"expected_token_ids": new, "expected_text": text, "ended": ended}
            cases.append({"name": case.name, "parts": given, "token_ids": ids, **expected})
        _write_json(folder / "golden.json", {"cases": cases})
        return len(cases)

    def _answer(self, case: GoldenCase, prompt: int) -> tuple[list[int], bool]:
        """The new tokens of a case up to the end token: eager's, or this bundle's where it may differ from it.

        And whether there was an end token.
        """
        sequences, ends = case.sequences, self.bundle.manifest.generation.eos_token_ids
        if self.lossy:
            sequences = self._model.generate(**case.inputs, **case.options).sequences
        new = sequences[0, prompt:].tolist()
        count = next((index for index, token in enumerate(new) if token in ends), len(new))
        return new[:count], count < len(new)

    @property
    def lossy(self) -> bool:
        """Whether the bundle's tokens may differ from the original model's."""
        return any(program.precision != "fp32" for program in self.bundle.manifest.programs)

    @cached_property
    def _model(self) -> Any:
        from genbundle.runtime.load import load_bundle

        return load_bundle(self.bundle)

    def _parts_of(self, case: GoldenCase) -> Parts | None:
        """A recorded prompt as the runner takes it; None where its texts don't give its tokens again."""
        known = {"input_ids", "attention_mask", *([self.media.source.name] if self.media is not None else [])}
        ids = case.inputs.get("input_ids")
        mask = case.inputs.get("attention_mask", np.ones(1))
        if ids is None or ids.ndim != 2 or len(ids) != 1 or ids.dtype.kind not in "iu" or not mask.all():
            return None
        media = self._rows_of(case)
        names = all(isinstance(name, str) for name in case.options)
        if media is None or case.inputs.keys() - known or case.inputs.keys() & case.options.keys() or not names:
            return None
        token = None if self.encoder is None else self.bundle.manifest.placeholder_of(self.encoder)
        rows, parts = len(media), []
        for part in split_ids(ids[0], token, ids[0].tolist().count(token) // rows if rows else None):
            text = None if part is None else self.processor.decode(part, skip_special_tokens=False)
            if text is not None and self.processor.encode(text, add_special_tokens=False) != part:
                return None
            parts.append(text)
        return tuple(parts) if parts and parts[-1] is not None else None

    def _rows_of(self, case: GoldenCase) -> np.ndarray | None:
        """The case's pictures or sounds, one by one; None for arrays of another shape than the program's."""
        found = case.inputs.get(self.media.source.name or "") if self.media is not None else None
        if self.media is None or found is None:
            return np.zeros(0)
        return found if found.ndim == len(self.media.shape) and found.shape[1:] == self.media.shape[1:] else None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(
        json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace", newline="\n"
    )
