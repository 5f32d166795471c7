"""Figure 6: images and mutual information of generated labels, on labels that are known and from tiny runs."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, run_script, shortcuts

import create_dataset
import utils
from experiments import figure6
from experiments import trained as checkpoints
from experiments.methods import random_labels as model_vgg_random
from harness import exits
from model_vgg_maxl import LabelGenerator

pytest.importorskip("sklearn")
ALL = create_dataset.LABELS_OF_FINE_CLASS.repeat_interleave(20, dim=0)  # labels (2000, 4), 20 images a fine class


@pytest.fixture(autouse=True)
def few_test_images():
    with shortcuts(test_images=200):
        yield


def tiny_run(seed, *options):
    few = [*TINY, "--train-images", "100", "--epochs", "1", "--seed", seed]
    assert run_script("model_vgg_maxl", *few, "--out", f"r/maxl-20-100-seed{seed}", *options) == 0


# --- the number -----------------------------------------------------------------------------------------


def test_the_fine_classes_themselves_share_all_information_whatever_their_names():
    assert figure6.shared_information(ALL[:, 3], ALL, 2) == pytest.approx([1.0] * 20)
    assert figure6.shared_information((7 * ALL[:, 3] + 3) % 100, ALL, 2) == pytest.approx([1.0] * 20)
    assert figure6.shared_information(ALL[:, 2], ALL, 2) == pytest.approx([0.0] * 20)  # one class for all


def test_a_tiny_table_has_the_value_worked_by_hand():
    """Two fine classes of two images each; the first is in auxiliary class 0 alone, the second in 0 and 1."""
    fine = [create_dataset.CLASS_NAMES[3].index(name) for name in ("bee", "bee", "beetle", "beetle")]
    labels = create_dataset.LABELS_OF_FINE_CLASS[fine]
    found = figure6.shared_information(torch.tensor([0, 0, 0, 1]), labels, 0)[0]
    of_auxiliary = math.log(4) - 3 / 4 * math.log(3)
    shared = of_auxiliary - math.log(2) / 2  # H(auxiliary) - H(auxiliary | fine)
    assert found == pytest.approx(2 * shared / (of_auxiliary + math.log(2)))


def test_random_labels_share_what_chance_gives():
    """For large n, 2n times the mutual information is χ² with (5 - 1)(5 - 1) degrees of freedom."""
    many = ALL.repeat_interleave(5, dim=0)  # 500 images of each primary class, as the real test set has
    random = figure6.random_information([5] * 20, many, 2, draws=10)
    assert np.mean(random) == pytest.approx(16 / (2 * 500) / math.log(5), rel=0.1)
    one = figure6.shared_information(model_vgg_random.random_labels(many[:, 2], [5] * 20, seed=77), many, 2)
    assert np.mean(one) == pytest.approx(np.mean(random), rel=0.3)
    assert random == figure6.random_information([5] * 20, many, 2, draws=10)


# --- the images -----------------------------------------------------------------------------------------


def test_the_surest_images_come_first_and_only_of_the_primary_class():
    primary = torch.tensor([0, 1] * 10)
    labels = torch.zeros(20, 6)
    labels[::2, 0] = torch.tensor([0.1, 0.9, 0.3, 0.9, 0.0, 0.5, 0.2, 0.8, 0.4, 0.6])  # of images 0, 2, 4, ...
    labels[:, 1] = torch.arange(20) / 20
    labels[:, 2] = 1 - labels[:, 1]
    labels[1, 0] = 1.0  # of the other primary class
    tops = figure6.top_images(labels, primary, [3, 3], 0, seed=0)
    assert tops == {0: [2, 6, 14, 18, 10], 1: [18, 16, 14, 12, 10], 2: [0, 2, 4, 6, 8]}


def test_the_auxiliary_classes_are_the_seeds_and_the_primary_classs_own():
    primary, psi = torch.arange(4).repeat(10), [2, 9, 9, 4]
    labels = torch.rand(40, sum(psi), generator=torch.Generator().manual_seed(0))

    def drawn(primary_class, seed):
        return list(figure6.top_images(labels, primary, psi, primary_class, seed))

    assert sorted(drawn(0, 0)) == [0, 1]  # no more than there are
    for primary_class, own in ((1, range(2, 11)), (2, range(11, 20)), (3, range(20, 24))):
        classes = drawn(primary_class, 5)
        assert len(set(classes)) == 3 and set(classes) <= set(own) and classes == drawn(primary_class, 5)
    assert len({tuple(drawn(1, seed)) for seed in range(10)}) > 5


def test_the_labels_are_the_generators_in_evaluation_mode():
    torch.manual_seed(0)
    images, labels = create_dataset.make_synthetic(train=False)
    split = create_dataset.Split(images[:150], labels[:150])
    generator = LabelGenerator(utils.VGG16(0.05), [5] * 20)
    (whole, _), *_ = split.test_batches(150)
    generator(whole, labels[:150, 2])  # moves the running statistics
    found = checkpoints.generated_labels(generator.train(), split, 2)
    logits = generator.head(generator.trunk(whole)).detach()  # generated_labels left it in evaluation mode
    assert not generator.training
    for image, primary in enumerate(labels[:150, 2].tolist()):
        expected = torch.zeros(100)
        expected[5 * primary : 5 * primary + 5] = logits[image, 5 * primary : 5 * primary + 5].softmax(dim=0)
        torch.testing.assert_close(found[image], expected, rtol=1e-4, atol=1e-6)


# --- from runs ------------------------------------------------------------------------------------------


def test_the_first_weights_share_what_they_share_before_the_first_epoch():
    """Of a label generator made as the script makes it, on batch statistics, which are all that it has."""
    tiny_run(0)
    assert exits.run_main(figure6.experiment.main, ["--plot", "--out", "r", "--seeds", "0"]) == 0
    torch.manual_seed(0)
    trunks = [utils.VGG16(0.02), utils.VGG16(0.02)]
    utils.initialise(utils.Network(trunks[0], 20, 100), torch.nn.init.xavier_uniform_)
    generator = utils.initialise(LabelGenerator(trunks[1], [5] * 20), torch.nn.init.xavier_normal_)
    split = create_dataset.Split(*create_dataset.make_synthetic(train=False))
    with torch.no_grad():
        largest = [generator(images, labels[:, 2]).argmax(dim=1) for images, labels in split.test_batches()]
    expected = figure6.shared_information(torch.cat(largest), split.labels, 2)
    with open("r/figure6.csv", newline="") as file:
        assert [float(row["nmi_first"]) for row in csv.DictReader(file)][:-1] == pytest.approx(expected, abs=1e-6)


def test_figure_and_table_of_tiny_runs():
    for seed in (0, 1):
        tiny_run(seed)
    arguments = ["--plot", "--out", "r", "--classes", "fish", "people"]
    assert exits.run_main(figure6.experiment.main, arguments) == 0
    assert Path("r/figure6.png").read_bytes().startswith(b"\x89PNG") and Path("r/figure6.pdf").exists()
    with open("r/figure6.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["primary_class"] for row in rows] == [*create_dataset.CLASS_NAMES[2], "mean over classes"]
    for name in ("nmi_mean", "nmi_first", "nmi_random", "nmi_seed1"):
        values = [float(row[name]) for row in rows]
        assert values[-1] == pytest.approx(sum(values[:-1]) / 20) and all(0 <= value < 1 for value in values)
    both = [float(rows[-1][f"nmi_seed{seed}"]) for seed in (0, 1)]
    assert float(rows[-1]["nmi_mean"]) == pytest.approx(sum(both) / 2)
    assert float(rows[-1]["nmi_std"]) == pytest.approx(np.std(both, ddof=1))
    text = Path("r/figure6.md").read_text()
    assert "arithmetic mean of the two entropies" in text and "seed 2 not run" in text


def test_under_each_image_stand_its_probability_and_its_true_class():
    tiny_run(0)
    settings, _ = figure6.experiment.parse(["--plot", "--out", "r", "--classes", "trees", "--seeds", "0"])
    figure, *_ = figure6.make_report(settings)
    split = create_dataset.Split(*create_dataset.make_synthetic(train=False))
    generator = LabelGenerator(utils.VGG16(0.02), [5] * 20)
    saved = torch.load("r/maxl-20-100-seed0/checkpoint.pt", weights_only=True)
    generator.load_state_dict(saved["parts"]["label_generator"])
    labels = checkpoints.generated_labels(generator, split, 2)
    trees = create_dataset.CLASS_NAMES[2].index("trees")
    tops = figure6.top_images(labels, split.labels[:, 2], [5] * 20, trees, seed=0)
    shown = [(image, k) for k, images in tops.items() for image in images]
    assert len(figure.axes) == len(shown) == 15
    for axes, (image, k) in zip(figure.axes, shown):
        name = create_dataset.CLASS_NAMES[3][split.labels[image, 3]]
        texts = [text.get_text() for text in axes.texts]
        assert texts[:2] == [f"{labels[image, k]:.2f}", name.replace("_", " ")] and name.endswith("_tree")
        assert np.array_equal(axes.images[0].get_array(), split.images[image].numpy())


def test_bad_input_is_one_sentence(capsys):
    tiny_run(0)
    capsys.readouterr()
    for arguments, said in (
        (["--classes", "invertebrates"], "--classes invertebrates is not among the 20 primary classes: aquatic_"),
        (["--pairs", "3-10", "--classes", "fish"], "is not among the 3 primary classes: animals, vegetations"),
        (["--seeds", "5"], "there are no runs"),
        (["--draw-seed", "-1"], "-1 is not a whole number from 0"),
    ):
        assert exits.run_main(figure6.experiment.main, ["--plot", "--out", "r", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
    Path("r/maxl-20-100-seed0/checkpoint.pt").unlink()
    assert exits.run_main(figure6.experiment.main, ["--plot", "--out", "r"]) == 2
    assert "checkpoint.pt is not there, and this figure needs its trained network" in capsys.readouterr().err


def test_without_scikit_learn_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda name: None)
    assert exits.run_main(figure6.experiment.main, ["--plot", "--out", "r"]) == 2
    assert capsys.readouterr().err == "error: figure6 needs the package scikit-learn: pip install scikit-learn\n"


def test_the_plan_is_maxls_runs_on_the_papers_pair():
    settings, options = figure6.experiment.parse(["--data-root", "d"])
    tasks = figure6.experiment.tasks(settings, options)
    assert [task.name for task in tasks] == [f"maxl-20-100-seed{seed}" for seed in range(3)]
    assert all(task.settings.data_root == "d" for task in tasks) and settings.out == Path("runs/figure3")
