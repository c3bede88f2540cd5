"""Iterations a second of StyleGAN2 in training, against a plain PyTorch network.

  python -m benchmarks.stylegan2 [--rounds 5] [--threads 1] [--cases digits]

The rivals, each in a process of its own, take turns in alternating order, so that what
else the machine does meets both:
  ours         `recipe.make_step` as `generate` trains
  torch        PyTorch eager: the same networks, batch and arithmetic

A turn is of whole intervals of R1: so many updates of G and of D, and their share of
R1's by a second derivative, with Adam and averaged parameters. A case is a network:
`digits` that of experiments/digits_stylegan2.py, `small` for 32x32x3 with 64 channels.
Both without augmentation and in float32; the numbers of parameters are asserted to be
equal. Compilation is measured apart. PyTorch draws from one stream in place of a key an
image. Figures are medians with their range; ratios are of the turns of one round.
"""

import copy

from benchmarks import rivals

# Data set, channels (None: the experiment's), intervals of R1 in a turn.
CASES = {'digits': ('digits', None, 4), 'small': ('cifar10', 64, 1)}


def make_settings(dataset, channels):
  """(`config.generator`, the data set's info)."""
  from experiments import digits_stylegan2
  from jaxrobust.config import dataset_info

  settings = digits_stylegan2.get_config().unlock().generator
  settings.training.augmentation.kind = 'none'
  if channels:
    settings.network.channels_max = channels
  return settings, dataset_info.INFO[dataset]


def jax_task(settings, info):
  """A function that makes an iteration, and the number of parameters."""
  import jax
  import numpy as np

  from jaxrobust.data import pipeline
  from jaxrobust.distributed import parallel
  from jaxrobust.generators import recipe as recipes
  from jaxrobust.generators.stylegan2 import StyleGAN2

  recipe = StyleGAN2.recipe(settings, info)
  fresh = jax.jit(lambda: recipes.init_state(recipe, 0))()
  num_params = sum(x.size for x in jax.tree.leaves(fresh.params))
  state, step_fn = parallel.replicate(fresh), recipes.make_step(recipe, 0, 0)
  rng, size = np.random.RandomState(0), settings.training.batch_size
  batch = pipeline.Batch(
    rng.randint(0, 256, (size, *info.image_shape)).astype(np.uint8),
    rng.randint(0, 10, size).astype(np.int32),
    np.zeros(size, bool),
    np.arange(size, dtype=np.int32),
  )

  def train():
    nonlocal state
    state, metrics = step_fn(state, parallel.shard(batch))
    jax.block_until_ready(metrics)

  return train, num_params


def torch_task(settings, info):
  """The same in PyTorch."""
  import torch
  from torch.nn import functional

  torch.manual_seed(0)
  training, size = settings.training, settings.training.batch_size
  generator, discriminator = torch_networks(settings.network, info)
  average = copy.deepcopy(generator)
  adams = [
    torch.optim.Adam(
      network.parameters(),
      training.learning_rate * k / (k + 1),
      (0.0, training.b2 ** (k / (k + 1))),
      fused=True,
    )
    for network, k in (
      (generator, training.path_length_interval_steps),
      (discriminator, training.r1_interval_steps),
    )
  ]
  height, width, channels = info.image_shape
  images = torch.randint(0, 256, (size, channels, height, width), dtype=torch.uint8)
  one_hot = functional.one_hot(torch.randint(0, 10, (size,)), 10).float()
  count = 0

  def update(index, loss):
    adams[index].zero_grad()
    loss.backward()
    adams[index].step()
    return loss.item()

  def draw():
    return generator(torch.randn(size, settings.network.latent_size), one_hot)

  def train():
    nonlocal count
    discriminator.requires_grad_(False)
    update(0, functional.softplus(-discriminator(draw(), one_hot)).mean())
    discriminator.requires_grad_(True)
    real = images.float() / 127.5 - 1
    with torch.no_grad():
      fake = draw()
    update(
      1,
      functional.softplus(discriminator(fake, one_hot)).mean()
      + functional.softplus(-discriminator(real, one_hot)).mean(),
    )
    if count % training.r1_interval_steps == 0:
      real.requires_grad_(True)
      logits = discriminator(real, one_hot).sum()
      (gradient,) = torch.autograd.grad(logits, real, create_graph=True)
      penalty = gradient.square().sum((1, 2, 3)).mean()
      update(1, penalty * training.r1_gamma / 2 * training.r1_interval_steps)
    with torch.no_grad():
      pairs = list(average.parameters()), list(generator.parameters())
      torch._foreach_lerp_(*pairs, 0.01)
    count += 1

  networks = generator, discriminator
  return train, sum(p.numel() for x in networks for p in x.parameters())


