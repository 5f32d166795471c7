"""UCF-101's frames at 32x32, taken from its videos once, for the lists of split 1.

    python -m experiments.datasets.extract_ucf101 --videos UCF-101 --splits ucfTrainTestlist --data-root dataset

Reads the official layout: UCF-101/<class>/v_*.avi, and classInd.txt, trainlist01.txt and testlist01.txt. Writes
dataset/UCF-101/frames.npz: of each training video ten frames at even distances, of each test video the middle one.
The whole frame is scaled to 32x32. Needs the package av (pip install av).
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.datasets.extracted import UCF101_TEST, UCF101_TRAIN
from harness.command_line import Parser
from harness.exits import InputError, run_main

FRAMES = 10  # of each training video
LISTS = ("classInd.txt", "trainlist01.txt", "testlist01.txt")


def read_lists(folder):
    """{class name: id from 0}, and the videos of the training and of the test list, as "class/file" each."""
    try:
        texts = [[line.split() for line in (folder / name).read_text().splitlines() if line.strip()] for name in LISTS]
        classes = {name: int(number) - 1 for number, name in texts[0]}
        train = {video: int(number) - 1 for video, number in texts[1]}
        test = [video for (video,) in texts[2]]
        if any(classes[video.partition("/")[0]] != number for video, number in train.items()):
            raise ValueError("other numbers of the classes")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the lists in {folder} are not UCF-101's ({error}); expected lines such as 1 ApplyEyeMakeup, "
            "Class/v_x.avi 1 and Class/v_y.avi; name their folder with --splits"
        ) from None
    if (len(train), len(test)) != (UCF101_TRAIN, UCF101_TEST):
        raise InputError(
            f"the lists in {folder} have {len(train)} and {len(test)} videos; expected {UCF101_TRAIN} and "
            f"{UCF101_TEST}, those of split 1"
        )
    return classes, list(train), test


def frames(path, count):
    """`count` frames of a video at even distances, the middle one for 1: uint8 (count, 32, 32, 3).

    Raises InputError where the video cannot be read or has fewer.
    """
    import av

    try:
        with av.open(str(path)) as video:
            announced = video.streams.video[0].frames  # 0 where the header does not say
            shots = [
                frame.reformat(32, 32, "rgb24", interpolation="AREA").to_ndarray() for frame in video.decode(video=0)
            ]
    except (OSError, IndexError, av.error.FFmpegError) as error:
        raise InputError(f"{path} cannot be read ({error}); unpack UCF101.rar anew") from None
    if len(shots) < 0.95 * announced - 1:  # a header may be off by a frame or two
        raise InputError(f"{path} has {len(shots)} of its {announced} frames; unpack UCF101.rar anew")
    if len(shots) < count:
        raise InputError(f"{path} has {len(shots)} frames, fewer than {count}; unpack it anew")
    middles = [(2 * i + 1) * len(shots) // (2 * count) for i in range(count)]
    return np.stack([shots[i] for i in middles])


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("--videos", type=Path, default=Path("UCF-101"), metavar="DIR",
        help="folder of the classes' folders (default: %(default)s)")
    add("--splits", type=Path, default=Path("ucfTrainTestlist"), metavar="DIR",
        help=f"folder of {', '.join(LISTS)} (default: %(default)s)")
    add("--data-root", type=Path, default=Path("dataset"), metavar="DIR",
        help="writes UCF-101/frames.npz there (default: %(default)s)")
    # fmt: on
    settings = parser.parse_args(argv)
    for name in ("videos", "splits", "data_root"):
        setattr(settings, name, getattr(settings, name).expanduser())
    return settings


def take_frames(settings, classes, train, test):
    """The arrays of frames.npz by name: images, labels, and for each frame the number of its video in the list."""
    arrays = {}
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for split, videos, count in (("train", train, FRAMES), ("test", test, 1)):
            paths = [settings.videos / video for video in videos]
            shots = pool.map(functools.partial(frames, count=count), paths, chunksize=8)
            arrays[f"{split}_images"] = np.concatenate(list(tqdm(shots, desc=split, total=len(paths), disable=None)))
            labels = np.array([classes[video.partition("/")[0]] for video in videos], np.int64)
            arrays[f"{split}_labels"] = labels.repeat(count)
            arrays[f"{split}_videos"] = np.arange(len(videos)).repeat(count)
    return arrays


def main(argv=None):
    settings = parse(argv)
    if importlib.util.find_spec("av") is None:
        raise InputError("videos are read with the package av: pip install av")
    path = settings.data_root / "UCF-101/frames.npz"
    if path.exists():
        raise InputError(f"{path} is there already, and runs may have been made with it; move it away to make another")
    classes, *lists = read_lists(settings.splits)
    missing = [video for videos in lists for video in videos if not (settings.videos / video).is_file()]
    if missing:
        raise InputError(
            f"{settings.videos} lacks {len(missing)} of the lists' videos, {missing[0]} for one; unpack all of "
            "UCF101.rar, or name its folder with --videos"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = take_frames(settings, classes, *lists)
    half = path.with_name("frames.half.npz")
    np.savez(half, **arrays)
    half.replace(path)
    print(f"{len(arrays['train_images'])} training and {len(arrays['test_images'])} test frames are in {path}")


if __name__ == "__main__":
    sys.exit(run_main(main, how_to_go_on="nothing was written; start it again"))
