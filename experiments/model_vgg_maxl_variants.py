"""MAXL with one thing changed: five of the variations that the paper reports as not successful (Appendix E).

    python -m experiments.model_vgg_maxl_variants --variant no-mask           # 20 classes, psi[i] = 5
    python -m experiments.model_vgg_maxl_variants --variant latent --latent-size 50
    python -m experiments.model_vgg_maxl_variants --variant validation --quick

What is changed, and what the paper leaves open and is chosen here:

cross-entropy   in place of the focal loss, in all three losses: its γ is 0 (eq. 1).
no-mask         a plain SoftMax over all auxiliary classes in place of Mask SoftMax (eq. 6).
latent          the label generator gives a vector, which the auxiliary head regresses (mean squared error); as many
                numbers as auxiliary classes; no entropy loss, which is of a distribution.
same-iteration  an epoch is one pass, and each batch updates both networks, the multi-task network first; before the
                test BatchNorm's statistics settle in a pass that changes no weights, as they do in MAXL's second pass.
validation      the label generator is judged on a tenth of the training images, held out, augmented alike, on which the
                multi-task network never trains.

All else is model_vgg_maxl.py's, the initial weights from a seed too. Not yet run at full length.
"""

import sys

import torch
import torch.nn as nn

import create_dataset
import model_vgg_human
import model_vgg_maxl
import utils
from experiments.maxl_variations import (
    LatentGenerator,
    UnmaskedLabelGenerator,
    both_steps,
    endless_batches,
    hold_out,
    latent_meta_step,
    latent_training_step,
    on_held_out,
    validation_meta_step,
)
from harness.acceleration import Acceleration, in_fp32, select_device
from harness.command_line import add_psi, check_psi, make_parser, parse_settings
from harness.exits import InputError, run_main
from harness.run import Run
from model_vgg_maxl import LabelGenerator, auxiliary_training_step, meta_epoch, meta_training_step, train_epoch

VARIANTS = ("cross-entropy", "no-mask", "latent", "same-iteration", "validation")
SETTINGS = {name: value for name, value in model_vgg_maxl.SETTINGS.items() if name != "meta_gradient"}
OWN = {"latent_size": "latent", "validation_share": "validation"}  # settings of one variant alone
VALIDATION_SHARE = 0.1  # of the training images; the paper does not say how many
STEPS = {  # for θ1 and θ2, where they are not MAXL's
    "latent": (latent_training_step, latent_meta_step),
    "validation": (auxiliary_training_step, validation_meta_step),
}


def make_label_generator(variant, trunk, psi, latent_size):
    """g_θ2 of the variant."""
    if variant == "latent":
        return LatentGenerator(trunk, latent_size)
    return (UnmaskedLabelGenerator if variant == "no-mask" else LabelGenerator)(trunk, psi)


def parse(argv=None):
    """The command line's settings. Raises InputError where ψ does not fit, and for an option of another variant."""
    parser = make_parser(__doc__)
    add_psi(parser)
    add = parser.add_argument
    add("--variant", required=True, choices=VARIANTS, help="what is changed, see above")
    add("--latent-size", type=int, metavar="N", help="numbers of latent's vector (default: sum(psi))")
    add(
        "--validation-share", type=float, metavar="F",
        help=f"share of the training images that validation holds out (default: {VALIDATION_SHARE})",
    )  # fmt: skip
    settings = parse_settings(parser, SETTINGS, argv)
    level = settings.primary_level
    check_psi(settings.psi, create_dataset.LEVEL_CLASSES[level], f"primary level {level}")
    for name, variant in OWN.items():
        if getattr(settings, name) is not None and settings.variant != variant:
            raise InputError(f"--{name.replace('_', '-')} is an option of --variant {variant} alone; leave it out")
    if settings.variant == "cross-entropy":
        settings.focal_gamma = 0.0  # -y (1 - p)^0 log p
    if settings.variant == "latent":
        check_latent_size(settings)
    if settings.variant == "validation":
        check_validation_share(settings)
    return settings


def check_latent_size(settings):
    """Set it where it is not given: the auxiliary heads are then as large as MAXL's."""
    if settings.latent_size is None:
        settings.latent_size = sum(settings.psi)
    if not 1 <= settings.latent_size <= 10_000:
        raise InputError(f"--latent-size {settings.latent_size} is out of range; give 1 to 10000")


