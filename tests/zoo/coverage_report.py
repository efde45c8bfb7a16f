"""The results of tests.zoo.coverage as a page: a summary, then a row per class."""

import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

# What stands against a class in the library itself, as found by running the model alone. No issues are known of them.
UPSTREAM = {
    "MuseSparkForConditionalGeneration": "the exporters' preparer reads the patch grid transposed.",
    "NemotronHForCausalLM": "a step doesn't clamp the time step as the prompt's scan does.",
    "VibeVoiceAsrForConditionalGeneration": "what it makes of a sound is drawn at random.",
    "Zamba2ForCausalLM": "a step doesn't clamp the time step as the prompt's scan does.",
}
_STATUSES = ("ok", "unsupported", "mismatch", "error", "timeout", "not eager")


def read(path: Path) -> list[dict[str, Any]]:
    """The last result of each class and backend, in order of their names."""
    if not path.exists():
        return []
    results = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    last = {(each["class"], each["backend"]): each for each in results}
    return [last[key] for key in sorted(last, key=lambda key: (key[0].lower(), key[1]))]


def table(results: list[dict[str, Any]], classes: int) -> str:
    """The page in Markdown. classes: how many there are to try."""
    backends = sorted({each["backend"] for each in results})
    lines = [
        "# Coverage",
        "",
        "Written by `python -m tests.zoo.coverage --report docs/coverage.md`: every generative class that transformers "
        "maps, as a tiny random model. A class is covered (ok, and the seconds that its build took) where its bundle "
        "gives eager's sequences, all tokens equal, for inputs that it wasn't built from: another prompt length, other "
        "content, a padded batch where eager takes one and answers its rows as alone (RWKV doesn't, and its bundle "
        "refuses one); 12 new tokens each. What is unsupported is refused at build; a mismatch would be a bundle that "
        "was built and gives something else. A sweep of all of them takes hours and goes on where it stopped, so a row "
        "may be older than the newest commit, and a class without a row hasn't been tried on that backend yet. There "
        f"are {classes} classes.",
        "",
        f"Rows by the commit that they were measured at: {_commits(results)}.",
        "",
        "| backend | covered, of tried | generate eagerly | unsupported | mismatch | error | timeout | not eager |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for backend in backends:
        counts = Counter(each["status"] for each in results if each["backend"] == backend)
        eager = sum(counts.values()) - counts["not eager"]
        share = f" ({100 * counts['ok'] / eager:.0f} %)" if eager else ""
        cells = [f"{counts['ok']}{share}", str(eager), *(str(counts[status]) for status in _STATUSES[1:])]
        lines.append(f"| {backend} | {' | '.join(cells)} |")
    times = [
        each["build_s"]
        for each in results
        if each["kind"] == "text" and each["backend"] == "cpu" and each["status"] == "ok"
    ]
    if times:
        lines += ["", f"Median build time of the covered text classes on cpu: {statistics.median(times):.1f} s."]
    lines += ["", f"| class | kind | {' | '.join(backends)} | why not |", f"|---|---|{'---|' * len(backends)}---|"]
    by_class: dict[str, dict[str, dict[str, Any]]] = {}
    for each in results:
        by_class.setdefault(each["class"], {})[each["backend"]] = each
    for name, found in by_class.items():
        statuses = [found[backend]["status"] if backend in found else "" for backend in backends]
        cells = [_cell(found[backend]) if backend in found else "" for backend in backends]
        kind = next(iter(found.values()))["kind"]
        causes = _causes(found, backends)
        if name in UPSTREAM and any(status not in ("", "ok") for status in statuses):
            causes += f"{'. ' if causes else ''}Upstream: {UPSTREAM[name]}"
        lines.append(f"| {name} | {kind} | {' | '.join(cells)} | {causes} |")
    return "\n".join(lines) + "\n"


def _cell(result: dict[str, Any]) -> str:
    return f"ok, {result['build_s']:.0f} s" if result["status"] == "ok" else result["status"]


def _commits(results: list[dict[str, Any]]) -> str:
    """How many rows each commit gave, the most first; those of runs that didn't record it last."""
    counts = Counter(each.get("commit", "") for each in results)
    unknown = counts.pop("", 0)
    named = [f"{commit} ({count})" for commit, count in counts.most_common()]
    return ", ".join(named + ([f"not recorded ({unknown})"] if unknown else []))


def _causes(found: dict[str, dict[str, Any]], backends: list[str]) -> str:
    """The causes as one cell, a cause that several backends share once."""
    causes: dict[str, list[str]] = {}
    for backend in backends:
        if backend in found and found[backend]["cause"]:
            causes.setdefault(_clean(found[backend]["cause"]), []).append(backend)
    if len(causes) == 1 and len(next(iter(causes.values()))) == len(found):
        return next(iter(causes))
    return "; ".join(f"{', '.join(which)}: {cause}" for cause, which in causes.items())


def _clean(cause: str) -> str:
    """A cause for a table's cell: no paths of the machine it came from, no addresses, no column marks."""
    cause = re.sub(r"(?:/[\w.…+-]+){2,}/([\w.+-]+)", r"…/\1", cause)
    cause = re.sub(r"0x[0-9a-f]{6,}", "0x…", cause)
    cause = cause.replace("|", "\\|").replace("<", "&lt;")
    return cause if len(cause) <= 200 else cause[:199] + "…"
