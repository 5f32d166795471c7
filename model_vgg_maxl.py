"""MAXL: VGG-16 trained on the primary task and on auxiliary labels that a second network learns to generate.

    python model_vgg_maxl.py                                   # 20 classes, psi[i] = 5, the paper's settings
    python model_vgg_maxl.py --primary-level 0 --psi 2,3,4     # 3 classes split into 2, 3 and 4
    python model_vgg_maxl.py --quick                           # a first look on generated images

Not yet run at full length.
"""

import contextlib
import functools
import math
import sys
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

import create_dataset
import utils
from harness.acceleration import Acceleration, in_fp32, select_device
from harness.command_line import add_psi, check_psi, make_parser, parse_settings
from harness.exits import InputError, run_main
from harness.run import Run

# ------------------------------------------------------------------------------------------------
# Settings: the paper's; those with an option can be set on the command line too
# ------------------------------------------------------------------------------------------------

SETTINGS = {
    "primary_level": 2,  # 0, 1, 2, 3: the 3, 10, 20 or 100 classes of 4-level CIFAR-100
    "psi": [5] * 20,  # ψ: auxiliary classes of each primary class, so len(psi) primary and sum(psi) auxiliary classes
    "epochs": 200,  # App. B
    "batch_size": 100,
    "width": 1.0,  # of both VGG-16; 1.0 is the paper's network
    "learning_rate": 0.01,  # α of eq. 4: plain SGD, no momentum, no weight decay (App. B, section 4.3)
    "label_learning_rate": 0.001,  # β of eq. 5; small, against the collapse of the labels (App. B)
    "label_weight_decay": 5e-4,  # App. B
    "halve_every": 50,  # epochs after which both rates are halved (α: App. B; β: the released runs)
    "focal_gamma": 2.0,  # γ, eq. 1
    "entropy_weight": 0.2,  # λ, eq. 5 (App. B)
    "meta_gradient": "forward-mode",  # or "double-backward", the same gradient
}

# ------------------------------------------------------------------------------------------------
# The label-generation network g_θ2
# ------------------------------------------------------------------------------------------------


def hierarchy_mask(psi):
    """The binary masks B(y, ψ) of section 3.3: bool (len(psi), sum(psi)), row y true on the classes of primary y."""
    if min(psi) < 1:
        raise ValueError(f"psi {psi} must hold numbers from 1 on; a primary class that is not to be split has 1")
    primary_of_auxiliary = torch.repeat_interleave(torch.arange(len(psi)), torch.tensor(psi))
    return primary_of_auxiliary == torch.arange(len(psi))[:, None]


