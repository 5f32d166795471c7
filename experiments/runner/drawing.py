"""Curves over the epochs as a figure: means over seeds as lines, standard deviations as bands."""

import textwrap

from experiments.runner.report import mean_and_spread

LINES = "Lines: means over the seeds; bands: ± one standard deviation."


def caption(figure, words):
    """Write under a matplotlib Figure what it shows."""
    width = int(17 * figure.get_figwidth())  # letters of size 7 in a line
    words = words.replace(" = ", "\u00a0=\u00a0")  # no line ends within "λ = 0"
    figure.supxlabel(textwrap.fill(words, width), fontsize=7, color="dimgray")


def band(curves):
    """By epoch: means and standard deviations (0 for one) of the curves, lists of numbers, that got there."""
    points = [[curve[epoch] for curve in curves if epoch < len(curve)] for epoch in range(max(map(len, curves)))]
    means, spreads = zip(*map(mean_and_spread, points))
    return list(means), [spread or 0.0 for spread in spreads]


def draw_band(axes, curves, label, colour, style, places=None):
    """Draw the mean of the curves, and ± a standard deviation as a band; returns the line.

    places: of a curve's numbers on the horizontal axis, the epochs 1, 2, ... by default. NaN is left out.
    """
    means, spreads = band(curves)
    places = range(1, len(means) + 1) if places is None else places
    alone = "o" if len(means) == 1 else None  # a line of one point is not seen
    (line,) = axes.plot(places, means, linestyle=style, color=colour, linewidth=1.6, label=label, marker=alone)
    low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    return line


def grid_of(count, columns, size, margin):
    """A matplotlib Figure and `count` axes, `columns` in a row, each of about `size` inches; the rest stays empty."""
    from matplotlib.figure import Figure

    lines = -(-count // columns)
    inches = [one * n + more for one, n, more in zip(size, (columns, lines), margin)]
    figure = Figure(figsize=inches, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[count:]:
        axes.axis("off")
    return figure, grid[:count]


def draw_curves(runs, pairs, methods, what, curve, over=("epoch", None), second=None):
    """A figure with a panel a pair and a line a method.

    methods: {name: Method}. what: the label of the vertical axes. curve: RunOnDisk -> a list of numbers over the
    epochs, empty if unknown. over: label of the horizontal axes and, if not the epochs, the numbers' places there.
    second: figure -> None, draws something else into a further panel.
    """
    panels = len(pairs) + (second is not None)
    figure, grid = grid_of(panels, min(3, panels), (3.6, 2.9 if len(pairs) > 1 else 3.6), (1, 1.3))
    shown = {}
    for pair, axes in zip(pairs, grid):
        axes.set_title("{} primary, {} auxiliary classes".format(*pair.split("-")), fontsize=10)
        for name, method in methods.items():
            curves = list(filter(None, map(curve, runs.get((pair, name), {}).values())))
            if curves:
                shown[name] = draw_band(axes, curves, method.label, method.colour, method.style, over[1])
        if not axes.lines:
            axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes, color="gray")
        axes.set(xlabel=over[0], ylabel=what)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if second:
        second(figure)
    legend(figure, methods, shown)
    return figure


def legend(figure, methods, lines):
    """Name above the panels the methods, {name: Method}, that have one of the lines, {name: line}."""
    labels = [method.label for name, method in methods.items() if name in lines]
    inches = 0.85 + 0.075 * max(map(len, labels), default=0)  # of a label with its line
    place = {"loc": "outside upper center", "ncols": int(figure.get_figwidth() / inches), "frameon": False}
    figure.legend([lines[name] for name in methods if name in lines], labels, handlelength=3, **place)


def draw_dots(axes, columns):
    """A column of dots for each label, a dot for each number, a line for the mean of several, and n below.

    columns: {label: [(colour, kind, numbers, whether the dots are filled), ...]}, two kinds at most, side by side.
    A legend names the kinds, unless they are "".
    """
    names, kinds = [], {}
    for place, (label, groups) in enumerate(columns.items()):
        groups = [group for group in groups if group[2]]
        for (colour, kind, numbers, filled), shift in zip(groups, (-0.2, 0.2) if len(groups) == 2 else (0,)):
            dots = axes.scatter([place + shift] * len(numbers), numbers, 26, color=colour, zorder=3,
                                marker="o" if filled else "D", facecolor=colour if filled else "white")  # fmt: skip
            kinds.setdefault(kind, dots)
            if len(numbers) > 1:
                axes.plot([place + shift - 0.3, place + shift + 0.3], 2 * [mean_and_spread(numbers)[0]], color=colour)
        names.append(f"{label}\nn = {' + '.join(str(len(group[2])) for group in groups) or 0}")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", alpha=0.3)
    if any(kinds):
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.15 * (high - low))  # room, or the legend would cover dots
        axes.legend(kinds.values(), kinds, fontsize=8, loc="upper center", ncols=2)
