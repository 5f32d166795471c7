"""experiments/: Random, K-Means, the runner of Figure 3, its figure and its table."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY, assert_same_run, curves, generate_once, run_script

import create_dataset
import utils
from experiments import figure3, figure3_report, model_vgg_kmeans, model_vgg_random, process

BASELINES = {"random": model_vgg_random, "kmeans": model_vgg_kmeans}


@pytest.fixture
def generated_once(monkeypatch):
    monkeypatch.setattr(create_dataset, "make_synthetic", generate_once)


# --- Random ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("psi", [[5] * 20, create_dataset.balanced_psi(3, 10, 1), [1, 7, 2], [4]])
def test_random_labels_are_balanced_within_each_primary_class(psi):
    primary = torch.from_numpy(np.random.default_rng(0).integers(len(psi), size=5003))
    labels = model_vgg_random.random_labels(primary, psi, seed=3)
    first = 0
    for primary_class, size in enumerate(psi):
        counts = torch.bincount(labels[primary == primary_class], minlength=sum(psi))
        own = counts[first : first + size]
        assert own.sum() == counts.sum() == (primary == primary_class).sum()
        assert own.max() - own.min() <= 1
        first += size
    assert torch.equal(labels, model_vgg_random.random_labels(primary, psi, seed=3))
    if max(psi) > 1:
        assert not torch.equal(labels, model_vgg_random.random_labels(primary, psi, seed=4))


def test_random_labels_do_not_follow_the_order_of_the_images():
    labels = model_vgg_random.random_labels(torch.zeros(6000, dtype=torch.int64), [3])
    pairs = torch.bincount(3 * labels[:-1] + labels[1:], minlength=9)
    assert pairs.min() > 500 and pairs.max() < 850  # 667 each by chance


def test_an_image_keeps_its_random_label():
    pixels = torch.arange(120).remainder(256).to(torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3)
    targets = (torch.arange(120) % 3)[:, None].expand(-1, 4)
    split = create_dataset.Split(pixels, targets.contiguous())
    auxiliary = model_vgg_random.RandomLabels(split, 0, [2, 3, 4], seed=0)
    expected = model_vgg_random.random_labels(targets[:, 0], [2, 3, 4], seed=0)
    for seed in (1, 2):
        for images, labels in split.train_batches(40, torch.Generator().manual_seed(seed)):
            index = (images.amax(dim=(1, 2, 3)) * 0.2 + 0.5).mul(255).round().long()  # the pixels number the images
            assert torch.equal(auxiliary(images, labels), expected[index])


# --- K-Means --------------------------------------------------------------------------------------


def blobs(psi, count=3000, size=8, seed=0, shift=0.0):
    """Codes in well separated clusters, ψ[i] of them in primary class i: codes, primary class, true cluster."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(sum(psi), size, generator=torch.Generator().manual_seed(99))
    cluster = torch.randint(sum(psi), (count,), generator=generator)
    primary = torch.repeat_interleave(torch.arange(len(psi)), torch.tensor(psi))[cluster]
    return centres[cluster] + shift + torch.randn(count, size, generator=generator), primary, cluster


def purity(assigned, cluster, classes):
    """Share of the points that belong to the true cluster that is the commonest among those assigned alike."""
    return sum(torch.bincount(cluster[assigned == k], minlength=classes).max().item() for k in range(classes)) / len(
        cluster
    )


def test_clusters_are_the_known_ones_and_far_purer_than_chance():
    psi = [2, 3, 4]
    codes, primary, cluster = blobs(psi)
    kmeans = model_vgg_kmeans.MiniBatchKMeans(psi, 8)
    kmeans.start(codes, primary, torch.Generator().manual_seed(0))
    for batch in torch.arange(3000).split(100):
        kmeans.update(codes[batch], primary[batch])
    assigned = kmeans(codes, primary)
    assert purity(assigned, cluster, 9) > 0.99
    assert purity(model_vgg_random.random_labels(primary, psi), cluster, 9) < 0.6
    assert figure3.model_vgg_maxl.hierarchy_mask(psi)[primary, assigned].all()
    centre = torch.stack([codes[assigned == k].mean(dim=0) for k in range(9)])
    assert (kmeans.centroids - centre).norm(dim=1).max() < 0.5


