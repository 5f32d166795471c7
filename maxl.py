"""MAXL, the whole method: Self-Supervised Generalisation with Meta Auxiliary Learning (Liu, Davison, Johns, 2019).

From top to bottom: losses, networks, the multi-task objective, the meta-gradient, and the two steps of Algorithm 1. An
epoch is one pass of `auxiliary_training_step` over the data, then one pass of `meta_training_step`. This file needs
nothing but torch: install it (`pip install .`) or copy it.
"""

import contextlib
import functools
import math
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------


def focal_losses(logits, gamma=2.0):
    """ℓ_nk = -(1 - p_nk)^γ log p_nk of eq. 1 for every image and class: (B, K) logits -> (B, K), at least fp32.

    Computed from log p, so that the loss and its gradient stay finite where p is nearly 0 or 1.
    """
    log_p = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    one_minus_p = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)  # for 0 < γ < 1: infinite slope at 0
    return -(one_minus_p**gamma) * log_p


def focal_loss(logits, labels, gamma=2.0):
    """Focal loss (eq. 1), summed over the classes, mean over the batch: a 0-d tensor. γ = 0 is cross-entropy.

    logits: (B, K). labels: integer (B,) class ids or float (B, K) soft labels. Raises ValueError for other labels.
    """
    losses = focal_losses(logits, gamma)
    if labels.shape == losses.shape:
        return (labels * losses).sum(dim=1).mean()
    if labels.shape != losses.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} for logits of shape {tuple(logits.shape)}; "
            "give class ids, integers (B,), or soft labels, floats (B, K)"
        )
    return losses.gather(1, labels.long()[:, None]).mean()