def mask_softmax(logits, mask):
    """Mask SoftMax (eq. 6): a SoftMax over the classes where `mask` is true, exactly zero elsewhere.

    logits: (B, K), worked in fp32 at least; mask: bool (B, K). As printed, eq. 6 leaves exp(0) on the other classes.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.masked_fill(~mask, -math.inf).softmax(dim=1, dtype=dtype)


class LabelGenerator(nn.Module):
    """y_aux = g_θ2(x, y_pri, ψ): images (B, 3, 32, 32), primary int64 (B,) -> soft labels (B, sum(psi)).

    trunk: a module like utils.VGG16. A label's row sums to 1, over the auxiliary classes of its primary class.
    """

    def __init__(self, trunk, psi):
        super().__init__()
        self.trunk = trunk
        self.head = utils.make_head(trunk.feature_size, sum(psi))
        self.register_buffer("mask", hierarchy_mask(psi), persistent=False)

    def forward(self, images, primary):
        return mask_softmax(self.head(self.trunk(images)), self.mask[primary])


def negative_entropy(labels):
    """𝓗 of eq. 7: Σ_k ȳ_k log ȳ_k of the batch-mean label ȳ, from -log K (all classes used alike) to 0 (only one)."""
    mean = labels.mean(dim=0)
    # A class that no image of the batch may take has ȳ_k = 0; the clamp keeps 0·log 0 = 0 and its gradient finite.
    return (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()


# ------------------------------------------------------------------------------------------------
# The meta-gradient: how θ2 learns from the primary loss
#
# The auxiliary loss is not part of θ2's objective: labels that are easy to predict would minimise it. θ2 is
# judged by the primary loss alone, *after* θ1 took a step with the labels of θ2 (eq. 3). The look-ahead loss does
# not mention θ2, but θ1⁺ depends on it: the labels are in the auxiliary loss, its gradient is in θ1⁺ (eq. 4).
# ------------------------------------------------------------------------------------------------

META_GRADIENTS = ("forward-mode", "double-backward")


def meta_gradient(
    network, label_generator, images, primary, step_length, entropy_weight=0.2, gamma=2.0, method="forward-mode"
):
    """∇_θ2 of L_pri(θ1⁺) + λ𝓗(y), eqs. 3 to 5; neither network's weights are changed.

    images: (B, 3, H, W); primary: int64 (B,); step_length: α, the multi-task optimizer's learning rate.
    method: "double-backward" differentiates through θ1⁺, as Algorithm 1 has it. "forward-mode" gives the same
    gradient without a second-order graph: the auxiliary loss is linear in the labels, so with v = ∇L_pri(θ1⁺)
        ∂L_pri(θ1⁺)/∂y_nk = -(α/N) D_v ℓ_nk(θ1),    D_v the derivative along v: one forward-mode pass.
    It runs the network at θ1 twice, with the same random draws. Both methods need fp32: no TF32, no autocast.

    Returns (gradients, a tuple in the order of the label generator's trainable parameters; the look-ahead primary loss
    and the entropy of the mean label, 0-d tensors by name). Running statistics: each network's take part once, in the
    forward at θ1 and at θ2; everything else works on a copy. Raises ValueError for an unknown method.
    """
    if method not in META_GRADIENTS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(META_GRADIENTS)}")
    theta1 = {name: p for name, p in network.named_parameters() if p.requires_grad}
    theta2 = [p for p in label_generator.parameters() if p.requires_grad]
    labels = label_generator(images, primary)  # the only place where θ2 enters

    # θ1⁺ (eq. 4); a double backward needs the graph from the labels to it
    second_order = method == "double-backward"
    draws = random_state(images.device)
    with contextlib.nullcontext() if second_order else RememberedLayers() as layers:
        primary_logits, auxiliary_logits = network(images)
    loss = utils.focal_loss(primary_logits, primary, gamma)
    loss = loss + utils.focal_loss(auxiliary_logits, labels if second_order else labels.detach(), gamma)
    grads = torch.autograd.grad(loss, theta1.values(), create_graph=second_order, materialize_grads=True)
    theta1_plus = {name: p - step_length * g for (name, p), g in zip(theta1.items(), grads)}

    # L_pri(θ1⁺) (eq. 3)
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
    lookahead_loss = utils.focal_loss(functional_call(network, (theta1_plus, statistics), (images,))[0], primary, gamma)

    if second_order:
        objective = lookahead_loss
    else:
        # The auxiliary head is not in L_pri, its part of v is zero.
        v = torch.autograd.grad(lookahead_loss, theta1_plus.values(), materialize_grads=True)

        def auxiliary_losses(theta):
            return utils.focal_losses(functional_call(network, (theta, statistics), (images,))[1], gamma)  # ℓ_nk

        theta1 = {name: p.detach() for name, p in theta1.items()}
        with torch.no_grad(), drawing_again(draws, images.device):
            directional = derivative_along(auxiliary_losses, theta1, dict(zip(theta1, v)), layers)  # D_v ℓ_nk(θ1)
        objective = -step_length / len(images) * (labels * directional).sum()  # has the gradient of L_pri(θ1⁺)

    entropy = negative_entropy(labels)
    gradients = torch.autograd.grad(objective + entropy_weight * entropy, theta2, materialize_grads=True)
    return gradients, {"lookahead_primary_loss": lookahead_loss.detach(), "mean_label_entropy": -entropy.detach()}


def derivative_along(function, theta, v, layers):
    """D_v of function(theta), exact: one pass of forward-mode differentiation, with the outputs that `layers` has."""
    load_forward_mode()
    with forward_ad.dual_level(), layers.spare():
        dual = {name: forward_ad.make_dual(p, v[name]) for name, p in theta.items()}
        return forward_ad.unpack_dual(function(dual)).tangent


@functools.cache
def load_forward_mode():
    """Use forward-mode differentiation once: in its first use torch warns of its own use of torch.jit."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
        forward_ad.make_dual(torch.zeros(1), torch.ones(1))


