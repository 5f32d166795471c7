"""What has to be there before the first run starts: the data."""

from harness.exits import InputError


def fetch_data(tasks):
    """Fetch and check the data once, so that runs side by side do not.

    Raises InputError if data is not to be had, with a line for each dataset, and one on what is there.
    """
    missing, found = [], []
    for data, dataset, root in {(task.data, task.settings.dataset, task.settings.data_root): 0 for task in tasks}:
        if not dataset.startswith("synthetic"):
            try:
                data.read(dataset, root)
            except InputError as error:
                missing.append(str(error))
                continue
        found.append(dataset)
    if missing and found:
        missing.append(f"What is there can be run without the rest: --datasets {' '.join(found)}")
    if missing:
        raise InputError("\n".join(missing))
