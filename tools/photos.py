"""Photos between drawings: which pictures are some, and how they stand on a dark page."""

import numpy as np
from PIL import Image, ImageDraw

WHITE, PAPER = 245, 0.6  # of 256 levels; the share of a drawing that is no line
BLACK, NIGHT = 48, 0.5  # and the share of a dark picture that is black
LETTER = 25  # pixels: panels are no smaller, and letters are, filled or not
PART = 0.2  # of the height of a row of panels: what a column of pixels in one has at least
INK = 124  # of letters beside photos: a grey that can be read on white and on black


def is_drawn(picture: Image.Image, lossless: bool) -> bool:
    "Lines on white paper, or panels of few colours? Dark panels are photos, or meant to be dark."
    if picture.mode == "RGBA" and picture.getextrema()[-1] != (255, 255):
        return True  # it has no paper
    counts = picture.convert("L").histogram()
    if lossless:
        return sum(counts[:BLACK]) < NIGHT * sum(counts)
    return sum(counts[WHITE:]) > PAPER * sum(counts)


def without_paper(picture: Image.Image) -> Image.Image:
    "Photos as they are, on a transparent ground; the letters around them grey."
    grey = np.asarray(picture.convert("L"), float)
    panels = inside_panels(picture)
    alpha = np.where(panels, 255, 255 - grey)
    colours = np.where(panels[..., None], np.asarray(picture.convert("RGB")), INK)
    shown = np.dstack([colours, alpha]).astype(np.uint8)
    return Image.fromarray(shown, "RGBA")


def inside_panels(picture: Image.Image) -> np.ndarray: # bool (height, width)
    "What lies in a rectangle that is a picture, rather than paper with letters."
    ink = picture.convert("L").point(lambda level: 255 * (level < WHITE))
    framed = Image.new("L", (ink.width + 2, ink.height + 2))  # paper goes all around
    framed.paste(ink, (1, 1))
    ImageDraw.floodfill(framed, (0, 0), 128)
    solid = np.asarray(framed) != 128
    found = near(~near(~solid))[1:-1, 1:-1]
    panels = np.zeros_like(found)
    for rows in runs(found.any(1)):
        for columns in runs(found[rows].mean(0) > PART):
            panels[rows, columns] = True
    return panels


def near(holds: np.ndarray) -> np.ndarray: # bool (height, width), both
    "Where it holds anywhere in a square of the width of a letter."
    for axis in (0, 1):
        sides = [(0, 0), (0, 0)]
        sides[axis] = (LETTER // 2 + 1, LETTER // 2)
        before = np.cumsum(np.pad(holds, sides, mode="edge"), axis, dtype=np.int32)
        first, last = np.split(before, [-LETTER], axis)[0], np.split(before, [LETTER], axis)[1]
        holds = last > first
    return holds


def runs(holds: np.ndarray) -> list[slice]: # bool (n,)
    "The stretches in which it holds."
    edges = np.flatnonzero(np.diff(np.concatenate([[0], holds, [0]])))
    return [slice(first, last) for first, last in edges.reshape(-1, 2)]
