"""Figure 5: t-SNE of the test images' features, the trunk's output, for Single, Human and MAXL on two hierarchies.

    python -m experiments.figure5                          # run what is missing, then draw
    python -m experiments.figure5 --quick                  # small runs on generated images

The runs are Figure 3's, and their checkpoints are read. The first of --seeds is drawn. What the eye is to judge is
measured too, on the features themselves: the accuracy of nearest neighbours, and the silhouette of the primary classes.
Needs scikit-learn (pip install scikit-learn).
"""

import argparse
import functools
import sys

import numpy as np
from tqdm import tqdm

from experiments import pairs, trained
from experiments.pairs import METHODS, PAIRS
from experiments.runner import drawing, report
from experiments.runner.main import Experiment
from harness.acceleration import select_device

THREE = ["single", "human", "maxl"]
NEIGHBOURS = 20
PERPLEXITY = 30
DRAWN, SEED = 2000, 0  # test images in the picture, and the seed that draws them and starts the t-SNE
MEASURES = {  # of the table: heading and digits
    "knn_accuracy": ("neighbours (%)", 2), "silhouette": ("silhouette", 3), "test_accuracy": ("test accuracy (%)", 2),
}  # fmt: skip
FEW = ["#56B4E9", "#D55E00", "#000000"]  # Okabe and Ito's, told apart by the colour-blind and in a grey print
MANY = [  # no pale ones, which vanish in print
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#2fc1e0", "#f032e6", "#a6d92e", "#f2a0b5", "#469990",
    "#b79cf0", "#9a6324", "#000000", "#800000", "#57cf8c", "#808000", "#d9a066", "#000075", "#a9a9a9", "#e5c700",
]  # fmt: skip


def measure(features, labels):
    """Accuracy in % of the nearest neighbours, each point left out of its own, and the classes' silhouette.

    features: (N, D); labels: int (N,). A tie of votes goes to the class whose members are nearer.
    """
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(labels) - 1)).fit(features)
    nearest = labels[neighbours.kneighbors(return_distance=False)]  # (N, k) classes; none is a point's own neighbour
    vote = 1 + 0.5 ** np.arange(1, nearest.shape[1] + 1)  # all that is added stays below one vote
    votes = np.stack([(nearest == c) @ vote for c in range(labels.max() + 1)], axis=1)
    accuracy = 100 * (votes.argmax(axis=1) == labels).mean()
    return {"knn_accuracy": float(accuracy), "silhouette": float(silhouette_score(features, labels))}


def embed(features, seed):
    """t-SNE of features (N, D): (N, 2)."""
    from sklearn.manifold import TSNE

    if not np.ptp(features, axis=0).any():  # of a network that has died: PCA would make NaN, and t-SNE crash
        return np.zeros((len(features), 2), dtype=np.float32)
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)


def measure_and_embed(runs, settings):
    """Set .measured of {(pair, method): {seed: RunOnDisk}}; returns what is drawn, and the number of test images.

    The former is {(pair, method): (points (n, 2), their classes (n,))}, of the first of settings.seeds.
    """
    device = select_device(argparse.Namespace(device="auto"))
    test = trained.load_test(runs, settings.data_root, device)
    every, drawn = test.labels.cpu(), {}
    # in a random order, so that no class lies on top of another as a whole
    subset = trained.random_subset(every, min(DRAWN, len(every)), SEED)
    with tqdm(total=sum(map(len, runs.values())), desc="features", disable=None) as bar:
        for (pair, method), found in runs.items():
            labels = every[:, PAIRS[pair][0]].numpy()
            for seed, run in found.items():
                network = trained.load_trained(run, pairs.task(method, pair, seed, settings.out), device).network
                features = trained.trunk_features(network, test).numpy()
                run.measured = measure(features, labels) | {"test_accuracy": run.accuracy[-1]}
                if seed == settings.seeds[0]:
                    drawn[pair, method] = embed(features[subset], SEED), labels[subset]
                bar.update()
    return drawn, len(every)


