"""What the three methods share: VGG-16 and its heads, the focal loss, the multi-task update, the test."""

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------
# The backbone and its heads
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


def make_head(feature_size, classes):
    """A task's own layers: features (B, feature_size) -> logits (B, classes). The loss holds the SoftMax."""
    return nn.Sequential(nn.Linear(feature_size, feature_size), nn.ReLU(inplace=True), nn.Linear(feature_size, classes))


class Network(nn.Module):
    """f_θ1: a shared trunk and one head a task (hard parameter sharing, section 3.1).

    images (B, 3, 32, 32) -> a tuple of logits, one (B, classes) for each entry of `classes`; the first is the
    primary task, the second, in a multi-task network, the auxiliary task.
    """

    def __init__(self, trunk, *classes):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(make_head(trunk.feature_size, n) for n in classes)

    def forward(self, images):
        features = self.trunk(images)
        return tuple(head(features) for head in self.heads)


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
# Losses, and the update of the multi-task network
# ------------------------------------------------------------------------------------------------


def focal_losses(logits, gamma=2.0):
    """ℓ_nk = -(1 - p_nk)^γ log p_nk of eq. 1 for every image and class: (B, K) logits -> (B, K).

    Worked from log p, never from p, so that it and its gradient stay finite where p is nearly 0 or 1; and in fp32 at
    least, whatever the logits are in.
    """
    log_p = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    one_minus_p = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)  # for 0 < γ < 1, whose slope at 0 is ∞
    return -(one_minus_p**gamma) * log_p


def focal_loss(logits, labels, gamma=2.0):
    """Focal loss (eq. 1), summed over the classes, mean over the batch: a 0-d tensor.

    logits: (B, K). labels: int64 (B,) class ids, or float (B, K) soft labels, as in F.cross_entropy. Raises ValueError
    for labels of another shape, (B, 1) say, which broadcasting would let through.
    """
    losses = focal_losses(logits, gamma)
    if labels.shape not in (losses.shape[:1], losses.shape):
        raise ValueError(f"labels of shape {tuple(labels.shape)} for logits {tuple(logits.shape)}; give (B,) or (B, K)")
    if labels.dim() == 1:
        return losses.gather(1, labels[:, None]).mean()
    return (labels * losses).sum(dim=1).mean()


def accuracy(logits, labels):
    """Share of the batch whose largest logit is the label's class (soft labels: the label's largest class)."""
    if labels.dim() == 2:
        labels = labels.argmax(dim=1)
    return (logits.argmax(dim=1) == labels).double().mean()


def multi_task_step(network, optimizer, images, primary, auxiliary, gamma=2.0, cosine=False):
    """One update of the multi-task network θ1 (eq. 2): primary and auxiliary loss, weights 1 and 1.

    images: (B, 3, 32, 32). primary: int64 (B,). auxiliary: int64 (B,) or soft float (B, K). cosine: compare the two
    tasks' gradients too, which takes a backward pass for each.
    Returns the step's losses and accuracies as 0-d tensors by name.
    """
    primary_logits, auxiliary_logits = network(images)
    primary_loss = focal_loss(primary_logits, primary, gamma)
    auxiliary_loss = focal_loss(auxiliary_logits, auxiliary, gamma)
    optimizer.zero_grad()
    if cosine:
        cosines = backward_by_task(network, primary_loss, auxiliary_loss)
    else:
        (primary_loss + auxiliary_loss).backward()
        cosines = {}
    optimizer.step()
    metrics = {
        "primary_loss": primary_loss.detach(),
        "primary_accuracy": accuracy(primary_logits, primary),
        "auxiliary_loss": auxiliary_loss.detach(),
        "auxiliary_accuracy": accuracy(auxiliary_logits, auxiliary),
    }
    return metrics | cosines


def backward_by_task(network, primary_loss, auxiliary_loss):
    """Set each parameter's gradient to the sum of the two losses' gradients, and compare the two (section 4.4, Fig. 4).

    Returns 0-d tensors by name: "cosine_similarity", on each of the trunk's convolution weights the mean over the
    output filters, then the mean over these layers; "trunk_cosine_similarity", of all of the trunk's gradient at once.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    primary = torch.autograd.grad(primary_loss, parameters, retain_graph=True, materialize_grads=True)
    auxiliary = torch.autograd.grad(auxiliary_loss, parameters, materialize_grads=True)
    trunk = set(network.trunk.parameters())
    pairs = []
    for parameter, *pair in zip(parameters, primary, auxiliary):
        parameter.grad = sum(pair)
        if parameter in trunk:
            pairs.append(pair)
    # a bias's or BatchNorm's share of a filter is a single number, and its cosine always 1 or -1
    layers = [F.cosine_similarity(a.flatten(1), b.flatten(1)).mean() for a, b in pairs if a.dim() > 1]
    whole = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in zip(*pairs))
    return {
        "cosine_similarity": torch.stack(layers).mean(),
        "trunk_cosine_similarity": F.cosine_similarity(*whole, dim=0),
    }


@torch.no_grad()
def settle_statistics(network, split, batch_size, seed):
    """One pass over `split` in training mode at fixed weights, which only BatchNorm's running statistics take part in.

    They lag behind weights that move; MAXL's second pass, in which θ1 rests, lets them settle before each test. The
    batches are drawn from a `seed` of their own, so that a training is the same with such passes and without.
    """
    network.train()
    for images, _ in split.train_batches(batch_size, torch.Generator().manual_seed(seed)):
        network(images)


@torch.no_grad()
def evaluate(network, split, levels, gamma=2.0):
    """Loss and accuracy over the whole of `split`, by name, in evaluation mode (BatchNorm's running statistics).

    levels: the label level of the network's first head (primary) and, where that has a meaning, of its second.
    """
    start = time.perf_counter()
    network.eval()
    totals = {}
    for images, labels in split.test_batches():
        for task, logits, level in zip(("primary", "auxiliary"), network(images), levels):
            for name, value in (
                (f"test_{task}_loss", focal_loss(logits, labels[:, level], gamma)),
                (f"test_{task}_accuracy", accuracy(logits, labels[:, level])),
            ):
                totals[name] = totals.get(name, 0) + value.double() * len(images)
    values = (torch.stack(list(totals.values())) / len(split)).tolist()  # the host waits for the device here
    return dict(zip(totals, values)) | {"seconds_test": time.perf_counter() - start}
