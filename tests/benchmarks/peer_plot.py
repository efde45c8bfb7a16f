"""The ratios as bars with their spread beside the budgets: python peer_plot.py ROWS.json FILE.svg"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt


def main() -> None:
    """Draw the rows of peers.py."""
    rows = [row for row in json.loads(Path(sys.argv[1]).read_text()) if row["what"] != "opening"]
    matplotlib.rcParams["svg.hashsalt"] = "genbundle"
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        color = "#2a7f62" if row["ratio"] <= row["limit"] else "#b5533c"
        axes.barh(place, row["ratio"], color=color, height=0.6)
        axes.plot([row["low"], row["high"]], [place, place], color="black", linewidth=1)
        axes.plot([row["limit"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2, linestyle=":")
    axes.set_yticks(range(len(rows)), [f"{row['bundle']} {row['what']}" for row in reversed(rows)])
    axes.set_xlim(0, 1.6)
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_xlabel("time over the fastest peer's (line: spread; dots: budget)")
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