# --- the figure ---


def draw(runs, drawn, shown, seed):
    """A row a pair, a column a method; a class has its colour in all panels of a row."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names_of = {pair: trained.class_names(runs, PAIRS[pair][0]) for pair in shown}
    heights = [3.9 + 0.16 * -(-len(names) // 4) for names in names_of.values()]  # inches, with the lines of the legend
    figure = Figure(figsize=(9.6, 0.4 + sum(heights)), layout="constrained")
    figure.get_layout_engine().set(wspace=0.01)
    for pair, row in zip(shown, figure.subfigures(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]):
        row.suptitle("{} primary, {} auxiliary classes".format(*pair.split("-")), fontsize=11)
        names = names_of[pair]
        colours = [(FEW if len(names) <= len(FEW) else MANY)[c % len(MANY)] for c in range(len(names))]
        for method, axes in zip(THREE, row.subplots(1, len(THREE))):
            axes.set(title=METHODS[method].label, xticks=[], yticks=[], box_aspect=1)
            if (pair, method) not in drawn:
                axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes, color="gray")
                continue
            points, classes = drawn[pair, method]
            run = runs[pair, method][seed]
            one = run.measured
            if not run.finished:
                axes.set_title(f"{METHODS[method].label}, epoch {len(run.rows)} of {run.settings['epochs']}")
            axes.set_xlabel(f"neighbours {one['knn_accuracy']:.1f} %, silhouette {one['silhouette']:.3f}", fontsize=9)
            axes.scatter(*points.T, s=5, c=[colours[c] for c in classes], alpha=0.75, linewidths=0)
        handles = [Line2D([], [], marker="o", linestyle="", color=colour) for colour in colours]
        row.legend(
            handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=8, frameon=False,
            handletextpad=0.1, columnspacing=1.2,
        )  # fmt: skip
    return figure


def make_report(settings):
    """The figure, and the table as rows and as text."""
    runs = pairs.read_runs(settings.out, THREE, settings.pairs, settings.seeds)
    (drawn, count), described = measure_and_embed(runs, settings), pairs.describe(runs)
    shown = {method: METHODS[method] for method in THREE}
    rows = pairs.table(runs, shown, settings, report.measured(MEASURES), unfinished=True)
    figure = draw(runs, drawn, settings.pairs, settings.seeds[0])
    drawing.caption(figure, f"{described}; drawn: seed {settings.seeds[0]}, {min(DRAWN, count)} test images")
    columns = {heading: (name, digits) for name, (heading, digits) in MEASURES.items()}
    text = (
        f"Features of the {count} test images, the trunk's output in evaluation mode ({described}). "
        f"Neighbours: share of the images that the vote of their {NEIGHBOURS} nearest (Euclidean) among all other test "
        "images puts into the right primary class; no training image takes part. Silhouette: of the primary classes, "
        "mean over the images. Test accuracy: of the primary head, in the same epoch. Mean ± standard deviation over n "
        "runs, unfinished ones included as far as they are.\n\n"
        f"Figure: t-SNE (perplexity {PERPLEXITY}, PCA at the start, seed {SEED}) of a class-balanced "
        f"subset of {min(DRAWN, count)} test images, the same in all panels, for the runs of seed "
        f"{settings.seeds[0]}; under each panel the numbers of that run, on all test images.\n\n"
    ) + report.rows_as_markdown(rows, pairs.HEAD | columns | {"n": "n", "missing": "missing"})
    return figure, rows, text


experiment = Experiment(
    "figure5", __doc__, pairs.plan, make_report, functools.partial(pairs.add_pairs, default="3-10, 20-100"),
    full={"pairs": ["3-10", "20-100"], "methods": THREE, "seeds": pairs.SEEDS},
    quick={"pairs": ["3-10", "20-100"], "seeds": [0]}, folder="figure3", needs_scikit_learn=True,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(experiment())