def test_a_code_stays_with_its_primary_class_though_anothers_centroid_is_nearer():
    kmeans = model_vgg_kmeans.MiniBatchKMeans([2, 1], 2)
    kmeans.centroids.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0]]))
    kmeans.counts.fill_(1.0)
    codes, primary = torch.zeros(4, 2), torch.tensor([1, 1, 0, 1])
    assert kmeans(codes, primary).tolist() == [2, 2, 0, 2]
    kmeans.update(codes, primary)
    assert kmeans.centroids[0].tolist() == [0, 0] and kmeans.centroids[2].norm() < 20


def test_a_step_is_the_mean_with_the_past_forgotten():
    kmeans = model_vgg_kmeans.MiniBatchKMeans([2, 1], 2, forget=0.5)
    kmeans.centroids.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [5.0, 5.0]]))
    kmeans.counts.copy_(torch.tensor([4.0, 4.0, 4.0]))
    codes, primary = torch.tensor([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]]), torch.tensor([0, 0, 1])
    assert kmeans(codes, primary).tolist() == [0, 0, 2]
    kmeans.update(codes, primary)
    assert torch.allclose(kmeans.centroids, torch.tensor([[1.0, 0.5], [10.0, 0.0], [19 / 3, 19 / 3]]))
    assert kmeans.counts.tolist() == [4.0, 2.0, 3.0]


def test_centroids_follow_codes_that_drift():
    psi = [2, 3, 4]
    codes, primary, _ = blobs(psi)
    kmeans = model_vgg_kmeans.MiniBatchKMeans(psi, 8, forget=0.9)
    kmeans.start(codes, primary, torch.Generator().manual_seed(0))
    for step in range(200):
        codes, primary, cluster = blobs(psi, count=100, seed=step, shift=0.1 * step)
        kmeans.update(codes, primary)
    assert purity(kmeans(codes, primary), cluster, 9) > 0.95