def negative_entropy(labels):
    """𝓗 of eq. 7: Σ_k ȳ_k log ȳ_k of the batch-mean label ȳ, from -log K (all classes used alike) to 0 (only one)."""
    mean = labels.mean(dim=0)
    # A class that no image of the batch may take has ȳ_k = 0; the clamp keeps 0·log 0 = 0 and its gradient finite.
    return (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()


def accuracy(logits, labels):
    """Share of the batch whose largest logit is the label's class (soft labels: the label's largest class)."""
    if labels.dim() == 2:
        labels = labels.argmax(dim=1)
    return (logits.argmax(dim=1) == labels).double().mean()


# ------------------------------------------------------------------------------------------------
# The multi-task network f_θ1 and the label-generation network g_θ2
# ------------------------------------------------------------------------------------------------


def make_head(feature_size, classes):
    """A task's own layers: features (B, feature_size) -> logits (B, classes). The loss contains the SoftMax."""
    return nn.Sequential(nn.Linear(feature_size, feature_size), nn.ReLU(inplace=True), nn.Linear(feature_size, classes))


class Network(nn.Module):
    """f_θ1: a shared trunk and one head per task (hard parameter sharing, section 3.1).

    trunk: a module images -> features (B, trunk.feature_size). classes: for the primary task and, in a multi-task
    network, the auxiliary task. Returns a tuple of logits, one (B, classes) per task.
    """

    def __init__(self, trunk, *classes):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(make_head(trunk.feature_size, n) for n in classes)

    def forward(self, images):
        features = self.trunk(images)
        return tuple(head(features) for head in self.heads)


def hierarchy_mask(psi):
    """The binary masks B(y, ψ) of section 3.3: bool (len(psi), sum(psi)), row y true on the classes of primary y."""
    if min(psi) < 1:
        raise ValueError(f"psi {psi} must hold numbers from 1 on; a primary class that is not to be split has 1")
    primary_of_auxiliary = torch.repeat_interleave(torch.arange(len(psi)), torch.tensor(psi))
    return primary_of_auxiliary == torch.arange(len(psi))[:, None]


def mask_softmax(logits, mask):
    """Mask SoftMax (eq. 6): a SoftMax over the classes where `mask` is true, exactly zero elsewhere, at least fp32.

    logits: (B, K); mask: bool (B, K). As printed, eq. 6 leaves exp(0) on the other classes; the text means zero.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.masked_fill(~mask, -math.inf).softmax(dim=1, dtype=dtype)


class LabelGenerator(nn.Module):
    """y_aux = g_θ2(x, y_pri, ψ): images and primary class ids, integers (B,) -> soft labels (B, sum(psi)).

    A label sums to 1 over the auxiliary classes of its primary class. psi: auxiliary classes of each primary class.
    """

    def __init__(self, trunk, psi):
        super().__init__()
        self.trunk = trunk
        self.head = make_head(trunk.feature_size, sum(psi))
        self.register_buffer("mask", hierarchy_mask(psi), persistent=False)

    def forward(self, images, primary):
        if primary.is_floating_point() or primary.dim() != 1:
            shape = tuple(primary.shape)
            raise ValueError(f"primary labels are {primary.dtype} of shape {shape}; give class ids, integers (B,)")
        return mask_softmax(self.head(self.trunk(images)), self.mask[primary.long()])


# ------------------------------------------------------------------------------------------------
# The multi-task objective (eq. 2): the one place where primary and auxiliary loss are put together
# ------------------------------------------------------------------------------------------------


def multi_task_loss(network, images, primary, labels=None, gamma=2.0, auxiliary_weight=1.0):
    """L_pri + w L_aux of eq. 2 (w = 1 in the paper); without auxiliary labels L_pri alone.

    primary: integers (B,). labels: integers (B,) or soft float (B, K). Returns the sum, a 0-d tensor with its graph,
    and its parts by name. The steps below take any function with these first four arguments as `loss`. Raises
    ValueError for labels without an auxiliary task.
    """
    primary_logits, *auxiliary_logits = network(images)
    loss = primary_loss = focal_loss(primary_logits, primary, gamma)
    numbers = {"primary_loss": primary_loss, "primary_accuracy": accuracy(primary_logits, primary)}
    if labels is not None:
        if not auxiliary_logits:
            raise ValueError("the network has no auxiliary task; give Network(trunk, classes, sum(psi))")
        auxiliary_loss = focal_loss(auxiliary_logits[0], labels, gamma)
        loss = primary_loss + auxiliary_weight * auxiliary_loss
        numbers |= {"auxiliary_loss": auxiliary_loss, "auxiliary_accuracy": accuracy(auxiliary_logits[0], labels)}
    return loss, numbers


# ------------------------------------------------------------------------------------------------
# The meta-gradient: how θ2 learns from the primary loss
#
# The auxiliary loss is not part of θ2's objective: labels that are easy to predict would minimise it. θ2 is judged by
# the primary loss alone, *after* θ1 took a step with the labels y of θ2 (eqs. 3 and 4):
#     θ1⁺ = θ1 - α ∇L(θ1, y),    L = L_pri + L_aux
# L_pri(θ1⁺) does not mention θ2, but θ1⁺ depends on it through y. With v = ∇L_pri at θ1⁺, the chain rule gives
#     ∂L_pri(θ1⁺)/∂y = -α ∂/∂y ⟨∇L(θ1, y), v⟩ = -α ∂/∂y D_v L(θ1, y),    v held fixed,
# where D_v is the derivative along v. The two methods are these two expressions. Both are exact, for every loss.
# ------------------------------------------------------------------------------------------------

META_GRADIENTS = ("forward-mode", "double-backward")


class ForwardModeError(RuntimeError):
    """Forward-mode differentiation is not possible in a network or loss."""


def by_double_backward(gradient, labels, v):
    """∂/∂y ⟨∇L(θ1, y), v⟩ by differentiating the gradient, which needs its graph. Returns (B, K)."""
    pairs = [(g, direction) for g, direction in zip(gradient, v) if g.requires_grad]
    if not pairs:  # a loss that ignores the labels
        return torch.zeros_like(labels)
    gradient, v = zip(*pairs)
    return torch.autograd.grad(gradient, labels, grad_outputs=v, materialize_grads=True)[0]


def by_forward_mode(total_loss, network, buffers, labels, v):
    """∂/∂y D_v L(θ1, y), (B, K), and D_v L itself: a pass of forward-mode differentiation, no second-order graph.

    total_loss: network -> L(θ1, y). labels: y, a leaf that requires a gradient. v: {name: tensor}. Raises
    ForwardModeError where the network cannot be differentiated in this way.
    """

    def differentiate(network):
        directional = forward_ad.unpack_dual(total_loss(network)).tangent
        if not directional.requires_grad:  # a loss that ignores the labels
            return torch.zeros_like(labels), directional
        return torch.autograd.grad(directional, labels, materialize_grads=True)[0], directional.detach()

    load_forward_mode()
    try:
        with forward_ad.dual_level():
            theta1 = dict(network.named_parameters())
            duals = {name: forward_ad.make_dual(theta1[name].detach(), direction) for name, direction in v.items()}
            return with_weights(network, duals, buffers, differentiate)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise ForwardModeError(
            "forward-mode differentiation failed in this network or loss; "
            'use method="double-backward", which gives the same gradient '
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error


@torch.enable_grad()
def meta_gradient(
    network, label_generator, optimizer, images, primary,
    entropy_weight=0.2, loss=multi_task_loss, method="forward-mode", judged_on=None,
):  # fmt: skip
    """∇_θ2 of L_pri(θ1⁺) + λ𝓗(y), eqs. 3 to 5; no weights change, running statistics are updated exactly once.

    images: (B, ...); primary: integers (B,). optimizer: the multi-task network's. θ1 is what it holds of the network,
    α its learning rate; θ1⁺ is a plain gradient step (eq. 4) whatever the optimizer. entropy_weight: λ; None where the
    labels are no distributions. judged_on: the (images, primary) of L_pri(θ1⁺), the same batch in the paper. The
    arithmetic has to be exact: no autocast, no TF32 (`exact_arithmetic`).

    Returns the gradients, a tuple in the order of the label generator's trainable parameters, and numbers by name, 0-d
    tensors; "forward_mode_error" should be below 1e-4 (see `directional_error`). Raises ValueError for what would make
    the gradient wrong (`check_networks`), and ForwardModeError where forward mode is not possible.
    """
    if method not in META_GRADIENTS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(META_GRADIENTS)}")
    alpha, theta1 = check_networks(network, label_generator, optimizer)
    theta2 = [p for p in label_generator.parameters() if p.requires_grad]
    with RefuseLowPrecision():
        labels = label_generator(images, primary)  # the only place where θ2 enters
        label_statistics = copy_of_buffers(label_generator)
        y = labels.detach().requires_grad_()

        def total_loss(network):  # L(θ1, y)
            return loss(network, images, primary, y)[0]

        random_numbers, buffers = random_state(images.device), copy_of_buffers(network)
        total = total_loss(network)
        statistics = copy_of_buffers(network)

    # The look-ahead step (eq. 4)
    create_graph = method == "double-backward"
    gradient = torch.autograd.grad(total, theta1.values(), create_graph=create_graph, materialize_grads=True)
    theta1_plus = {name: (p - alpha * g).detach() for (name, p), g in zip(theta1.items(), gradient)}

    # L_pri(θ1⁺) (eq. 3) and v
    def look_ahead(network):
        weights = [weight.requires_grad_() for weight in theta1_plus.values()]
        lookahead_loss = loss(network, *(judged_on or (images, primary)))[0]
        v = torch.autograd.grad(lookahead_loss, [*weights, *theta1.values()], allow_unused=True)
        if any(gradient is not None for gradient in v[len(weights) :]):
            raise ValueError(
                "the forward uses weights that it does not look up in its modules (a list of its own, "
                "parametrize.cached(), a CUDA graph), so it cannot be run at θ1⁺"
            )
        return lookahead_loss.detach(), [torch.zeros_like(w) if g is None else g for w, g in zip(weights, v)]

    lookahead_loss, v = with_weights(network, theta1_plus, copy_of_buffers(network), look_ahead)
    numbers = {"lookahead_primary_loss": lookahead_loss}

    if method == "double-backward":
        by_labels = by_double_backward(gradient, y, v)
    else:
        with replay(random_numbers, images.device):
            by_labels, directional = by_forward_mode(total_loss, network, buffers, y, dict(zip(theta1, v)))
        numbers["forward_mode_error"] = directional_error(directional, gradient, v)

    objective = -alpha * (by_labels * labels).sum()  # has the gradient of L_pri(θ1⁺) with respect to θ2
    if entropy_weight is not None:
        negative = negative_entropy(labels)
        objective = objective + entropy_weight * negative
        numbers["mean_label_entropy"] = -negative.detach()
    gradients = torch.autograd.grad(objective, theta2, materialize_grads=True)
    put_back_buffers(network, statistics)  # gradient checkpointing runs layers again, which would update them again
    put_back_buffers(label_generator, label_statistics)
    return gradients, numbers


def directional_error(directional, gradient, v):
    """|D_v L - ⟨∇L, v⟩| / (‖∇L‖ ‖v‖): forward mode against reverse mode, at no extra pass. A 0-d float64 tensor.

    Rounding makes it about 1e-6 in fp32. It is larger where the second forward at θ1 did not repeat the first one (it
    counts calls, draws from a generator of its own, has hooks or `no_grad`): above 1e-4 use method="double-backward".
    It is relative to the whole loss, so an auxiliary loss of weight w wants a bound w times as large.
    """

    def inner(a, b):
        return torch.stack([torch.dot(x.flatten(), y.flatten()).double() for x, y in zip(a, b)]).sum()

    norms = (inner(gradient, gradient) * inner(v, v)).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return (directional - inner(gradient, v)).abs() / norms


# ------------------------------------------------------------------------------------------------
# Algorithm 1: the two training steps
# ------------------------------------------------------------------------------------------------


def multi_task_step(network, optimizer, images, primary, labels=None, loss=multi_task_loss, compare=None):
    """One update of θ1 (eq. 2) on given auxiliary labels, integers (B,) or soft float (B, K); without, Single's update.

    compare: called with (network, primary loss, auxiliary loss) before the update; its numbers are returned, too.
    Returns the step's numbers by name, 0-d tensors.
    """
    total, numbers = loss(network, images, primary, labels)
    compared = compare(network, numbers["primary_loss"], numbers["auxiliary_loss"]) if compare else {}
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return {name: number.detach() for name, number in numbers.items()} | compared


def auxiliary_training_step(
    network, label_generator, optimizer, images, primary, loss=multi_task_loss, compare=None
):  # fmt: skip
    """Algorithm 1's auxiliary-training step: one update of θ1 on both tasks (eq. 2), with θ2's labels.

    Returns the step's numbers by name, and each image's largest auxiliary class, int64 (B,).
    """
    with torch.no_grad():
        labels = label_generator(images, primary)
    numbers = multi_task_step(network, optimizer, images, primary, labels, loss, compare)
    return numbers | {"label_entropy": torch.special.entr(labels).sum(dim=1).mean()}, labels.argmax(dim=1)


def meta_training_step(network, label_generator, optimizer, label_optimizer, images, primary, **options):
    """Algorithm 1's meta-training step: one update of θ2 (eq. 5). Returns the step's numbers by name, 0-d tensors.

    optimizer: the multi-task network's, read for θ1 and α, not stepped. options, returns and errors: `meta_gradient`'s.
    Raises ValueError, too, where label_optimizer is not the label generator's.
    """
    with exact_arithmetic(images.device):
        gradients, numbers = meta_gradient(network, label_generator, optimizer, images, primary, **options)
    updated = held_by(label_optimizer)
    if updated & set(network.parameters()) or not updated & set(label_generator.parameters()):
        raise ValueError("label_optimizer has to hold weights of the label generator, none of the multi-task network")
    for parameter, gradient in zip((p for p in label_generator.parameters() if p.requires_grad), gradients):
        parameter.grad = gradient
    label_optimizer.step()
    return numbers


# ------------------------------------------------------------------------------------------------
# What keeps the meta-gradient right: refusals, weights swapped in, running statistics, random numbers, precision
# ------------------------------------------------------------------------------------------------


def check_networks(network, label_generator, optimizer):
    """α and θ1, {name: parameter}; raises ValueError for what would make the meta-gradient wrong without a word."""
    for module in (network, label_generator):
        for part in module.modules():
            if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
                raise ValueError(
                    f"the meta-gradient cannot be taken through {type(part).__name__}; give the network in it "
                    "(.module) and, with several processes, average the gradients that meta_gradient returns before "
                    "the update"
                )
        low = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
        if low:
            raise ValueError(f"a network has weights of type {low.pop()}, too coarse for the meta-gradient; use fp32")
    if {*network.parameters(), *network.buffers()} & {*label_generator.parameters(), *label_generator.buffers()}:
        raise ValueError("the multi-task network and the label generator share weights; give each a trunk of its own")
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if max(rates) - min(rates) > 1e-6 * max(rates):
        raise ValueError("the multi-task optimizer has several learning rates; eq. 4 has one step length α")
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError("the multi-task optimizer maximises (maximize=True); eq. 4 is a step of descent")
    held = held_by(optimizer)
    theta1 = {name: p for name, p in network.named_parameters() if p.requires_grad and p in held}
    if not theta1:
        raise ValueError("the multi-task optimizer holds no trainable weight of the multi-task network")
    return rates[0], theta1


def held_by(optimizer):
    """The parameters that an optimizer updates, a set."""
    return {p for group in optimizer.param_groups for p in group["params"]}


class RefuseLowPrecision(TorchFunctionMode):
    """Raises ValueError for autocast inside a forward, or anything else that computes in bf16 or fp16."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"a forward computes in {tensor.dtype}, and rounding ruins the meta-gradient; take autocast out of "
                    "the forward (autocast around the loop is allowed: this step turns it off)"
                )
        return result


