"""The two networks in PyTorch, written from their descriptions, to compare with.

Names of modules are those of the released PyTorch files. The map that is left is
averaged whole, whatever its size.
"""

import torch
from torch import nn
from torch.nn import functional


class Normalised(nn.Module):
  """Pads and normalises images [B, C, H, W] in [0, 1]; not part of the state dict."""

  def __init__(self, mean, std, padding):
    super().__init__()
    for name, values in (('shift', mean), ('scale', std)):
      tensor = torch.tensor(values).reshape(1, -1, 1, 1)
      self.register_buffer(name, tensor, persistent=False)
    self.padding = padding

  def normalise(self, images):
    return (functional.pad(images, 4 * [self.padding]) - self.shift) / self.scale


def same(images, stride):
  """TensorFlow's padding of a 3x3 kernel on even sizes: less before than after."""
  return functional.pad(images, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))


def conv(inputs, outputs, size=3, stride=1):
  return nn.Conv2d(inputs, outputs, size, stride, bias=False)


class WideBlock(nn.Module):
  def __init__(self, inputs, outputs, stride, project, activation):
    super().__init__()
    self.stride, self.activation = stride, activation
    self.batchnorm_0 = nn.BatchNorm2d(inputs)
    self.conv_0 = conv(inputs, outputs, stride=stride)
    self.batchnorm_1 = nn.BatchNorm2d(outputs)
    self.conv_1 = conv(outputs, outputs)
    self.shortcut = conv(inputs, outputs, 1, stride) if project else None

  def forward(self, x):
    y = self.activation(self.batchnorm_0(x))
    if self.shortcut is not None:
      x = self.shortcut(y)
    y = self.activation(self.batchnorm_1(self.conv_0(same(y, self.stride))))
    return x + self.conv_1(same(y, 1))


class WideGroup(nn.Module):
  def __init__(self, blocks):
    super().__init__()
    self.block = nn.Sequential(*blocks)

  def forward(self, x):
    return self.block(x)


class WideResNet(Normalised):
  """The first block of a group projects, as in Haiku, or only where channels change."""

  def __init__(
    self, depth, width, num_classes, channels, mean, std, padding, activation,
    always_project=True,
  ):  # fmt: skip
    super().__init__(mean, std, padding)
    self.activation = activation
    self.init_conv = conv(channels, 16)
    groups, inputs = [], 16
    for outputs, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
      project = always_project or inputs != outputs
      blocks = [WideBlock(inputs, outputs, stride, project, activation)]
      for _ in range((depth - 4) // 6 - 1):
        blocks.append(WideBlock(outputs, outputs, 1, False, activation))
      groups.append(WideGroup(blocks))
      inputs = outputs
    self.layer = nn.Sequential(*groups)
    self.batchnorm = nn.BatchNorm2d(inputs)
    self.logits = nn.Linear(inputs, num_classes)

  def forward(self, images):
    x = self.layer(self.init_conv(same(self.normalise(images), 1)))
    return self.logits(self.activation(self.batchnorm(x)).mean((2, 3)))


class PreActBlock(nn.Module):
  def __init__(self, inputs, outputs, stride, activation):
    super().__init__()
    self.stride, self.activation = stride, activation
    self.batchnorm_0 = nn.BatchNorm2d(inputs)
    self.conv_2d_1 = conv(inputs, outputs, stride=stride)
    self.batchnorm_1 = nn.BatchNorm2d(outputs)
    self.conv_2d_2 = conv(outputs, outputs)
    if stride != 1 or inputs != outputs:
      self.shortcut = conv(inputs, outputs, stride=stride)

  def forward(self, x):
    y = same(self.activation(self.batchnorm_0(x)), self.stride)
    if hasattr(self, 'shortcut'):
      x = self.shortcut(same(x, self.stride))
    y = self.activation(self.batchnorm_1(self.conv_2d_1(y)))
    return x + self.conv_2d_2(same(y, 1))


class PreActResNet18(Normalised):
  def __init__(self, num_classes, channels, mean, std, padding, activation):
    super().__init__(mean, std, padding)
    self.activation = activation
    self.conv_2d = conv(channels, 64)
    inputs = 64
    for i, outputs in enumerate((64, 128, 256, 512)):
      first = PreActBlock(inputs, outputs, 1 if i == 0 else 2, activation)
      second = PreActBlock(outputs, outputs, 1, activation)
      self.add_module(f'layer_{i}', nn.Sequential(first, second))
      inputs = outputs
    self.batchnorm = nn.BatchNorm2d(inputs)
    self.logits = nn.Linear(inputs, num_classes)

  def forward(self, images):
    x = self.conv_2d(same(self.normalise(images), 1))
    for i in range(4):
      x = getattr(self, f'layer_{i}')(x)
    return self.logits(self.activation(self.batchnorm(x)).mean((2, 3)))


def build(name, **settings):
  """The network of a name as in `jaxrobust.models.build`, ready to infer."""
  if name == 'preact-resnet-18':
    return PreActResNet18(**settings).eval()
  _, depth, width = name.split('-')
  return WideResNet(int(depth), int(width), **settings).eval()
