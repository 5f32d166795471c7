"""Official files of datasets: which are there and whole, and how the others come from the network."""

import contextlib
import http.client
import os
import tempfile
from pathlib import Path

from torchvision.datasets.utils import check_integrity, download_and_extract_archive, download_url

from harness.exits import InputError


def missing_files(folder, files, title):
    """Names of the files, {name: MD5}, that `folder` lacks. Raises InputError where one is not the official file."""
    missing = []
    for name, md5 in files.items():
        path = folder / name
        if not path.exists():
            missing.append(name)
        elif not check_integrity(path, md5):
            raise InputError(
                f"{path} is not the official {title} file (its MD5 differs, so it was cut short or altered); "
                "delete it, and it is fetched anew from the archive"
            )
    return missing


def fetch(root, archives, files):
    """Put the missing files there from archives, each in one go: other processes may look for them, or do the same.

    archives: {path: (URL, MD5)}, of which those that are whole are not fetched again; files: paths, of what is in an
    archive beside it, or of one that is no archive but the file itself. All below root.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        for name, (url, md5) in archives.items():
            new = Path(temporary, name)
            new.parent.mkdir(parents=True, exist_ok=True)
            if name in files:
                download_url(url, new.parent, new.name, md5)
            else:
                place = root / name if check_integrity(root / name, md5) else new
                download_and_extract_archive(url, place.parent, new.parent, filename=new.name, md5=md5)
        for name in dict.fromkeys([*archives, *files]):
            if Path(temporary, name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(temporary, name), root / name)


@contextlib.contextmanager
def getting(title, root, archives, holds):
    """While data is fetched into `root` and read: a failure becomes an InputError with the ways out.

    archives: {path below root: (URL, MD5)}. holds: what a folder that has the data holds. Folders made in vain go.
    Raises InputError, too, where `root` is itself the inner folder that holds the files.
    """
    inner = Path(holds).parts
    for depth, outer in enumerate(root.parents, start=1):
        if root.parts[-depth:] == inner[:depth] and any((outer / holds).glob("*")) and not (root / holds).exists():
            raise InputError(f"{root} is the inner folder of the data; name the one it lies in, {outer}")
    folders = {folder: 0 for name in archives for folder in (root / name).parents}  # the innermost first
    new_folders = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        bad = [name for name, (_, md5) in archives.items() if not check_integrity(root / name, md5)]
        name = next(iter(bad or archives))
        archive, (url, _) = root / name, archives[name]
        state = "is whole, but was not unpacked" if not bad else "is damaged" if archive.exists() else "is not there"
        for path in new_folders:
            with contextlib.suppress(OSError):  # stays where something is in it
                path.rmdir()
        why = " ".join(str(error).split())
        raise InputError(
            f"{title} is not in {root}, {archive} {state}, and getting it failed ({why}). Three ways out:\n"
            f"- put the archive there: {url}\n"
            f"- name the folder that holds {holds} with --data-root\n"
            "- take generated images: --dataset synthetic, for a figure or table --quick"
        ) from None
