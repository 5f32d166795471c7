"""Table 1: its two scripts, the plan of 90 runs, the table from made-up curves; and Figure 6 on digits."""

import math
from pathlib import Path

import pytest
import torch
from conftest import assert_same_run, curves
from running import made_up_run as any_run
from running import rows_of

import create_dataset
import maxl
from experiments import figure6_mnist, table1
from experiments.datasets import registry
from experiments.methods import table1_maxl, table1_single
from harness import exits

GREY = ["--dataset", "synthetic-grey", "--width", "0.05", "--train-images", "60", "--batch-size", "20"]
SCRIPTS = {"single": (table1_single, []), "maxl": (table1_maxl, ["--psi", "2"])}
pytestmark = pytest.mark.usefixtures("spared")


def run(name, *options, epochs=4):
    script, own = SCRIPTS[name]
    return exits.run_main(script.main, [*GREY, *own, "--epochs", str(epochs), *map(str, options)])


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


# --- the scripts ----------------------------------------------------------------------------------------


def test_optimizers_and_rates_are_those_of_appendix_b():
    """η_t = η (1 + cos(π t / T)) / 2 in epoch t = 0, ..., T - 1, for both networks; and 0 at its end."""
    assert run("maxl", "--out", "r", epochs=5) == 0
    parts = checkpoint("r")["parts"]
    for rate, name, first, momentum in (
        ("learning_rate", "optimizer", 0.1, 0.9), ("label_learning_rate", "label_optimizer", 0.001, 0),
    ):  # fmt: skip
        expected = [first * (1 + math.cos(math.pi * t / 5)) / 2 for t in range(5)]
        assert [float(row[rate]) for row in curves("r")] == pytest.approx(expected)
        (group,) = parts[name]["param_groups"]
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.0, momentum, 5e-4)
    settings = table1_maxl.parse([*GREY, "--psi", "2"])
    assert settings.psi == [2] * 10 and settings.backbone == "conv4" and settings.entropy_weight == 0.2


def test_an_epoch_of_single_is_sgd_with_momentum_written_out():
    """Three batches: v = 0.9 v + (∇L + 5e-4 θ), θ = θ - 0.1 v, from the focal loss written down here."""
    assert run("single", "--out", "r", epochs=1) == 0
    settings = table1_single.parse(GREY)
    network, (train, _) = table1_single.make_networks(settings)["network"], registry.load(settings, "cpu")
    velocity = [torch.zeros_like(p) for p in network.parameters()]
    for images, labels in train.train_batches(20, torch.Generator().manual_seed(0)):
        p = network(images)[0].softmax(dim=1)[torch.arange(20), labels[:, 0]]
        gradients = torch.autograd.grad((-((1 - p) ** 2) * p.log()).mean(), list(network.parameters()))
        with torch.no_grad():
            for parameter, v, gradient in zip(network.parameters(), velocity, gradients):
                v.mul_(0.9).add_(gradient + 5e-4 * parameter)
                parameter.sub_(0.1 * v)
    saved = checkpoint("r")["parts"]["network"]
    for name, parameter in network.named_parameters():
        assert torch.allclose(saved[name], parameter, atol=2e-5), name


def test_the_look_ahead_is_a_plain_step_at_the_present_rate():
    """Eq. 4: neither the optimizer's momentum nor its weight decay is in θ1⁺."""
    settings = table1_maxl.parse([*GREY, "--epochs", "4"])
    networks = table1_maxl.make_networks(settings)
    optimizers, pair = table1_maxl.make_optimizers(networks, settings), list(networks.values())
    images, primary = torch.randn(20, 1, 32, 32), torch.arange(20) % 10
    for _ in range(2):  # so that there is momentum, and the rate is not the first
        maxl.auxiliary_training_step(*pair, optimizers["optimizer"], images, primary)
        optimizers["scheduler"].step()
    plain = torch.optim.SGD(pair[0].parameters(), lr=0.1 * (1 + math.cos(math.pi / 2)) / 2)
    expected, _ = maxl.meta_gradient(*pair, plain, images, primary)
    found, _ = maxl.meta_gradient(*pair, optimizers["optimizer"], images, primary)
    for ours, theirs in zip(found, expected):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name, passes", [("single", 1), ("maxl", 2)])
