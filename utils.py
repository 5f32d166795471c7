"""What the scripts share beside the method (maxl.py): VGG-16, initial weights, cosine similarities, the test."""

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import maxl

# ------------------------------------------------------------------------------------------------
# The backbone and its first weights
# ------------------------------------------------------------------------------------------------


class VGG16(nn.Module):
    """The VGG-16 trunk: images (B, image_channels, 32, 32) -> features (B, feature_size).

    Five blocks of 2-2-3-3-3 convolutions (3x3) -> BatchNorm -> ReLU, each block ended by 2x2 max-pooling.
    `width` multiplies the channels 64-128-256-512-512; 1.0 is the paper's network. Any module with this
    forward and a `feature_size` can take its place. Raises ValueError for images of another size.
    """

    def __init__(self, width=1.0, image_channels=3):
        super().__init__()
        layers, channels_in = [], image_channels
        for convolutions, channels in zip((2, 2, 3, 3, 3), (64, 128, 256, 512, 512)):
            channels = max(1, round(channels * width))
            for _ in range(convolutions):
                layers += [
                    nn.Conv2d(channels_in, channels, kernel_size=3, padding=1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                ]
                channels_in = channels
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.feature_size = channels_in

    def forward(self, images):
        if images.shape[-2:] != (32, 32):
            raise ValueError(
                f"VGG16 takes images of 32x32 pixels, these have {images.shape[-2]}x{images.shape[-1]}; resize them, "
                "or use a backbone that pools what is left into its features"
            )
        return self.layers(images).flatten(1)


Backbone = VGG16  # of every network that the scripts train; another class that takes a `width` can stand here


def initialise(network, weights):
    """Draw every convolution's and linear layer's weight by `weights` (an nn.init function), zero the biases.

    BatchNorm keeps its 1 and 0. Returns the network.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weights(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


# ------------------------------------------------------------------------------------------------
# What is measured beside the losses
# ------------------------------------------------------------------------------------------------


def cosine_similarities(network, primary_loss, auxiliary_loss):
    """Compare the two tasks' gradients on the shared trunk (section 4.4, Figs. 4 and 7); the losses' graph stays.

    Returns 0-d tensors by name: "cosine_similarity", on each convolution weight the mean over the output filters, then
    the mean over these layers; "trunk_cosine_similarity", of the two gradients of the whole trunk.
    """
    trunk = [p for p in network.trunk.parameters() if p.requires_grad]
    primary, auxiliary = (
        torch.autograd.grad(loss, trunk, retain_graph=True, materialize_grads=True)
        for loss in (primary_loss, auxiliary_loss)
    )
    # a bias's or BatchNorm's share of a filter is a single number, and its cosine always 1 or -1
    layers = [F.cosine_similarity(a.flatten(1), b.flatten(1)).mean() for a, b in zip(primary, auxiliary) if a.dim() > 1]
    whole = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (primary, auxiliary))
    return {
        "cosine_similarity": torch.stack(layers).mean(),
        "trunk_cosine_similarity": F.cosine_similarity(*whole, dim=0),
    }


@torch.no_grad()
def settle_statistics(network, split, batch_size, seed):
    """One pass over `split` in training mode without weight updates, so that BatchNorm's running statistics catch up.

    They lag behind weights that move. MAXL's second pass, during which θ1 is fixed, does the same before each test. The
    batches are drawn from a `seed` of their own, so that a training is the same with such passes and without.
    """
    network.train()
    for images, _ in split.train_batches(batch_size, torch.Generator().manual_seed(seed)):
        network(images)


@torch.no_grad()
def evaluate(network, split, levels, gamma=2.0, statistics="running"):
    """Loss and accuracy over the whole of `split`, by name, in evaluation mode.

    levels: the label level of the network's first head (primary) and, where that has a meaning, of its second.
    statistics: of BatchNorm; "batch" takes those of each test batch of 100 and leaves the running ones as they are,
    otherwise the running ones are taken ("settled" ones have had a pass of `settle_statistics` before).
    """
    start = time.perf_counter()
    network.eval()
    if statistics == "batch":
        running = maxl.copy_of_buffers(network)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
    totals = {}
    for images, labels in split.test_batches(100 if statistics == "batch" else None):
        for task, logits, level in zip(("primary", "auxiliary"), network(images), levels):
            for name, value in (
                (f"test_{task}_loss", maxl.focal_loss(logits, labels[:, level], gamma)),
                (f"test_{task}_accuracy", maxl.accuracy(logits, labels[:, level])),
            ):
                totals[name] = totals.get(name, 0) + value.double() * len(images)
    if statistics == "batch":
        maxl.put_back_buffers(network, running)
    values = (torch.stack(list(totals.values())) / len(split)).tolist()  # the host waits for the device here
    return dict(zip(totals, values)) | {"seconds_test": time.perf_counter() - start}
