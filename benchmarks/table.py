"""The results of benchmarks.step_cost as a table in Markdown and as a chart."""

import math

import create_dataset

TRAIN_IMAGES, _ = create_dataset.SIZES["cifar100"]


def markdown(results):
    """The table as Markdown."""
    where = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in results["environment"].items())
    lines = [
        f"`{results['command']}`",
        "",
        f"{where}.",
        "",
        f"{results['backbone']}, {len(results['psi'])} primary and {sum(results['psi'])} auxiliary classes, width "
        f"{results['width']}, batches of {results['batch_size']}, {results['precision']}"
        f"{', channels last' * results['channels_last']}{', CUDA graphs' * results['cuda_graphs']}; median of "
        f"{results['repeats']} interleaved rounds after warm-up. One forward pass F is "
        f"{results['gflop_of_a_forward_per_image']:.3f} GFLOP an image; a matrix product runs at "
        f"{results['matrix_flops_per_second'] / 1e9:.0f} GFLOP/s here.",
        "",
        "| step | seconds (fastest to slowest) | × Single | in F | GFLOP/s | of the matrix rate | memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, cost in results["steps"].items():
        memory = "" if cost["memory_bytes"] is None else f"{cost['memory_bytes'] / 2**20:.0f}"
        lines.append(
            f"| {row} | {cost['seconds']:.4f} ({cost['fastest']:.4f} to {cost['slowest']:.4f}) "
            f"| {cost['times_single']:.2f} | {cost['forward_passes']:.2f} | {cost['flops_per_second'] / 1e9:.0f} "
            f"| {cost['share_of_matrix_rate']:.0%} | {memory} |"
        )
    lines += ["", "| epoch, from the medians above | seconds | × Single |", "|---|---|---|"]
    for name, seconds in results["epoch_seconds_from_the_medians"].items():
        lines.append(f"| {name} | {seconds:.1f} | {results['epoch_times_single'][name]:.2f} |")
    lines += [
        "",
        f"An epoch is {TRAIN_IMAGES // results['batch_size']} iterations of each pass, with data and augmentation "
        f"({results['data_share_of_a_single_epoch']:.2%} of a Single epoch) and the test "
        f"({results['test_seconds']:.1f} s). Memory is the peak of a step above what is held between steps.",
    ]
    for name, values in results.get("scaling", {}).items():
        rows = list(next(iter(values.values())))
        lines += ["", f"| {name} | " + " | ".join(f"{row}, s" for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
        lines += [
            f"| {value} | " + " | ".join(f"{cost[row]:.4f}" for row in rows) + " |" for value, cost in values.items()
        ]
    return "\n".join(lines) + "\n"


def chart(results, path):
    """Bars: time of each step in Single steps, beside what its arithmetic alone would take; and its memory."""
    from matplotlib.figure import Figure

    steps = results["steps"]
    names, places = list(steps), range(len(steps))
    single = steps["Single step"]["forward_passes"]
    figure = Figure(figsize=(11, 0.55 * len(names) + 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(places, [cost["times_single"] for cost in steps.values()], color="tab:blue")
    arithmetic = [cost["forward_passes"] / single for cost in steps.values()]
    left.plot(arithmetic, places, "k|", markersize=16, markeredgewidth=2, label="its arithmetic alone")
    left.set(yticks=places, yticklabels=names, xlabel="time, in Single steps")
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    left.invert_yaxis()
    right.barh(places, [(cost["memory_bytes"] or math.nan) / 2**20 for cost in steps.values()], color="tab:orange")
    right.set(xlabel="peak memory above what is held between steps (MiB)")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=120)