def random_state(device):
    """The states of torch's generators that a network on `device` draws from."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


@contextlib.contextmanager
def drawing_again(state, device):
    """Draw what was drawn from `state` on, and leave the generators as they are now."""

    def go_to(state):
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], device)

    now = random_state(device)
    go_to(state)
    try:
        yield
    finally:
        go_to(now)


class RememberedLayers(TorchFunctionMode):
    """Keeps the outputs of convolutions and linear layers at θ1, so that the pass along v need not compute them again.

    They are bilinear, D_v (x ∗ w) = Dx ∗ w + x ∗ v; x ∗ w is for the layers after them. So the pass costs two forwards,
    not three, of any network whose forward does the same twice, and stops gradients by detach(), not no_grad().
    """

    def __init__(self):
        super().__init__()
        self.outputs, self.sparing = [], False

    def spare(self):
        """self, to be entered for the pass along v, which has to run the layers in the same order."""
        self.sparing = True
        return self

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (F.conv2d, F.linear) or kwargs:
            return function(*args, **(kwargs or {}))
        if not self.sparing:
            output = function(*args)
            self.outputs.append((output.detach(), output._version))
            return output
        output, version = self.outputs.pop(0)
        x, weight, bias, *options = args if len(args) > 2 else (*args, None)
        (x, dx), (weight, dweight) = forward_ad.unpack_dual(x), forward_ad.unpack_dual(weight)
        bias, dbias = (None, None) if bias is None else forward_ad.unpack_dual(bias)
        if dweight is None:  # a fixed filter, no weight of θ1
            return function(*args)
        if output._version != version:  # a layer after it worked in place
            output = function(x, weight, bias, *options)
        tangent = function(x, dweight, dbias, *options)
        if dx is not None:  # the images do not depend on θ1
            tangent += function(dx, weight, None, *options)
        return forward_ad.make_dual(output, tangent)


def meta_training_step(network, label_generator, optimizer, label_optimizer, images, primary, **options):
    """Algorithm 1's meta-training step: one update of θ2 (eq. 5). Returns the step's numbers by name.

    optimizer: the multi-task network's, read for its learning rate, not stepped. options: entropy_weight, gamma and
    method, as in `meta_gradient`. Raises ValueError where that optimizer has several rates. Autocast and TF32 are off.
    """
    step_length, *others = {group["lr"] for group in optimizer.param_groups}  # α: the scheduled rate, as it is now
    if others:
        raise ValueError("the multi-task optimizer has several learning rates; eq. 4 has one step length α")
    with in_fp32(images.device):  # rounding would ruin the gradient
        gradients, metrics = meta_gradient(network, label_generator, images, primary, step_length, **options)
    for parameter, gradient in zip((p for p in label_generator.parameters() if p.requires_grad), gradients):
        parameter.grad = gradient
    label_optimizer.step()
    return metrics


# ------------------------------------------------------------------------------------------------
# Training: an epoch is one pass of auxiliary-training steps, then one of meta-training steps (Algorithm 1)
# ------------------------------------------------------------------------------------------------


def auxiliary_training_step(network, label_generator, optimizer, images, primary, gamma=2.0, cosine=False):
    """Algorithm 1's auxiliary-training step: one update of θ1 on both tasks (eq. 2), with θ2's labels.

    Returns the step's numbers by name, and each image's largest auxiliary class, int64 (B,).
    """
    with torch.no_grad():
        labels = label_generator(images, primary)
    metrics = utils.multi_task_step(network, optimizer, images, primary, labels, gamma, cosine)
    return metrics | {"label_entropy": torch.special.entr(labels).sum(dim=1).mean()}, labels.argmax(dim=1)


def train_epoch(
    network, label_generator, optimizer, batches, primary_level, meter,
    gamma=2.0, cosine_every=0, step=auxiliary_training_step,
):  # fmt: skip
    """First pass: auxiliary-training steps; returns its averages by column name.

    cosine_every: compare the tasks' gradients at every so many iterations, 0 for never.
    """
    network.train()
    label_generator.train()
    used = torch.zeros_like(label_generator.mask[0])
    for iteration, (images, targets) in enumerate(batches):
        parts = network, label_generator, optimizer, images, targets[:, primary_level]
        metrics, auxiliary = step(*parts, gamma=gamma, cosine=cosine_every > 0 and iteration % cosine_every == 0)
        used.index_fill_(0, auxiliary, True)
        meter.add(metrics)
    return meter.averages() | {"train_auxiliary_classes_used": used.double().mean().item()}


def meta_epoch(
    network, label_generator, optimizer, label_optimizer, batches, primary_level, meter,
    step=meta_training_step, **options,
):  # fmt: skip
    """Second pass: meta-training steps, with their options; returns its averages by column name."""
    network.train()
    label_generator.train()
    for images, targets in batches:
        parts = network, label_generator, optimizer, label_optimizer, images, targets[:, primary_level]
        meter.add(step(*parts, **options))
    return meter.averages()


def fit(
    run, fast, train, test, settings, level,
    *, network, optimizer, scheduler, label_generator, label_optimizer, label_scheduler,
):  # fmt: skip
    """Train both networks for what is left of settings.epochs on `train` and test after each; `run` keeps them.

    train, test: Splits. fast: an Acceleration, whose device the networks are on. level: of the primary labels.
    """
    gamma, generator = settings.focal_gamma, torch.Generator().manual_seed(settings.seed)
    # bf16 and TF32 ruin the meta-gradient (README, Speed): the second pass is in fp32, whatever the precision.
    auxiliary_step, meta_step = fast.capture(auxiliary_training_step), fast.capture(meta_training_step)
    low, low_generator = fast.lower(network), fast.lower(label_generator)
    for _ in run.epochs(
        2 * train.iterations(settings.batch_size), fast.device,
        network=network, optimizer=optimizer, scheduler=scheduler,
        label_generator=label_generator, label_optimizer=label_optimizer, label_scheduler=label_scheduler,
        generator=generator,
    ):  # fmt: skip
        row = {"learning_rate": scheduler.get_last_lr()[0], "label_learning_rate": label_scheduler.get_last_lr()[0]}
        row |= train_epoch(
            low, low_generator, optimizer, train.train_batches(settings.batch_size, generator), level,
            run.meter("train"), gamma=gamma, cosine_every=settings.cosine_every, step=auxiliary_step,
        )  # fmt: skip
        row |= meta_epoch(
            network, label_generator, optimizer, label_optimizer,
            train.train_batches(settings.batch_size, generator), level, run.meter("meta"), meta_step,
            entropy_weight=settings.entropy_weight, gamma=gamma, method=settings.meta_gradient,
        )  # fmt: skip
        row |= utils.evaluate(low, test, [level], gamma)
        scheduler.step()
        label_scheduler.step()
        run.end_epoch(row)


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def add_options(parser):
    """Add the options that MAXL alone has."""
    add_psi(parser)
    parser.add_argument(
        "--entropy-weight", type=float, metavar="W",
        help="weight of the entropy loss in the label generator's objective (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--meta-gradient", choices=META_GRADIENTS,
        help="how the label generator's gradient is computed; both are exact (default: %(default)s)",
    )  # fmt: skip


def check(settings, classes, whose):
    """Raise InputError where ψ does not fit the classes of what has them, or λ is out of range."""
    check_psi(settings.psi, classes, whose)
    if not (math.isfinite(settings.entropy_weight) and settings.entropy_weight >= 0):
        raise InputError(f"--entropy-weight {settings.entropy_weight} is out of range; give 0 or a positive number")


def parse(argv=None):
    """The command line's settings. Raises InputError where ψ does not fit the primary level."""
    parser = make_parser(__doc__)
    add_options(parser)
    settings = parse_settings(parser, SETTINGS, argv)
    check(settings, create_dataset.LEVEL_CLASSES[settings.primary_level], f"primary level {settings.primary_level}")
    return settings