def torch_networks(settings, info):
  """G and D of jaxrobust.generators.stylegan2 as modules of PyTorch."""
  import torch
  from torch import nn
  from torch.nn import functional

  taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
  fir = torch.outer(taps, taps)
  width = lambda side: min(settings.channels_base // side, settings.channels_max)
  resolution, channels = info.image_shape[1:]
  activate = lambda x: functional.leaky_relu(x, 0.2) * 2**0.5
  normalise = lambda x: x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()

  def filtered(x, pads, gain=1.0, down=1):
    kernel = (gain * fir).expand(x.shape[1], 1, 4, 4)
    x = functional.pad(x, (*pads, *pads))
    return functional.conv2d(x, kernel, stride=down, groups=x.shape[1])

  def upsampled(x, pads):
    batch, count, height, size = x.shape
    zeros = x.new_zeros(batch, count, height, 2, size, 2)
    zeros[:, :, :, 0, :, 0] = x
    return filtered(zeros.reshape(batch, count, 2 * height, 2 * size), pads, 4.0)

  class Linear(nn.Module):
    def __init__(self, before, after, multiplier=1.0, offset=0.0):
      super().__init__()
      self.weight = nn.Parameter(torch.randn(after, before) / multiplier)
      self.bias = nn.Parameter(torch.full((after,), offset))
      self.multiplier = multiplier

    def forward(self, x):
      scale = self.multiplier / self.weight.shape[1] ** 0.5
      return functional.linear(x, self.weight * scale, self.bias * self.multiplier)

  class Conv(nn.Module):
    def __init__(self, before, after, size, down=False):
      super().__init__()
      self.weight = nn.Parameter(torch.randn(after, before, size, size))
      self.bias = nn.Parameter(torch.zeros(after))
      self.down = down

    def forward(self, x):
      size = self.weight.shape[-1]
      weight = self.weight / (size * self.weight.shape[1] ** 0.5)
      if self.down:
        x = functional.conv2d(filtered(x, (2, 2)), weight, self.bias, 2)
      else:
        x = functional.conv2d(x, weight, self.bias, padding=size // 2)
      return activate(x)

  class Styled(nn.Module):
    def __init__(self, before, after, up=False):
      super().__init__()
      self.style = Linear(settings.style_size, before, offset=1.0)
      self.weight = nn.Parameter(torch.randn(after, before, 3, 3))
      self.bias = nn.Parameter(torch.zeros(after))
      self.strength = nn.Parameter(torch.zeros(()))
      self.up = up

    def forward(self, x, style):
      scales = self.style(style)
      norms = scales.square() @ self.weight.square().sum((2, 3)).T
      x = x * scales[:, :, None, None]
      if self.up:
        x = functional.conv2d(upsampled(x, (3, 2)), self.weight)
      else:
        x = functional.conv2d(x, self.weight, padding=1)
      x = x * (norms + 1e-8).rsqrt()[:, :, None, None]
      x = x + self.strength * torch.randn_like(x[:, :1])
      return activate(x + self.bias[:, None, None])

  class ToImage(nn.Module):
    def __init__(self, before):
      super().__init__()
      self.style = Linear(settings.style_size, before, offset=1.0)
      self.weight = nn.Parameter(torch.randn(channels, before, 1, 1))
      self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x, style):
      scales = self.style(style) / x.shape[1] ** 0.5
      x = functional.conv2d(x * scales[:, :, None, None], self.weight)
      return x + self.bias[:, None, None]

  def mlp(sizes):
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return nn.ModuleList([Linear(*pair, multiplier=0.01) for pair in pairs])

  def through(layers, x):
    for layer in layers:
      x = activate(layer(x))
    return x

  class Generator(nn.Module):
    def __init__(self):
      super().__init__()
      style = settings.style_size
      self.embed = Linear(10, style)
      first = settings.latent_size + style
      self.mapping = mlp([first] + [style] * settings.mapping_layers)
      self.constant = nn.Parameter(torch.randn(1, width(4), 4, 4))
      self.first, self.first_image = Styled(width(4), width(4)), ToImage(width(4))
      self.blocks, side = nn.ModuleList(), 8
      while side <= resolution:
        block = [Styled(width(side // 2), width(side), True)]
        block += [Styled(width(side), width(side)), ToImage(width(side))]
        self.blocks.append(nn.ModuleList(block))
        side *= 2

    def forward(self, latents, one_hot):
      x = torch.cat([normalise(latents), normalise(self.embed(one_hot))], 1)
      style = through(self.mapping, x)
      x = self.first(self.constant.expand(len(style), -1, -1, -1), style)
      image = self.first_image(x, style)
      for up, conv, to_image in self.blocks:
        x = conv(up(x, style), style)
        image = upsampled(image, (2, 1)) + to_image(x, style)
      return image

  class Discriminator(nn.Module):
    def __init__(self):
      super().__init__()
      parts, side = [Conv(channels, width(resolution), 1)], resolution
      while side > 4:
        parts += [Conv(width(side), width(side), 3)]
        parts += [Conv(width(side), width(side // 2), 3, True)]
        side //= 2
      self.features = nn.Sequential(*parts)
      last = width(4)
      self.conv = Conv(last + 1, last, 3)
      self.linear, self.out = Linear(16 * last, last), Linear(last, last)
      self.embed = Linear(10, last)
      self.mapping = mlp([last] * (settings.discriminator_mapping_layers + 1))

    def forward(self, images, one_hot):
      x = self.features(images)
      groups = x.reshape(-1, settings.stddev_group, *x.shape[1:])
      deviation = (groups.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
      deviation = deviation.repeat_interleave(settings.stddev_group)
      deviation = deviation[:, None, None, None].expand(-1, 1, 4, 4)
      x = self.conv(torch.cat([x, deviation], 1)).flatten(1)
      x = self.out(activate(self.linear(x)))
      known = through(self.mapping, normalise(self.embed(one_hot)))
      return (x * known).sum(1) / x.shape[1] ** 0.5

  return Generator(), Discriminator()


def make(rival, case):
  """The iteration of a rival, and its number of parameters."""
  dataset, channels, intervals = CASES[case]
  settings, info = make_settings(dataset, channels)
  train, num_params = {'ours': jax_task, 'torch': torch_task}[rival](settings, info)
  steps = settings.training.r1_interval_steps
  return {'training': rivals.Task(train, intervals * steps, steps - 1)}, num_params


def main():
  parser = rivals.parser(__doc__, CASES, ['digits'], rounds=5, threads=1)
  args = parser.parse_args()
  print(f'{args.threads} threads, {args.rounds} rounds')
  for case in args.cases:
    dataset, channels, intervals = CASES[case]
    settings, _ = make_settings(dataset, channels)
    steps = intervals * settings.training.r1_interval_steps
    names = ['ours', 'torch']
    found, num_params = rivals.measure(make, names, case, args.threads, args.rounds)
    print(f'{case}, {num_params:,} parameters')
    for rival, times in found['training'].items():
      rates = rivals.spread([steps / wall for wall, _ in times.turns], '.1f')
      used = rivals.spread([1e3 * cpu / steps for _, cpu in times.turns], '.1f')
      line = f'  {rival:<6} {rates} iterations/s, {used} ms of processor time'
      print(f'{line}; the first took {times.first[0]:.1f} s')
    for ratio in rivals.ratios(found['training']['torch'], found['training']['ours']):
      print(f'  ours over torch {ratio}', flush=True)


if __name__ == '__main__':
  main()
