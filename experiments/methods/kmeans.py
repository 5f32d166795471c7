"""K-Means: Human's multi-task network on clusters of an auto-encoder's codes (section 4.3), a baseline of Figure 3.

    python -m experiments.methods.kmeans                                # 20 classes, psi[i] = 5
    python -m experiments.methods.kmeans --primary-level 0 --psi 3,3,4  # 3 classes into 10
    python -m experiments.methods.kmeans --quick                        # a first look on generated images

The images of primary class i are clustered into psi[i] clusters, which are its auxiliary classes. The paper says
"clustering updated after every training iteration" and no more; here, every iteration on a batch of images
  1. makes one step of the auto-encoder (Adam, mean squared error) on the batch, whose codes are taken;
  2. labels each image with the nearest centroid of its primary class;
  3. moves the centroids towards the batch's codes, one step of mini-batch K-Means;
  4. updates the multi-task network on these labels (eq. 2).
The centroids start as images' codes by k-means++.
"""

import functools
import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

import maxl
import model_vgg_human
import utils
from experiments.methods import random_labels
from harness.exits import run_main

CODE_SIZE = 64  # numbers in a code of the auto-encoder
AUTOENCODER_LEARNING_RATE = 0.001  # of Adam
FORGET = 0.99  # weight of the past in a centroid, an iteration: the codes change while the auto-encoder learns
STARVED = 0.05  # a cluster with less than this share of the mean of its primary class is started anew

make_networks = model_vgg_human.make_networks
parse = functools.partial(random_labels.parse, doc=__doc__)


class AutoEncoder(nn.Module):
    """Images (B, 3, 32, 32) -> codes (B, code_size) and back.

    Encoder: three 3x3 convolutions of stride 2, 32-64-128 channels, each with BatchNorm and ReLU, and a linear layer.
    Decoder: the same backwards, with transposed convolutions.
    """

    def __init__(self, code_size):
        super().__init__()

        def half(i, o):
            return [nn.Conv2d(i, o, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]

        def double(i, o):
            return nn.ConvTranspose2d(i, o, kernel_size=4, stride=2, padding=1)

        self.encoder = nn.Sequential(
            *half(3, 32), *half(32, 64), *half(64, 128), nn.Flatten(), nn.Linear(128 * 4 * 4, code_size)
        )
        self.decoder = nn.Sequential(
            nn.Linear(code_size, 128 * 4 * 4), nn.ReLU(inplace=True), nn.Unflatten(1, (128, 4, 4)),
            double(128, 64), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
            double(64, 32), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
            double(32, 3),
        )  # fmt: skip


class MiniBatchKMeans(nn.Module):
    """One K-Means for each primary class, all at once: ψ[i] centroids for primary class i, sum(ψ) in all.

    Mini-batch K-Means (Sculley 2010): a centroid is the mean of the codes that were nearest to it, here with the past
    forgotten by `forget` a step. Nothing in it waits for the device.
    """

    def __init__(self, psi, code_size, forget=FORGET, starved=STARVED):
        super().__init__()
        self.forget, self.starved = forget, starved
        # parameters without gradient, so that they are saved and watched like weights
        self.centroids = nn.Parameter(torch.zeros(sum(psi), code_size), requires_grad=False)
        self.counts = nn.Parameter(torch.zeros(sum(psi)), requires_grad=False)
        mask = maxl.hierarchy_mask(psi)
        self.register_buffer("mask", mask, persistent=False)
        siblings = mask.T.float() @ mask.float()  # (K, K), 1 where two clusters are of one primary class
        self.register_buffer("siblings", siblings, persistent=False)

    @torch.no_grad()
    def start(self, codes, primary, generator):
        """Draw the centroids from codes (N, D) of primary classes int64 (N,), by k-means++ (Arthur, Vassilvitskii)."""
        codes, primary = codes.cpu(), primary.cpu()
        centroids = torch.empty(self.centroids.shape)
        for primary_class, own in enumerate(self.mask.cpu()):
            members = codes[primary == primary_class]
            nearest = torch.full((len(members),), math.inf)  # squared distance to the centroids so far
            for k in own.nonzero().flatten().tolist():
                # any code will do at first, and where all are centroids already
                weights = nearest if 0 < nearest.sum() < math.inf else torch.ones_like(nearest)
                centroids[k] = members[torch.multinomial(weights, 1, generator=generator).item()]
                nearest = torch.minimum(nearest, (members - centroids[k]).square().sum(dim=1))
        self.centroids.copy_(centroids)
        self.counts.fill_(1.0)

    def distances(self, codes, primary):
        """Squared distances (B, K) to the centroids, infinite to those of other primary classes."""
        squared = torch.cdist(codes, self.centroids, compute_mode="donot_use_mm_for_euclid_dist").square()
        return squared.masked_fill(~self.mask[primary], math.inf)

    def forward(self, codes, primary):
        """The nearest centroid of the image's primary class: int64 (B,)."""
        return self.distances(codes, primary).argmin(dim=1)

    @torch.no_grad()
    def update(self, codes, primary):
        """One step on a batch's codes (B, D); returns the nearest centroids before it, int64 (B,), as forward does.

        A cluster that starves moves to its class's worst represented code in the batch.
        """
        nearest, assigned = self.distances(codes, primary).min(dim=1)
        members = F.one_hot(assigned, len(self.centroids)).to(codes)
        total = self.forget * self.counts + members.sum(dim=0)
        past = (self.forget * self.counts)[:, None] * self.centroids
        self.centroids.copy_((past + members.T @ codes) / total[:, None])
        self.counts.copy_(total)

        mean = self.siblings @ self.counts / self.siblings.sum(dim=1)
        candidates = nearest[:, None].expand(-1, len(mean)).masked_fill(~self.mask[primary], -1.0)
        distance, farthest = candidates.max(dim=0)
        move = (self.counts < self.starved * mean) & (distance > 0)
        self.centroids.copy_(torch.where(move[:, None], codes[farthest], self.centroids))
        self.counts.copy_(torch.where(move, mean, self.counts))
        return assigned


class ClusterLabels:
    """Auxiliary labels from clusters that are refreshed at every call; see the head of this file."""

    def __init__(self, split, settings):
        device = split.labels.device
        self.split, self.level, self.seed = split, settings.primary_level, settings.seed
        self.autoencoder = utils.initialise(AutoEncoder(CODE_SIZE), nn.init.xavier_uniform_).to(device)
        self.optimizer = torch.optim.Adam(self.autoencoder.parameters(), lr=AUTOENCODER_LEARNING_RATE)
        self.clusters = MiniBatchKMeans(settings.psi, CODE_SIZE).to(device)
        self.parts = {
            "autoencoder": self.autoencoder, "autoencoder_optimizer": self.optimizer, "clusters": self.clusters,
        }  # fmt: skip

    @torch.no_grad()
    def start(self):
        """Draw the centroids from the codes of all images, under the statistics of batches of one size everywhere."""
        codes = torch.cat([self.autoencoder.encoder(images) for images, _ in self.split.test_batches(100)])
        generator = torch.Generator().manual_seed(self.seed)
        self.clusters.start(codes, self.split.labels[:, self.level], generator)

    def __call__(self, images, labels):
        primary = labels[:, self.level]
        codes = self.autoencoder.encoder(images)
        loss = F.mse_loss(self.autoencoder.decoder(codes), images)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return self.clusters.update(codes.detach(), primary)


def main(argv=None):
    random_labels.train("experiments.methods.kmeans", parse(argv), argv, ClusterLabels)


if __name__ == "__main__":
    sys.exit(run_main(main))