def check_validation_share(settings):
    """Set it where it is not given; raises InputError where one of the two parts has too few images for a batch."""
    if settings.validation_share is None:
        settings.validation_share = VALIDATION_SHARE
    share, count = settings.validation_share, settings.train_images or create_dataset.SIZES[settings.dataset][0]
    if not 0 < share < 1:
        raise InputError(f"--validation-share {share} is out of range; give a number between 0 and 1, such as 0.1")
    held, least = round(share * count), settings.batch_size
    if held < 2 or count - held < least:
        raise InputError(
            f"--validation-share {share} parts {count} training images into {count - held} and {held}; "
            f"at least {least} have to be left to train on and 2 to be held out"
        )


def main(argv=None):
    settings = parse(argv)
    device = select_device(settings.device)
    fast = Acceleration(device, settings.precision, settings.channels_last, settings.cuda_graphs)
    variant, level, psi, gamma = settings.variant, settings.primary_level, settings.psi, settings.focal_gamma
    run = Run("experiments.model_vgg_maxl_variants", f"{variant}-{len(psi)}-{sum(psi)}", settings, argv)
    train, test = create_dataset.load(
        settings.dataset, settings.data_root, device, settings.train_images, settings.seed, settings.channels_last
    )
    if variant == "validation":
        train, held_out = hold_out(train, settings.validation_share, settings.seed)
    passes = 1 if variant == "same-iteration" else 2

    torch.manual_seed(settings.seed)
    size = settings.latent_size or sum(psi)  # of the auxiliary head's output
    network = utils.Network(utils.Backbone(settings.width), len(psi), size)
    fast.place(utils.initialise(network, nn.init.xavier_uniform_))
    label_generator = make_label_generator(variant, utils.Backbone(settings.width), psi, size)
    fast.place(utils.initialise(label_generator, nn.init.xavier_normal_))
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.learning_rate)
    label_optimizer = torch.optim.SGD(
        label_generator.parameters(), lr=settings.label_learning_rate, weight_decay=settings.label_weight_decay
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.halve_every, gamma=0.5)
    label_scheduler = torch.optim.lr_scheduler.StepLR(label_optimizer, settings.halve_every, gamma=0.5)
    generator = torch.Generator().manual_seed(settings.seed)
    low, low_generator = fast.lower(network), fast.lower(label_generator)
    auxiliary_step, meta_step = STEPS.get(variant, (auxiliary_training_step, meta_training_step))
    auxiliary_step, meta_step = fast.capture(auxiliary_step), fast.capture(in_fp32(device)(meta_step))
    options = {"gamma": gamma} | ({} if variant == "latent" else {"entropy_weight": settings.entropy_weight})

    @torch.no_grad()
    def latents(images, targets):
        return low_generator(images, targets[:, level])

    for epoch in run.epochs(
        passes * train.iterations(settings.batch_size), device,
        network=network, optimizer=optimizer, scheduler=scheduler,
        label_generator=label_generator, label_optimizer=label_optimizer, label_scheduler=label_scheduler,
        generator=generator,
    ):  # fmt: skip
        row = {
            "learning_rate": optimizer.param_groups[0]["lr"],
            "label_learning_rate": label_optimizer.param_groups[0]["lr"],
        }
        batches, meter = train.train_batches(settings.batch_size, generator), run.meter("train")
        if variant == "latent":
            row |= model_vgg_human.train_epoch(
                low, optimizer, batches, level, latents, gamma, meter, auxiliary_step, settings.cosine_every
            )
        else:
            step = auxiliary_step
            if variant == "same-iteration":
                step = both_steps(auxiliary_step, meta_step, network, label_generator, label_optimizer, **options)
            row |= train_epoch(
                low, low_generator, optimizer, batches, level, meter,
                gamma=gamma, cosine_every=settings.cosine_every, step=step,
            )  # fmt: skip
        if variant != "same-iteration":
            batches, step = train.train_batches(settings.batch_size, generator), meta_step
            if variant == "validation":
                step = on_held_out(meta_step, endless_batches(held_out, settings.batch_size, generator), level)
            parts = network, label_generator, optimizer, label_optimizer
            row |= meta_epoch(*parts, batches, level, run.meter("meta"), step, **options)
        else:  # as all others' second pass does
            utils.settle_statistics(low, train, settings.batch_size, seed=settings.seed + epoch)
        row |= utils.evaluate(low, test, [level], gamma)
        scheduler.step()
        label_scheduler.step()
        run.end_epoch(row)


if __name__ == "__main__":
    sys.exit(run_main(main))
