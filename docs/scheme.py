"""Draws docs/scheme.png, the picture of MAXL at the top of README: `python docs/scheme.py`.

A unit is a pixel of the picture shown 860 pixels wide; y points upwards.
Blue belongs to pass 1, which updates θ1, orange to pass 2, which updates θ2, grey to both.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import BoxStyle, FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Line

WIDTH, HEIGHT, PIXELS = 860, 460, 1200  # PIXELS: the width of the file
INK, GREY, BLUE, ORANGE, WHITE = "#1f2328", "#6e7781", "#0b5cad", "#bc4c00", "#ffffff"
PALE = {GREY: "#f3f4f6", BLUE: "#e3effc", ORANGE: "#fdeee0"}
PSI, PRIMARY, LABEL = [2, 3, 4], 1, [0.56, 0.14, 0.30]  # the example: ψ, an image's class and its auxiliary label
Y_PRI, Y_AUX, L_PRI, L_AUX = (rf"{{{a}}}^{{\mathrm{{{b}}}}}" for a in ("y", r"\mathcal{L}") for b in ("pri", "aux"))
STEP = rf"\theta_1-\alpha\nabla({L_PRI}\!+{L_AUX})"

plt.rcParams["mathtext.fontset"] = "dejavusans"
figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100))
axes = figure.add_axes([0, 0, 1, 1], xlim=(0, WIDTH), ylim=(-6, HEIGHT - 6))
axes.axis("off")


def write(x, y, text, colour=INK):
    axes.text(x, y, text, color=colour, fontsize=16 * 0.72, ha="center", va="center", zorder=4)


def box(x, y, width, height, edge, face=None, text="", radius=8):
    """A rounded box with its lower left corner at (x, y)."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, BoxStyle.Round(0, radius), fc=face or PALE[edge], ec=edge))
    write(x + width / 2, y + height / 2, text)


def arrow(*points, colour=GREY, style="-", radius=8):
    """An arrow along the points, its corners rounded."""
    points = np.array(points, float)
    vertices, codes = [points[0]], [Line.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:]):
        enter, leave = (corner + radius * np.sign(end - corner) for end in (before, after))
        vertices += [enter, corner, leave]
        codes += [Line.LINETO, Line.CURVE3, Line.CURVE3]
    path, tip = Line([*vertices, points[-1]], [*codes, Line.LINETO]), points[-1] - np.sign(points[-1] - points[-2])
    axes.add_patch(PathPatch(path, fc="none", ec=colour, lw=1.4, ls=style, zorder=3))
    axes.add_patch(FancyArrowPatch(tip, points[-1], arrowstyle="-|>", mutation_scale=10, shrinkA=0, shrinkB=0,
                                   color=colour, zorder=3))


def flower(size=32):
    """A (size, size, 3) image of a flower."""
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    grass = np.stack([0.25 + 0.1 * y, 0.45 - 0.15 * y, 0.22 + 0.05 * x], axis=-1)
    petals = np.stack([0.95 - 0.25 * radius, 0.35 + 0.45 * radius, 0.6 + 0.1 * radius], axis=-1)
    image = np.where((radius < 0.56 + 0.3 * np.cos(5 * angle + 0.6))[..., None], petals, grass)
    image[radius < 0.22] = [0.97, 0.78, 0.2]
    return np.clip(image + np.random.default_rng(0).normal(0, 0.035, image.shape), 0, 1)


# boxes: the card, the two networks, the auxiliary label, the multi-task loss, the steps
box(2, -4, WIDTH - 4, HEIGHT - 4, "#d0d7de", WHITE, radius=16)
for place in (
    (162, 250, 202, 130, ORANGE), (162, 78, 202, 156, BLUE), (400, 250, 180, 130, GREY), (400, 78, 92, 128, GREY),
    (612, 78, 228, 60, BLUE), (612, 158, 228, 60, ORANGE), (612, 250, 228, 130, ORANGE),
):
    box(*place)
box(194, 266, 138, 40, ORANGE, WHITE, "Mask SoftMax")
box(172, 120, 70, 52, BLUE, WHITE, "shared\ntrunk")
for y, name, loss in (172, "auxiliary", L_AUX), (112, "primary", L_PRI):
    box(268, y - 22, 86, 44, BLUE, WHITE, f"{name}\nhead")
    box(410, y - 22, 72, 44, GREY, WHITE, f"${loss}$")
    arrow((242, 146), (255, 146), (255, y), (267, y), radius=6)
    arrow((354, y), (408, y))

# the auxiliary label: zero outside the sub-classes of the image's primary class
for group, end in enumerate(np.cumsum(PSI)):
    start, mine = end - PSI[group], group == PRIMARY
    axes.plot([421 + 16 * start, 415 + 16 * end], [303, 303], color=ORANGE if mine else GREY, lw=1.5)
    write(418 + 8 * (start + end), 289, str(group), ORANGE if mine else INK)
    for k in range(start, end):
        axes.bar(426 + 16 * k, 80 * LABEL[k - start] if mine else 0, 10, 304, color=ORANGE)
        write(426 + 16 * k, 313, "" if mine else "0", GREY)

axes.imshow(flower(), extent=(30, 114, 115, 199), aspect="auto", interpolation="nearest", zorder=2)
for x, y, text, colour in (
    (72, 358, f"primary label\n${Y_PRI}$ = {PRIMARY}", INK), (72, 312, f"$\\psi$ = {PSI}", INK),
    (72, 212, "image $x$", INK), (263, 348, "label-generation\nnetwork $g_{\\theta_2}$", ORANGE),
    (263, 216, r"multi-task network $f_{\theta_1}$", BLUE), (490, 363, "soft auxiliary label", INK),
    (490, 268, "primary class", INK), (468, 228, f"${Y_AUX}$", INK), (446, 142, "+", INK), (446, 52, f"${Y_PRI}$", INK),
    (726, 122, "gradient step", BLUE), (726, 97, rf"$\theta_1\leftarrow{STEP}$", INK),
    (726, 202, "look-ahead step", ORANGE), (726, 177, rf"$\theta_1^+={STEP}$", INK),
    (726, 350, r"primary loss at $\theta_1^+$", ORANGE), (726, 280, r"$\mathcal{H}$: negative entropy", ORANGE),
    (726, 316, rf"${L_PRI}(\theta_1^+)+\lambda\,\mathcal{{H}}({Y_AUX})$", INK),
    (494, 430, "pass 2: meta-gradient updates $\\theta_2$", ORANGE),
    (494, 17, "pass 1: gradient updates $\\theta_1$", BLUE),
):
    write(x, y, text, colour)

for colour, *points in (
    (GREY, (128, 350), (160, 350)), (GREY, (128, 312), (160, 312)), (GREY, (117, 157), (160, 157)),
    (GREY, (117, 157), (142, 157), (142, 276), (160, 276)), (GREY, (332, 286), (398, 286)),
    (GREY, (446, 250), (446, 196)), (GREY, (446, 66), (446, 88)), (BLUE, (492, 108), (610, 108)),
    (BLUE, (726, 78), (726, 33), (263, 33), (263, 76)),
    (ORANGE, (492, 188), (610, 188)), (ORANGE, (726, 218), (726, 248)), (ORANGE, (580, 315), (610, 315)),
):
    arrow(*points, colour=colour)
arrow((726, 380), (726, 412), (263, 412), (263, 382), colour=ORANGE, style=(0, (4, 2.5)))
figure.savefig(Path(__file__).with_suffix(".png"), dpi=PIXELS / WIDTH * 100, transparent=True)
