"""Draws a result of benchmarks.step_training: seconds and computed tokens of a step against the number of states.

    python -m benchmarks.step_training.plot RESULT.json docs/step_training.svg

Both axes are logarithmic, so that a cost growing as K to the power b is a line of slope b.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STYLES = {  # told apart without colour too; the last label's height beside its point, since padded and packed end close together
    "padded": ("#d55e00", "s", 3),
    "packed": ("#0072b2", "^", -9),
    "comb": ("#009e73", "o", -3),
}


def require_matplotlib() -> None:
    """Raises ImportError with the remedy."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("drawing needs matplotlib; run: pip install -c constraints.txt matplotlib") from error


def draw(result: dict[str, Any], path: Path) -> None:
    """Plots the results at the largest cell's G. The kind of picture follows from the name (.svg, .png)."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    summary, settings, machine = result["summary"], result["settings"], result["environment"]
    rows = [row for row in result["results"] if row["samples"] == summary["samples"]]
    steps = sorted({row["steps"] for row in rows})
    matplotlib.rcParams["svg.hashsalt"] = "step_training"  # the same result draws the same file
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, cost, exponent, title in (
        (left, "seconds", "exponent", "Seconds of one optimizer step"),
        (right, "tokens_computed", "token_exponent", "Tokens computed in it"),
    ):
        for way, (colour, marker, height) in STYLES.items():
            points = [(row["steps"], row[cost]) for row in rows if row["way"] == way]
            if points:
                b = summary[f"{exponent}_{way}"]
                label = way if b is None else f"{way}, grows as $K^{{{b:.2f}}}$"
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=2, label=label)
                last = f"{points[-1][1]:,.0f}" if cost == "tokens_computed" else f"{points[-1][1]:.3g} s"
                axes.annotate(
                    last,
                    points[-1],
                    xytext=(7, height),
                    textcoords="offset points",
                    color=colour,
                    annotation_clip=False,
                )
        axes.set(xscale="log", yscale="log", xlabel=f"states K, {summary['samples']} actions at each", title=title)
        axes.set_xticks(steps, [str(k) for k in steps])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.grid(which="major", alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    lengths = ", ".join(f"{name} {tokens}" for name, tokens in settings["lengths"].items())
    hardware = machine["gpu"] if settings["device"] == "cuda" else f"{machine['cpu']} (threads: {machine['threads']})"
    figure.suptitle(
        f"{settings['model']}, {settings['dtype']}, {settings['shape']} ({lengths} tokens)\n"
        f"{hardware}, {machine['date']}, commit {machine['commit'] or 'unknown'}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path, help="a name ending in .svg or .png")
    options = parser.parse_args()
    draw(json.loads(options.result.read_text(encoding="utf-8")), options.picture)
    print(options.picture)


if __name__ == "__main__":
    main()