def test_a_run_goes_on_to_the_bit_with_its_momentum_and_its_rate(name, passes, monkeypatch):
    assert run(name, "--out", "whole") == 0
    batches, begun = create_dataset.Split.train_batches, []

    def stopped_after_two_epochs(split, *arguments):
        begun.append(1)
        if len(begun) > 2 * passes:
            raise KeyboardInterrupt
        return batches(split, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(create_dataset.Split, "train_batches", stopped_after_two_epochs)
        assert run(name, "--out", "halves") == 130
    assert checkpoint("halves")["parts"]["optimizer"]["state"][0]["momentum_buffer"].any()
    assert run(name, "--out", "halves", "--resume") == 0
    assert_same_run("whole", "halves")


def test_a_run_annealed_to_zero_is_not_made_longer(capsys):
    assert run("single", "--out", "r", epochs=2) == 0
    assert run("single", "--out", "r", "--resume", epochs=3) == 2
    assert "annealed_over was 2, now 3" in capsys.readouterr().err


def test_bad_input_is_one_sentence(capsys):
    assert run("maxl", "--psi", "2,3") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: psi has 2 numbers, but synthetic-grey has 10 classes") and error.count("\n") == 1
    assert not Path("runs").exists()


def test_one_number_of_psi_stands_for_all_classes_and_several_for_themselves():
    assert table1_maxl.parse(["--dataset", "imagenet32", "--psi", "3"]).psi == [3] * 1000
    assert table1_maxl.parse(["--dataset", "mnist", "--psi", "2*9,4"]).psi == [2] * 9 + [4]
    assert table1_maxl.parse(["--dataset", "ucf101"]).backbone == "resnet32"
    assert table1_single.parse(["--dataset", "ucf101", "--backbone", "vgg16"]).backbone == "vgg16"


# --- the plan -------------------------------------------------------------------------------------------


def tasks(*arguments):
    settings, options = table1.experiment.parse(list(arguments))
    return table1.experiment.tasks(settings, options)


def test_the_plan_is_the_papers_90_runs():
    plan = tasks()
    assert len(plan) == len({task.folder for task in plan}) == 90
    backbones = {task.settings.dataset: task.settings.backbone for task in plan}
    assert backbones == {
        "mnist": "conv4", "svhn": "conv4", "cifar10": "vgg16", "imagenet32": "vgg16", "cinic10": "resnet32",
        "ucf101": "resnet32",
    }  # fmt: skip
    sizes = [set(task.settings.psi) if "psi" in task.settings else None for task in plan[:5]]
    assert sizes == [None, {2}, {3}, {5}, {10}]
    assert [task.settings.seed for task in plan] == [0] * 30 + [1] * 30 + [2] * 30
    assert {(task.settings.epochs, task.settings.batch_size, task.settings.width) for task in plan} == {(200, 100, 1.0)}


def test_the_plan_is_narrowed_and_options_reach_the_runs():
    twice = "--datasets", "svhn", "svhn", "--psi", "3", "7", "3", "--seeds", "4", "4"  # what is named so is run once
    plan = tasks(*twice, "--epochs", "9", "--channels-last")
    assert [task.name for task in plan] == ["single-svhn-seed4", "maxl-svhn-psi3-seed4", "maxl-svhn-psi7-seed4"]
    assert all(task.settings.epochs == 9 and task.settings.channels_last for task in plan)
    quick = tasks("--quick")
    assert {task.settings.backbone for task in quick} == {"conv4", "resnet32"}
    assert all(task.settings.dataset.startswith("synthetic") and task.settings.width == 0.125 for task in quick)


@pytest.mark.parametrize("options, said", [
    (["--psi", "0"], "--psi 0 is out of range"),
    (["--backbone", "vgg16"], "--backbone is set for each run by the figure"),
])  # fmt: skip
def test_a_plan_that_cannot_be_is_refused(options, said, capsys):
    assert exits.run_main(table1.experiment.main, ["--dry-run", *options]) == 2
    assert said in capsys.readouterr().err


# --- the table ------------------------------------------------------------------------------------------


def made_up_run(name, accuracies, **options):
    any_run(name, accuracies, dataset=name.split("-")[1], **options)


def draw(*options):
    """The Markdown of --plot."""
    settings, _ = table1.experiment.parse(["--plot", "--out", "r", *options])
    return table1.make_report(settings)[2]


def test_the_table_has_the_known_means_gains_and_what_is_missing():
    for seed, (single, found) in enumerate([(0.900, 0.920), (0.910, 0.915), (0.920, 0.925)]):
        made_up_run(f"single-svhn-seed{seed}", [0.99, single])
        made_up_run(f"maxl-svhn-psi5-seed{seed}", [0.1, found])
    made_up_run("maxl-svhn-psi2-seed1", [0.2, 0.95])
    made_up_run("maxl-svhn-psi3-seed0", [0.99], epochs=2)
    assert exits.run_main(table1.experiment.main, ["--plot", "--out", "r", "--datasets", "svhn", "mnist"]) == 0
    rows = {(row["dataset"], row["method"]): row for row in rows_of("table1-svhn-mnist")}
    five, two = rows["svhn", "5"], rows["svhn", "2"]
    assert float(five["gain_mean"]) == pytest.approx(1.0) and float(five["gain_std"]) == pytest.approx(0.75**0.5)
    assert float(two["gain_mean"]) == pytest.approx(4.0) and two["gain_std"] == "" and two["n"] == "1"
    lines = Path("r/table1-svhn-mnist.md").read_text().splitlines()
    for start in (
        "Single | 91.00 ± 1.00 | 94.05 ± 0.07 |  | 3 |  |",
        "MAXL, ψ[i] = 2 | 95.00 | 94.39 ± 0.08 | 4.00 | 1 | seed 0 not run, seed 2 not run |",
        "MAXL, ψ[i] = 3 | unfinished | 94.38 ± 0.07 |  | 0 | seed 0 at epoch 1 of 2, seed 1 not run, seed 2 not run |",
        "MAXL, ψ[i] = 5 | 92.00 ± 0.50 | 94.59 ± 0.12 | 1.00 ± 0.87 | 3 |  |",
        "MAXL, ψ[i] = 10 | not run | 94.41 ± 0.09 |",
    ):
        assert any(line.startswith(f"| SVHN | 4-layer ConvNet | {start}") for line in lines), start
    assert sum(line.startswith("- SVHN; ") for line in lines) == 1


def test_the_papers_numbers_are_those_of_its_text():
    """The line of Table 1 as the paper prints it, datasets and methods in its order."""
    printed = """
        99.57±0.02 99.56±0.04 99.71±0.02 99.59±0.03 99.57±0.02
        94.05±0.07 94.39±0.08 94.38±0.07 94.59±0.12 94.41±0.09
        92.77±0.13 93.27±0.09 93.47±0.08 93.49±0.05 93.10±0.08
        46.67±0.12 46.82±0.14 46.97±0.10 47.02±0.11 46.85±0.11
        85.12±0.08 85.66±0.07 85.72±0.07 85.83±0.08 85.80±0.10
        53.15±0.12 54.19±0.18 55.39±0.16 54.70±0.12 54.32±0.18
    """.split()
    ours = [table1.PAPER[dataset][method] for dataset in table1.SIX for method in ["single", 2, 3, 5, 10]]
    assert [f"{mean:.2f}±{spread:.2f}" for mean, spread in ours] == printed


def test_runs_of_different_settings_on_one_dataset_are_not_in_one_table(capsys):
    made_up_run("single-mnist-seed0", [0.9])
    made_up_run("maxl-mnist-psi2-seed0", [0.9], entropy_weight=0.2)
    made_up_run("single-svhn-seed0", [0.9, 0.9, 0.9])
    draw()
    made_up_run("maxl-mnist-psi3-seed0", [0.9], entropy_weight=0.0)
    assert exits.run_main(table1.experiment.main, ["--plot", "--out", "r"]) == 2
    assert "differ in entropy_weight" in capsys.readouterr().err
    made_up_run("single-mnist-seed1", [0.9, 0.9])
    assert exits.run_main(table1.experiment.main, ["--plot", "--out", "r", "--psi", "2"]) == 2
    assert "differ in epochs" in capsys.readouterr().err
    assert exits.run_main(table1.experiment.main, ["--plot", "--out", "elsewhere"]) == 2
    assert "there are no runs of mnist" in capsys.readouterr().err


# --- from end to end, and Figure 6 on digits ------------------------------------------------------------


def test_quick_ends_with_its_table_and_figure6_is_drawn_from_its_run(monkeypatch):
    """The runs in this process, and smaller yet."""

    def run_tasks(tasks, where):
        return {task: "failed" for task in tasks if exits.run_main(task.script_module.main, task.arguments)}

    monkeypatch.setattr("experiments.runner.main.run_tasks", run_tasks)
    few = ["--epochs", "1", "--train-images", "40", "--width", "0.05", "--batch-size", "20"]
    assert exits.run_main(table1.experiment.main, ["--quick", "--out", "r", *few]) == 0
    text = Path("r/table1.md").read_text()
    assert "generated images | ResNet-32 | MAXL" in text and "generated grey images | 4-layer ConvNet | MAXL" in text
    assert text.count(" | 1 |  |") == 4
    arguments = ["--plot", "--out", "r", "--datasets", "synthetic-grey", "--classes", "3", "8"]
    settings, _ = figure6_mnist.experiment.parse(arguments)
    figure, rows, _ = figure6_mnist.make_report(settings)
    assert [row["primary_class"] for row in rows] == [*"0123456789", "mean over classes"] and {row["n"] for row in rows} == {1}
    assert len(figure.axes) == 2 * 3 * 5 and "generated grey images" in figure._supxlabel.get_text()


def test_the_spread_of_digits_over_generated_classes_is_that_of_known_labels():
    labels = torch.tensor([[0.7, 0.3, 0, 0], [0.6, 0.4, 0, 0], [0.1, 0.9, 0, 0], [0, 0, 1, 0], [0, 0, 0.8, 0.2]])
    found = figure6_mnist.spread(labels, torch.tensor([0, 0, 0, 1, 1]), 2)
    expected = {"used": [2, 1], "largest_share": [2 / 3, 1.0], "surest": [2.2 / 3, 0.9]}
    assert found == {name: pytest.approx(values) for name, values in expected.items()}
