"""Table 1's backbones: VGG-16, the 4-layer ConvNet and ResNet-32, by name.

Each is a trunk as `maxl.Network` takes it: images (B, image_channels, 32, 32) -> features (B, feature_size). `width`
multiplies the channels; 1.0 is the network that Table 1's rows are read as.
"""

import torch.nn as nn
import torch.nn.functional as F

import utils


class Conv4(nn.Module):
    """The 4-layer ConvNet, read as the Conv-4 of the meta-learning literature (Vinyals et al., 2016).

    Four times a 3x3 convolution of 64 filters -> BatchNorm -> ReLU -> 2x2 max-pooling; 256 features of 32x32 pixels.
    Raises ValueError for images of another size.
    """

    def __init__(self, width=1.0, image_channels=3):
        super().__init__()
        channels, layers = max(1, round(64 * width)), []
        for channels_in in (image_channels, channels, channels, channels):
            layers += [
                nn.Conv2d(channels_in, channels, kernel_size=3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
        self.layers = nn.Sequential(*layers)
        self.feature_size = 4 * channels

    def forward(self, images):
        if images.shape[-2:] != (32, 32):
            raise ValueError(f"Conv4 takes images of 32x32 pixels, these have {images.shape[-2]}x{images.shape[-1]}")
        return self.layers(images).flatten(1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (He et al., 2016, option A).

    Where the block halves the image, the shortcut takes every second pixel; new channels of it are zero.
    """

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels_in, channels, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.stride, self.new_channels = stride, channels - channels_in

    def forward(self, x):
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(self.layers(x) + shortcut, inplace=True)


class ResNet32(nn.Module):
    """ResNet-32 for small images (He et al., 2016, section 4.2), any image size.

    A 3x3 convolution of 16 filters, three stages of 5 blocks with 16, 32 and 64 channels, the second and third halving
    the image, and the mean over what is left of it: 64 features.
    """

    def __init__(self, width=1.0, image_channels=3):
        super().__init__()
        first, *_, last = sizes = [max(1, round(channels * width)) for channels in (16, 32, 64)]
        layers = [
            nn.Conv2d(image_channels, first, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(inplace=True),
        ]
        channels_in = first
        for stage, channels in enumerate(sizes):
            for block in range(5):
                layers.append(BasicBlock(channels_in, channels, stride=2 if stage > 0 and block == 0 else 1))
                channels_in = channels
        self.layers = nn.Sequential(*layers)
        self.feature_size = last

    def forward(self, images):
        return self.layers(images).mean(dim=(2, 3))


BACKBONES = {"vgg16": utils.VGG16, "conv4": Conv4, "resnet32": ResNet32}