def make_networks(make_trunk, psi, seed):
    """The multi-task network and the label generator before the first epoch; make_trunk: () -> a module as VGG16 is."""
    torch.manual_seed(seed)
    network = utils.initialise(utils.Network(make_trunk(), len(psi), sum(psi)), nn.init.xavier_uniform_)
    return network, utils.initialise(LabelGenerator(make_trunk(), psi), nn.init.xavier_normal_)


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings.device)
    fast = Acceleration(device, settings.precision, settings.channels_last, settings.cuda_graphs)
    run = Run("model_vgg_maxl", f"{len(settings.psi)}-{sum(settings.psi)}", settings, argv)
    train, test = create_dataset.load(
        settings.dataset, settings.data_root, device, settings.train_images, settings.seed, settings.channels_last
    )
    networks = make_networks(lambda: utils.Backbone(settings.width), settings.psi, settings.seed)
    network, label_generator = map(fast.place, networks)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.learning_rate)
    label_optimizer = torch.optim.SGD(
        label_generator.parameters(), lr=settings.label_learning_rate, weight_decay=settings.label_weight_decay
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.halve_every, gamma=0.5)
    label_scheduler = torch.optim.lr_scheduler.StepLR(label_optimizer, settings.halve_every, gamma=0.5)
    fit(
        run, fast, train, test, settings, settings.primary_level,
        network=network, optimizer=optimizer, scheduler=scheduler,
        label_generator=label_generator, label_optimizer=label_optimizer, label_scheduler=label_scheduler,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
