"""A split that the training device cannot hold: its images stay in the host's memory and go over batch by batch."""

import os

import torch

from create_dataset import IMAGE_SIZE, PADDING, Split, pad


class HostSplit(Split):
    """A Split, bit-identical, with its images on the host: uint8 as they were read, no padded copy.

    A batch is gathered on the host and padded, cut and scaled on the device; with a GPU it is gathered into pinned
    memory, and its copy does not hold up the host. That part has not yet run on a GPU.
    """

    def __init__(self, images, labels, device="cpu", channels_last=False, mirror=True):
        super().__init__(images[:0], labels, device, channels_last, mirror)
        self.held = torch.as_tensor(images)

    @property
    def images(self):
        return self.held

    def _crop(self, index, rows, columns):
        batch = self.held.new_empty(len(index), *self.held.shape[1:], pin_memory=rows.is_cuda)
        torch.index_select(self.held, 0, index, out=batch)
        padded = pad(batch.to(rows.device, non_blocking=True))
        first = torch.arange(len(index), device=rows.device)
        return padded[first[:, None, None], rows[:, :, None], columns[:, None, :]]


def split_for(images, labels, device, channels_last=False, mirror=True):
    """A Split where its padded images fit into half of the memory that the device has free, else a HostSplit."""
    side = IMAGE_SIZE + 2 * PADDING
    fits = len(images) * side * side * images.shape[-1] <= free_memory(torch.device(device)) / 2
    return (Split if fits else HostSplit)(images, labels, device, channels_last, mirror)


def free_memory(device):
    """Bytes that the device has free; without end where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]  # of the current one; torch 2.4 takes no device without its number
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")
