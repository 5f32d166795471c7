"""Figure 6: images and mutual information of generated labels, on labels that are known and from tiny runs."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY, run_script

import create_dataset
import model_vgg_maxl
import utils
from experiments import figure6, trained
from experiments.methods.random_labels import random_labels
from harness import exits
from maxl import LabelGenerator

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("spared")
ALL = create_dataset.LABELS_OF_FINE_CLASS.repeat_interleave(20, dim=0)  # labels (2000, 4), 20 images a fine class


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
    one = figure6.shared_information(random_labels(many[:, 2], [5] * 20, seed=77), many, 2)
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
    found = trained.generated_labels(generator.train(), split, 2)
    logits = generator.head(generator.trunk(whole)).detach()  # generated_labels left it in evaluation mode
    assert not generator.training
    for image, primary in enumerate(labels[:150, 2].tolist()):
        expected = torch.zeros(100)
        expected[5 * primary : 5 * primary + 5] = logits[image, 5 * primary : 5 * primary + 5].softmax(dim=0)
        torch.testing.assert_close(found[image], expected, rtol=1e-4, atol=1e-6)


# --- from runs ------------------------------------------------------------------------------------------


def test_figure_and_table_of_tiny_runs(monkeypatch):
    monkeypatch.setattr(figure6.random_information, "__defaults__", (5,))  # draws
    for seed in (0, 1):
        tiny_run(seed)
    settings, _ = figure6.experiment.parse(["--plot", "--out", "r", "--classes", "fish", "people"])
    figure, rows, text = figure6.make_report(settings)
    assert [row["primary_class"] for row in rows] == [*(f"class {c}" for c in range(20)), "mean over classes"]
    for name in ("nmi_mean", "nmi_first_mean", "nmi_random_mean"):
        values = [row[name] for row in rows]
        assert values[-1] == pytest.approx(sum(values[:-1]) / 20) and all(0 <= value < 1 for value in values)
    assert "arithmetic mean of the two entropies" in text and "seed 2 not run" in text
    assert "generated images" in figure._supxlabel.get_text()
    # the first weights' is that of the labels before the first epoch, on batch statistics, which are all that there are
    split, largest = create_dataset.Split(*create_dataset.make_synthetic(train=False)), []
    for seed in (0, 1):
        made = model_vgg_maxl.make_networks(model_vgg_maxl.parse([*TINY, "--seed", str(seed)]))["label_generator"]
        with torch.no_grad():
            labels = [made(images, targets[:, 2]).argmax(dim=1) for images, targets in split.test_batches()]
        largest.append(figure6.shared_information(torch.cat(labels), split.labels, 2))
    assert [row["nmi_first_mean"] for row in rows[:-1]] == pytest.approx(np.mean(largest, axis=0).tolist(), abs=1e-6)


def test_bad_input_is_one_sentence(capsys):
    arguments = ["--plot", "--out", "r", "--classes", "invertebrates"]
    assert exits.run_main(figure6.experiment.main, arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: --classes invertebrates is not among the 20 primary classes: aquatic_")
