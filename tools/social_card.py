"""Draw nbs/card.png: what a link to a page of the site looks like where it is shared."""

import argparse

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from notebook import NBS

from hilbert_attn.curves import curve_order

SIDE, INK, GREY, GROUND = 32, "#f4f5f7", "#aab0bd", "#16181d"


def draw() -> plt.Figure:
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor=GROUND)
    ax = fig.add_axes((0.04, 0.08, 0.44, 0.84))
    rows, columns = np.divmod(curve_order((SIDE, SIDE)).numpy(), SIDE)
    points = np.stack([columns, rows], 1)
    steps = np.stack([points[:-1], points[1:]], 1)
    color = np.arange(len(steps))
    ax.add_collection(LineCollection(list(steps), cmap="turbo", array=color, linewidths=2.5))
    ax.set(xlim=(-1, SIDE), ylim=(SIDE, -1), aspect="equal")
    ax.axis("off")
    fig.text(0.52, 0.60, "hilbert_attn", color=INK, fontsize=46, weight="bold")
    lines = "Exact sparse attention\nalong space-filling curves"
    fig.text(0.52, 0.40, lines, color=GREY, fontsize=25, linespacing=1.5)
    return fig


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    draw().savefig(NBS / "card.png", facecolor=GROUND)
