"""Curves over the epochs as a figure: means over seeds as lines, standard deviations as bands."""

import math

from experiments.runner.report import mean_and_spread


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
    (line,) = axes.plot(places, means, linestyle=style, color=colour, linewidth=1.6, label=label)
    low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    return line


def panels(pairs):
    """A matplotlib Figure, its panels by pair, and, beside that of a single pair, one to look closer (or None)."""
    from matplotlib.figure import Figure

    columns = min(3, max(2, len(pairs)))
    lines = -(-len(pairs) // columns)
    height = 2.9 if len(pairs) > 1 else 3.6
    figure = Figure(figsize=(1 + 3.6 * columns, 0.9 + height * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, pair in zip(grid, pairs):
        primary, auxiliary = pair.split("-")
        axes.set_title(f"{primary} primary, {auxiliary} auxiliary classes", fontsize=10)
    if len(pairs) == 1:
        grid[1].set_title("its second half, larger", fontsize=10)
        return figure, dict(zip(pairs, grid)), grid[1]
    for axes in grid[len(pairs) :]:
        axes.axis("off")
    return figure, dict(zip(pairs, grid)), None


def look_closer(axes):
    """Show the second half of what is drawn, at a scale of its own."""
    left, right = axes.dataLim.intervalx
    if left == right:
        return
    middle = (left + right) / 2
    heights = [y for line in axes.lines for x, y in line.get_xydata() if x >= middle and not math.isnan(y)]
    margin = 0.1 * (max(heights) - min(heights)) or 1.0
    axes.set(xlim=(middle, right), ylim=(min(heights) - margin, max(heights) + margin))


def draw_curves(runs, pairs, methods, what, curve, over=("epoch", None)):
    """A figure with a panel a pair: means over seeds as lines, ± a standard deviation as bands, a line a method.

    methods: {name: Method}. what: the label of the vertical axes. curve: RunOnDisk -> a list of numbers over the
    epochs, empty where unknown. over: label of the horizontal axes and, if not the epochs, the numbers' places there.
    A single pair has a second panel, with the second half larger.
    """
    figure, grid, closer = panels(pairs)
    shown = {}
    for pair, axes in [*grid.items(), *([(pairs[0], closer)] if closer else [])]:
        for name, method in methods.items():
            curves = list(filter(None, map(curve, runs.get((pair, name), {}).values())))
            if curves:
                shown[method.label] = draw_band(axes, curves, method.label, method.colour, method.style, over[1])
        if not axes.lines:
            axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes, color="gray")
        axes.set(xlabel=over[0], ylabel=what)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if closer and closer.lines:
        look_closer(closer)
    ordered = [method.label for method in methods.values() if method.label in shown]
    inches = 0.85 + 0.075 * max(map(len, ordered), default=0)  # of a label with its line
    columns = int(figure.get_figwidth() / inches)
    legend = {"loc": "outside upper center", "ncols": columns, "frameon": False, "handlelength": 3}
    figure.legend([shown[label] for label in ordered], ordered, **legend)
    return figure