def test_a_step_returns_the_labels_from_before_it():
    codes, primary, _ = blobs([2, 3, 4])
    kmeans = model_vgg_kmeans.MiniBatchKMeans([2, 3, 4], 8, forget=0.1)
    kmeans.start(codes, primary, torch.Generator().manual_seed(2))
    before = kmeans(codes, primary)
    assert torch.equal(kmeans.update(codes, primary), before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_step_of_kmeans_waits_for_the_gpu():
    pixels = torch.randint(256, (60, 32, 32, 3), dtype=torch.uint8)
    split = create_dataset.Split(pixels, (torch.arange(60) % 3)[:, None].expand(-1, 4).contiguous(), "cuda")
    settings = model_vgg_kmeans.parse(["--primary-level", "0", "--psi", "2,3,4"])
    labels = model_vgg_kmeans.ClusterLabels(split, settings)
    batch = next(split.train_batches(30, torch.Generator().manual_seed(0)))
    labels(*batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_empty_cluster_is_started_anew():
    psi = [2, 3, 4]
    codes, primary, cluster = blobs(psi)
    kmeans = model_vgg_kmeans.MiniBatchKMeans(psi, 8, forget=0.9)
    kmeans.start(codes, primary, torch.Generator().manual_seed(0))
    kmeans.centroids[4] = 1e4  # nobody's nearest
    assert not (kmeans(codes, primary) == 4).any()
    for batch in torch.arange(3000).split(50):
        kmeans.update(codes[batch], primary[batch])
    assert len(kmeans(codes, primary).unique()) == 9
    assert kmeans.centroids.isfinite().all()


def test_centroids_start_from_few_or_equal_codes_too():
    kmeans = model_vgg_kmeans.MiniBatchKMeans([3], 2)
    kmeans.start(torch.ones(5, 2), torch.zeros(5, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert torch.equal(kmeans.centroids, torch.ones(3, 2))
    kmeans.update(torch.ones(5, 2), torch.zeros(5, dtype=torch.int64))
    assert kmeans.centroids.isfinite().all()


def test_the_auto_encoder_learns_to_give_images_back():
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(50, 3, 4, 4), size=32, mode="bilinear")
    autoencoder = model_vgg_kmeans.AutoEncoder(64)
    assert autoencoder.encoder(images).shape == (50, 64)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=0.001)
    losses = []
    for _ in range(60):
        loss = (autoencoder.decoder(autoencoder.encoder(images)) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * images.var().item() < losses[0]


# --- both as scripts ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("primary, auxiliary", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
def test_the_baselines_run_on_the_six_pairs(name, primary, auxiliary, generated_once):
    classes = create_dataset.LEVEL_CLASSES[primary], create_dataset.LEVEL_CLASSES[auxiliary]
    psi = ",".join(map(str, create_dataset.balanced_psi(*classes)))
    few = [*TINY, "--epochs", "1", "--train-images", "100", "--primary-level", str(primary), "--psi", psi]
    assert utils.run_main(BASELINES[name].main, few) == 0
    folder = Path(f"runs/model_vgg_{name}-synthetic-{classes[0]}-{classes[1]}-seed0")
    assert len(curves(folder)) == 1
    command = json.loads((folder / "settings.json").read_text())["command"]
    assert command.startswith(f"python -m experiments.model_vgg_{name} --dataset synthetic")
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["network"]
    assert [len(weights[f"heads.{head}.2.bias"]) for head in (0, 1)] == list(classes)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_stopped_and_resumed_is_the_same_to_the_bit(name, generated_once):
    main = BASELINES[name].main
    assert utils.run_main(main, [*TINY, "--out", "whole"]) == 0
    assert utils.run_main(main, [*TINY, "--out", "parts", "--epochs", "1"]) == 0
    torch.manual_seed(123)
    assert utils.run_main(main, [*TINY, "--out", "parts", "--resume"]) == 0
    assert_same_run("whole", "parts")
    assert utils.run_main(main, [*TINY, "--out", "other", "--seed", "1"]) == 0
    assert curves("other") != curves("whole")


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--psi", "5,5"], "psi has 2 numbers, but primary level 2 has 20 classes"),
        (["--auxiliary-level", "3"], "unrecognized arguments"),
        (["--width", "0"], "--width 0.0 is out of range"),
    ],
)
def test_a_baselines_bad_input_is_one_sentence(name, arguments, said, capsys):
    assert utils.run_main(BASELINES[name].main, [*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not Path("runs").exists()


# --- the plan -------------------------------------------------------------------------------------


def test_the_plan_is_81_runs():
    tasks = figure3.plan("runs/figure3")
    assert len(tasks) == len({task.folder for task in tasks}) == 81
    count = {method: sum(task.method == method for task in tasks) for method in figure3.SCRIPTS}
    assert count == {"single": 9, "random": 18, "kmeans": 18, "human": 18, "maxl": 18}
    pairs = {task.name.split("-", 1)[1].rsplit("-seed", 1)[0] for task in tasks if task.method != "single"}
    assert pairs == {"3-10", "3-20", "3-100", "10-20", "10-100", "20-100"}
    assert [task.name for task in tasks[:3]] == ["maxl-20-100-seed0", "single-20-seed0", "human-20-100-seed0"]


def test_every_run_of_the_plan_has_the_papers_settings_and_its_levels():
    for task in figure3.plan("runs/figure3"):
        settings = task.settings
        assert (settings.epochs, settings.batch_size, settings.width, settings.train_images) == (200, 100, 1.0, None)
        assert (settings.seed, settings.primary_level, settings.dataset) == (task.seed, task.primary, "cifar100")
        if task.method == "human":
            assert settings.auxiliary_level == task.auxiliary
        elif task.method != "single":
            sizes = create_dataset.LEVEL_CLASSES[task.primary], create_dataset.LEVEL_CLASSES[task.auxiliary]
            assert (len(settings.psi), sum(settings.psi)) == sizes and max(settings.psi) - min(settings.psi) <= 1
            same = [other for other in figure3.plan("r", seeds=[task.seed]) if other.auxiliary == task.auxiliary]
            assert all(
                o.settings.psi == settings.psi for o in same if o.primary == task.primary and "psi" in o.settings
            )
    psis = {tuple(task.settings.psi) for task in figure3.plan("r", ["3-10"], ["maxl"], range(10))}
    assert len(psis) == 3, "which class gets the larger share is drawn at random"


def test_quick_and_the_options_narrow_the_plan():
    settings, options = figure3.parse(["--quick", "--epochs", "2"])
    assert (settings.pairs, settings.seeds, options) == (["3-10", "20-100"], [0], ["--epochs", "2", "--quick"])
    tasks = figure3.plan("r", settings.pairs, settings.methods, settings.seeds, options)
    assert len(tasks) == 10 and all(task.settings.epochs == 2 and task.settings.width == 0.125 for task in tasks)
    settings, _ = figure3.parse(["--methods", "maxl", "single", "--pairs", "10-20", "--seeds", "4", "5"])
    assert len(figure3.plan("r", settings.pairs, settings.methods, settings.seeds)) == 4


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--seed", "1"], "--seed is set by figure3"),
        (["--psi=5,5"], "--psi=5,5 is set by figure3"),
        (["--resume"], "--resume is set by figure3"),
        (["--pairs", "3-11"], "invalid choice: '3-11'"),
        (["--methods", "darts"], "invalid choice: 'darts'"),
        (["--jobs", "0"], "--jobs 0 is out of range"),
        (["--width", "0"], "maxl: --width 0.0 is out of range"),
        (["--entropy-weight", "0"], "unrecognized arguments: --entropy-weight"),
        (["--submitit", "local", "--submitit-parameters", "timeout"], "expected NAME=VALUE"),
        (["--plot"], "there are no runs"),
        (["--plot", "--status"], "not allowed with argument"),
    ],
)
def test_the_runners_bad_input_is_one_sentence_and_starts_nothing(arguments, said, capsys):
    assert utils.run_main(figure3.main, arguments) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error and out == ""
    assert not Path("runs").exists()


def test_a_folder_of_another_experiment_is_named_before_anything_starts(capsys, generated_once):
    assert run_script("model_vgg_single", *TINY, "--primary-level", 0, "--out", "r/single-3-seed0") == 0
    capsys.readouterr()
    few = ["--pairs", "3-10", "--seeds", "0", "--out", "r", *TINY]
    assert utils.run_main(figure3.main, [*few, "--width", "0.03"]) == 2
    assert "r/single-3-seed0 is of another experiment (width was 0.02, now 0.03)" in capsys.readouterr().err
    assert sorted(os.listdir("r")) == ["single-3-seed0"]
    assert utils.run_main(figure3.main, [*few, "--status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "single-3-seed0           done       epoch 3 of 3" in lines
    assert lines[-1].startswith("1 done, 4 not begun; about ")


def test_dry_run_shows_commands_and_an_estimate(capsys):
    assert utils.run_main(figure3.main, ["--dry-run", "--pairs", "3-10", "--seeds", "0", "--out", "r", *TINY]) == 0
    out = capsys.readouterr().out
    assert out.count("not begun") == 5 and "5 runs; about" in out
    assert "--primary-level 0 --auxiliary-level 1 --seed 0 --out r/human-3-10-seed0" in out
    assert not Path("r").exists()


# --- running --------------------------------------------------------------------------------------

FEW = ["--pairs", "3-10", "--seeds", "0", "--out", "r", *TINY]


def runner(*arguments):
    """The runner as a person starts it; its own process."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.figure3", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def children(process):
    """Process ids of its living children (Linux)."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return []


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


def test_the_runner_runs_all_methods_skips_what_is_done_and_draws():
    process = runner(*FEW, "--jobs", 2)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert error == "" and out.count(": done") == 5
    for task in figure3.plan("r", ["3-10"], seeds=[0], options=TINY):
        assert task.state() == "done" and len(curves(task.folder)) == 3
    rows = list(csv.DictReader(open("r/figure3.csv", newline="")))
    assert [row["method"] for row in rows] == ["Single", "Random", "K-Means", "Human", "MAXL"]
    final = 100 * float(curves("r/maxl-3-10-seed0")[-1]["test_primary_accuracy"])
    assert float(rows[-1]["final_mean"]) == pytest.approx(final)
    logs = {path: path.read_text() for path in Path("r/logs").iterdir()}
    (task,) = figure3.plan("by-hand", ["3-10"], ["maxl"], [0], TINY)
    assert run_script("model_vgg_maxl", *task.arguments) == 0  # what a person would type
    assert_same_run("r/maxl-3-10-seed0", "by-hand/maxl-3-10-seed0")

    Path("r/maxl-3-10-seed0/curves.csv").unlink()  # as a kill between checkpoint and curves leaves it
    out, error = runner(*FEW, "--jobs", 2).communicate(timeout=300)
    assert "4 of 5 runs are done already" in out and out.count("started") == 1
    changed = {path.name for path in logs if path.read_text() != logs[path]}
    assert changed == {"maxl-3-10-seed0.log"} and len(curves("r/maxl-3-10-seed0")) == 3


def test_one_run_that_fails_is_named_at_the_end_and_does_not_stop_the_others():
    Path("r").mkdir()
    Path("r/random-3-10-seed0").write_text("a file where a folder should be")
    process = runner(*FEW, "--methods", "random", "single", "--epochs", 1)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "1 of 2 runs did not end well: random-3-10-seed0 (error: --out r/random-3-10-seed0 is a file" in error
    assert error.count("\n") == 1 and "single-3-seed0: done" in out
    assert Path("r/figure3.md").exists()
    out, _ = runner(*FEW, "--methods", "random", "single", "--epochs", 1, "--status").communicate(timeout=60)
    assert (
        "failed     epoch 0 of 1 error: --out r/random-3-10-seed0 is a file" in out and "1 done, 1 failed; about" in out
    )


@needs_proc
def test_killed_runs_and_a_killed_runner_are_continued_by_the_same_command():
    few = [*FEW, "--methods", "single", "--epochs", "30"]
    assert run_script("model_vgg_single", *TINY, "--primary-level", 0, "--epochs", 30, "--out", "whole") == 0
    folder = Path("r/single-3-seed0")

    process = runner(*few)  # kill -9 of a run
    wait_for(lambda: (folder / "curves.csv").exists())
    os.kill(wait_for(lambda: children(process))[0], signal.SIGKILL)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "single-3-seed0 (killed by signal 9)" in error
    assert 0 < len(curves(folder)) < 30

    process = runner(*few)  # kill -9 of the runner; its run goes on
    pid = wait_for(lambda: children(process))[0]
    done = len(curves(folder))
    wait_for(lambda: len(curves(folder)) > done)
    process.kill()
    process.communicate()
    assert figure3.at_work(folder)
    process = runner(*few)  # waits for that run
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()
    assert len(curves(folder)) == 30
    assert_same_run(folder, "whole")


@needs_proc
@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_runner_stops_its_runs_first(signum, code):
    few = [*FEW, "--methods", "single", "--epochs", "1000"]
    process = runner(*few)
    wait_for(lambda: Path("r/single-3-seed0/curves.csv").exists())
    (pid,) = children(process)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and "the same command goes on" in error and error.count("\n") <= 2
    assert not Path(f"/proc/{pid}").exists()
    assert figure3.plan("r", ["3-10"], ["single"], [0], [*TINY, "--epochs", "1000"])[0].state() == "unfinished"


def test_max_minutes_leaves_runs_unfinished_with_exit_code_3():
    process = runner(*FEW, "--methods", "single", "--epochs", 10_000, "--max-minutes", 0.1)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 3 and error == ""
    assert "1 of 1 runs are unfinished, the same command goes on: single-3-seed0" in out


def test_gpus_and_cores_are_shared_among_the_jobs(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environments = [figure3.share_of_machine(slot, 4) for slot in range(4)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0", "1", "0", "1"]
    assert {e["OMP_NUM_THREADS"] for e in environments} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [figure3.share_of_machine(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["5", "7"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert figure3.share_of_machine(0, 1) == {}


# --- submitit -------------------------------------------------------------------------------------


def test_without_submitit_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert utils.run_main(figure3.main, [*FEW, "--submitit", "local"]) == 2
    assert capsys.readouterr().err == "error: --submitit needs the package submitit: pip install submitit\n"


def test_submitits_local_executor_runs_the_plan():
    pytest.importorskip("submitit", reason="needs submitit")
    process = runner(*FEW, "--methods", "single", "random", "--jobs", 2, "--submitit", "local")
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert out.count(": done") == 2 and Path("r/figure3.png").exists()
    assert len(curves("r/single-3-seed0")) == len(curves("r/random-3-10-seed0")) == 3


def test_a_job_out_of_max_minutes_is_submitted_again_until_its_run_is_done():
    pytest.importorskip("submitit", reason="needs submitit")
    few = [*FEW, "--methods", "single", "--epochs", 150, "--submitit", "local"]
    out, error = runner(*few, "--max-minutes", 0.15).communicate(timeout=240)
    assert out.count("submitted") == 1 + out.count(": unfinished") > 1 and out.count(": done") == 1, (out, error)
    assert len(curves("r/single-3-seed0")) == 150
    out, error = runner(*few, "--epochs", 10**6, "--max-minutes", 0.0001).communicate(timeout=60)
    assert out.count("submitted") == 1 and "1 of 1 runs are unfinished" in out, (out, error)


@needs_proc
def test_a_preempted_job_stops_its_run_and_is_queued_again(monkeypatch):
    submitit = pytest.importorskip("submitit", reason="needs submitit")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    assert run_script("model_vgg_single", *TINY, "--primary-level", 0, "--epochs", 30, "--out", "whole") == 0
    (task,) = figure3.plan(Path("r").absolute(), ["3-10"], ["single"], [0], [*TINY, "--epochs", "30"])
    executor = submitit.LocalExecutor(folder="jobs")
    executor.update_parameters(timeout_min=5, signal_delay_s=3)
    job = executor.submit(process.ClusterJob(task.command, task.log))
    wait_for(lambda: task.epochs_done() > 0)
    (worker,) = children(job._process)
    os.kill(worker, signal.SIGUSR2)  # as Slurm preempts
    wait_for(job.done)
    assert job.result() == 0
    assert len(curves(task.folder)) == 30
    assert len(json.loads((task.folder / "settings.json").read_text())["sessions"]) == 2
    assert_same_run(task.folder, "whole")


# --- the figure and the table ---------------------------------------------------------------------


def made_up_run(root, name, accuracies, epochs=None, seconds=60.0, **settings):
    folder = Path(root) / name
    folder.mkdir(parents=True)
    same = dict.fromkeys(figure3_report.SAME) | {"epochs": epochs or len(accuracies), "device_name": "a device"}
    (folder / "settings.json").write_text(json.dumps(same | settings))
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "test_primary_accuracy", "seconds_train", "seconds_test"])
        writer.writerows([e, a, seconds / 2, seconds / 2] for e, a in enumerate(accuracies, start=1))


def test_the_table_has_the_known_means_and_says_what_is_missing(capsys):
    for seed, final in enumerate((0.70, 0.72, 0.74)):
        made_up_run("r", f"maxl-20-100-seed{seed}", [0.2, 0.75, final])
    made_up_run("r", "single-20-seed0", [0.1, 0.2, 0.3])
    made_up_run("r", "human-20-100-seed0", [0.1, 0.2], epochs=3)
    made_up_run("r", "random-20-100-seed1", [0.1, 0.4, 0.3])
    figure3_report.report("r", ["20-100"], [0, 1, 2])
    rows = {row["method"]: row for row in csv.DictReader(open("r/figure3.csv", newline=""))}
    maxl = rows["MAXL"]
    assert float(maxl["final_mean"]) == pytest.approx(72) and float(maxl["final_std"]) == pytest.approx(2)
    assert float(maxl["best_mean"]) == pytest.approx(75) and float(maxl["best_std"]) == pytest.approx(0, abs=1e-9)
    assert maxl["n"] == "3" and maxl["missing"] == "" and float(maxl["paper_maxl"]) == 74.27
    assert float(maxl["seconds_per_run"]) == pytest.approx(180) and maxl["device"] == "a device"
    assert rows["Single"]["final_std"] == "" and rows["Single"]["missing"] == "seed 1 not run, seed 2 not run"
    assert rows["Human"]["n"] == "0" and rows["Human"]["final_mean"] == ""
    assert rows["Human"]["missing"] == "seed 0 at epoch 2 of 3, seed 1 not run, seed 2 not run"
    assert any(line.startswith("| 20 → 100 | Human | unfinished | unfinished | 0 |") for line in open("r/figure3.md"))
    assert rows["Random"]["n"] == "1" and float(rows["Random"]["best_mean"]) == pytest.approx(40)
    lines = Path("r/figure3.md").read_text().splitlines()
    assert "| 20 → 100 | MAXL | 72.00 ± 2.00 | 75.00 ± 0.00 | 3 | 74.27 | 3.0 min | a device |  |" in lines
    assert any(line.startswith("| 20 → 100 | K-Means | not run | not run | 0 |") for line in lines)
    assert Path("r/figure3.png").read_bytes().startswith(b"\x89PNG")
    assert Path("r/figure3.pdf").read_bytes().startswith(b"%PDF")


def test_a_band_is_mean_and_spread_over_the_runs_that_got_there():
    for seed, accuracies in enumerate(([0.1, 0.2, 0.3], [0.3, 0.4])):
        made_up_run("r", f"maxl-3-10-seed{seed}", accuracies, epochs=3)
    means, spreads = figure3_report.band(figure3_report.read_runs("r", ["3-10"], [0, 1])["3-10", "maxl"])
    assert means == pytest.approx([20, 30, 30])
    assert spreads == pytest.approx([np.std([10, 30], ddof=1), np.std([20, 40], ddof=1), 0])


def test_a_single_run_stands_in_every_panel_of_its_level(monkeypatch):
    made_up_run("r", "single-3-seed0", [0.5, 0.6])
    for pair in ("3-10", "3-20", "3-100"):
        made_up_run("r", f"maxl-{pair}-seed0", [0.5, 0.7])
    runs = figure3_report.read_runs("r", list(figure3.PAIRS), [0])
    assert {pair for pair, method in runs if method == "single"} == {"3-10", "3-20", "3-100"}


def test_the_papers_numbers_are_table_3s():
    assert figure3_report.PAPER.keys() == figure3.PAIRS.keys()
    assert list(figure3_report.PAPER.values()) == [90.50, 90.65, 90.66, 78.40, 78.46, 74.27]


def test_runs_of_different_settings_are_not_drawn_together(capsys):
    made_up_run("r", "single-3-seed0", [0.5, 0.6], width=1.0)
    made_up_run("r", "maxl-3-10-seed0", [0.5, 0.6], width=0.25)
    assert utils.run_main(figure3.main, ["--plot", "--out", "r"]) == 2
    error = capsys.readouterr().err
    assert "differ in width and cannot stand in one figure" in error and error.count("\n") == 1