class WithWeights(nn.Module):
    """Calls function(network). Through `functional_call`, it does so while other weights stand in the network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, function):
        return function(self.network)


def with_weights(network, weights, buffers, function):
    """function(network) while `weights` and `buffers`, {name: tensor}, stand in the network's place; others are fixed.

    The function also takes its gradients in there: gradient checkpointing runs layers again when a gradient is taken.
    """
    originals = dict(network.named_parameters()) | dict(network.named_buffers())
    weights = {name: p.detach() for name, p in network.named_parameters()} | weights
    new = {id(originals[name]): tensor for name, tensor in (weights | buffers).items()}
    tensors = {}
    # each module once, and each of its names: functional_call would put a module with two names back wrongly
    for prefix, module in network.named_modules(prefix="network"):
        own = {"recurse": False, "remove_duplicate": False}
        for name, tensor in [*module.named_parameters(**own), *module.named_buffers(**own)]:
            tensors[f"{prefix}.{name}"] = new.get(id(tensor), tensor)
    return functional_call(WithWeights(network), tensors, (function,), tie_weights=False)


def copy_of_buffers(module):
    """Copies of a module's buffers (BatchNorm's running statistics, say) by name."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@torch.no_grad()
def put_back_buffers(module, buffers):
    """Give a module's buffers the values of `buffers`."""
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])


def random_state(device):
    """The states of torch's default generators that a network on `device` draws from (dropout, stochastic depth)."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def replay(state, device):
    """Replay the random numbers from `state`; afterwards the generators go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield


@functools.cache
def load_forward_mode():
    """Use forward mode once: in its first use torch warns of its own use of torch.jit."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
        forward_ad.make_dual(torch.zeros(1), torch.ones(1))


@contextlib.contextmanager
def exact_arithmetic(device):
    """No autocast and no TF32, and attention by the one kernel that has all derivatives, whatever was set before."""
    before = [(kind, name, getattr(kind, name)) for kind, name, _ in rounding_switches()]
    for kind, name, exact in rounding_switches():
        setattr(kind, name, exact)
    try:
        with torch.autocast("cuda" if device.type == "cuda" else "cpu", enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for kind, name, value in before:
            setattr(kind, name, value)


def rounding_switches():
    """Torch's switches that let products in fp32 round: [(object, name of its attribute, value that forbids it)]."""
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch 2.9 and later
        kinds = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
        return [(kind, "fp32_precision", "ieee") for kind in kinds]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
