"""Iterations per second of BigGAN's training, against plain PyTorch.

  python -m benchmarks.biggan [--rounds 7] [--threads 2] [--cases digits small …]

The rivals, each in a process of its own; turns alternate in order, so that what else
the machine does meets both:
  ours         `recipe.make_step` as `generate` trains
  torch        PyTorch eager: same networks, batches and arithmetic

A case is networks and a batch: `digits` those of experiments/digits_biggan.py, `small`
for 32x32x3 with a quarter of the base config's channels, `cifar10` with all. An
iteration: the updates of D, each on its part of the batch, one of G, the average of G
with its state. Spectral norms by one power iteration a call; no augmentation, all in
float32. The same number of parameters is asserted. PyTorch draws from one stream in
place of a key an image, and has its own spectral norm and fused Adam. What is measured
before the first turn is compilation, and for PyTorch the first iteration. Figures are
medians with their range; ratios are of the turns of one round, ours over the rival's.
"""

import copy

from benchmarks import rivals

# Data set, channels (None: of the experiment), images of an iteration, how many a turn.
CASES = {
  'digits': ('digits', None, None, 20),
  'small': ('cifar10', 16, 64, 2),
  'cifar10': ('cifar10', 64, 200, 1),
}


def make_settings(case):
  """(`config.generator`, the data set's info)."""
  from experiments import cifar10_biggan, digits_biggan
  from jaxrobust.config import dataset_info

  dataset, channels, batch_size, _ = CASES[case]
  experiment = {'digits': digits_biggan, 'cifar10': cifar10_biggan}[dataset]
  settings = experiment.get_config().unlock().generator
  settings.training.augmentation.kind = 'none'
  if channels:
    settings.network.channels = channels
    settings.training.batch_size = batch_size
  part = settings.training.batch_size // settings.training.discriminator_steps
  settings.training.batch_norm_group = part
  return settings, dataset_info.INFO[dataset]


def jax_iteration(settings, info):
  """A function that makes an iteration, and the numbers of parameters."""
  import jax
  import numpy as np

  from jaxrobust.data import pipeline
  from jaxrobust.distributed import parallel
  from jaxrobust.generators import recipe as recipes
  from jaxrobust.generators.biggan import BigGAN

  recipe = BigGAN.recipe(settings, info)
  fresh = jax.jit(lambda: recipes.init_state(recipe, 0))()
  counts = [
    sum(x.size for x in jax.tree.leaves(fresh.params[name]))
    for name in ('generator', 'discriminator')
  ]
  state, step_fn = parallel.replicate(fresh), recipes.make_step(recipe, 0, 0)
  rng, size = np.random.RandomState(0), settings.training.batch_size
  batch = pipeline.Batch(
    rng.randint(0, 256, (size, *info.image_shape)).astype(np.uint8),
    rng.randint(0, info.num_classes, size).astype(np.int32),
    np.zeros(size, bool),
    np.arange(size, dtype=np.int32),
  )

  def iterate():
    nonlocal state
    state, metrics = step_fn(state, parallel.shard(batch))
    jax.block_until_ready(metrics)

  return iterate, counts


def torch_iteration(settings, info):
  """The same in PyTorch."""
  import torch
  from torch.nn import functional

  torch.manual_seed(0)
  training, network = settings.training, settings.network
  generator, discriminator = torch_networks(network, info)
  average = copy.deepcopy(generator)
  pairs = [
    list(zip(*(x() for x in get), strict=True))
    for get in (
      (average.parameters, generator.parameters),
      (average.buffers, generator.buffers),
    )
  ]
  pairs = [(a, b) for group in pairs for a, b in group if a.is_floating_point()]
  adams = [
    torch.optim.Adam(
      x.parameters(), rate, (training.b1, training.b2), training.epsilon, fused=True
    )
    for x, rate in (
      (generator, training.generator_learning_rate),
      (discriminator, training.discriminator_learning_rate),
    )
  ]
  height, width, channels = info.image_shape
  size, parts = training.batch_size, training.discriminator_steps
  images = torch.randint(0, 256, (size, channels, height, width)).to(torch.uint8)
  labels = torch.randint(0, info.num_classes, (size,))

  def fakes():
    count = size // parts
    classes = torch.randint(0, info.num_classes, (count,))
    return generator(torch.randn(count, network.latent_size), classes), classes

  def iterate():
    for part in range(parts):
      with torch.no_grad():
        fake, classes = fakes()
      real = images[part::parts].float() / 127.5 - 1
      logits = discriminator(
        torch.cat([real, fake]), torch.cat([labels[part::parts], classes])
      )
      on_real, on_fake = logits.chunk(2)
      loss = functional.relu(1 - on_real).mean() + functional.relu(1 + on_fake).mean()
      adams[1].zero_grad()
      loss.backward()
      adams[1].step()
    discriminator.requires_grad_(False)
    loss = -discriminator(*fakes()).mean()
    adams[0].zero_grad()
    loss.backward()
    adams[0].step()
    discriminator.requires_grad_(True)
    with torch.no_grad():
      torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), 1 - training.ema_decay)
    return loss.item()

  counts = [sum(p.numel() for p in x.parameters()) for x in (generator, discriminator)]
  return iterate, counts


def torch_networks(network, info):
  """G and D of jaxrobust.generators.biggan.networks as modules of PyTorch."""
  import torch
  from torch import nn
  from torch.nn import functional
  from torch.nn.utils.parametrizations import spectral_norm

  channels = info.image_shape[2]
  conv = lambda before, after, size: spectral_norm(
    nn.Conv2d(before, after, size, padding=size // 2)
  )

  class Norm(nn.Module):
    def __init__(self, features):
      super().__init__()
      self.norm = nn.BatchNorm2d(features, affine=False)
      self.gain, self.bias = (
        nn.Embedding(info.num_classes, features) for _ in range(2)
      )

    def forward(self, x, classes):
      gain, bias = (y(classes)[:, :, None, None] for y in (self.gain, self.bias))
      return self.norm(x) * (1 + gain) + bias

  class Up(nn.Module):
    def __init__(self, before, after):
      super().__init__()
      self.norms = nn.ModuleList([Norm(before), Norm(after)])
      self.convs = nn.ModuleList([conv(before, after, 3), conv(after, after, 3)])
      self.shortcut = conv(before, after, 1)

    def forward(self, x, classes):
      double = lambda x: functional.interpolate(x, scale_factor=2.0)
      y = self.convs[0](double(self.norms[0](x, classes).relu()))
      y = self.convs[1](self.norms[1](y, classes).relu())
      return y + double(self.shortcut(x))

  class Generator(nn.Module):
    def __init__(self):
      super().__init__()
      widths = [network.channels * x for x in network.multipliers]
      self.shape = (
        widths[0],
        *(x >> (len(widths) - 1) for x in info.image_shape[:2]),
      )
      self.linear = spectral_norm(
        nn.Linear(network.latent_size, self.shape[0] * self.shape[1] * self.shape[2])
      )
      self.blocks = nn.ModuleList(map(Up, widths[:-1], widths[1:]))
      self.norm, self.last = nn.BatchNorm2d(widths[-1]), conv(widths[-1], channels, 3)

    def forward(self, latents, classes):
      x = self.linear(latents).view(-1, *self.shape)
      for block in self.blocks:
        x = block(x, classes)
      return self.last(self.norm(x).relu()).tanh()

  class Down(nn.Module):
    def __init__(self, before, after, halves, activates):
      super().__init__()
      self.halves, self.activates = halves, activates
      self.convs = nn.ModuleList([conv(before, after, 3), conv(after, after, 3)])
      learned = halves or before != after
      self.shortcut = conv(before, after, 1) if learned else nn.Identity()

    def forward(self, x):
      half = lambda x: functional.avg_pool2d(x, 2) if self.halves else x
      y = self.convs[0](x.relu() if self.activates else x)
      return half(self.convs[1](y.relu())) + self.shortcut(half(x))

  class Discriminator(nn.Module):
    def __init__(self):
      super().__init__()
      widths = [channels] + [
        network.channels * x for x in network.discriminator_multipliers
      ]
      self.blocks = nn.Sequential(
        *(
          Down(*widths[i : i + 2], i < network.discriminator_halvings, i > 0)
          for i in range(len(widths) - 1)
        )
      )
      self.linear = spectral_norm(nn.Linear(widths[-1], 1))
      self.embed = spectral_norm(nn.Embedding(info.num_classes, widths[-1]))

    def forward(self, images, classes):
      x = self.blocks(images).relu().sum((2, 3))
      return self.linear(x)[:, 0] + (self.embed(classes) * x).sum(1)

  torch.set_grad_enabled(True)
  return Generator(), Discriminator()


def make(rival, case):
  """The iteration of a rival, and its numbers of parameters."""
  iteration = {'ours': jax_iteration, 'torch': torch_iteration}[rival]
  iterate, counts = iteration(*make_settings(case))
  return {'training': rivals.Task(iterate, CASES[case][-1])}, counts


def main():
  parser = rivals.parser(__doc__, CASES, ['digits', 'small'], rounds=7, threads=2)
  args = parser.parse_args()
  print(f'{args.threads} threads, {args.rounds} rounds')
  for case in args.cases:
    names = ['ours', 'torch']
    found, counts = rivals.measure(make, names, case, args.threads, args.rounds)
    print(f'{case}, {counts[0]:,} + {counts[1]:,} parameters')
    for rival, times in found['training'].items():
      rates = rivals.spread([CASES[case][-1] / wall for wall, _ in times.turns], '.2f')
      print(
        f'  {rival:<6} {rates} iterations/s; first one {times.first[0]:.1f} s, '
        f'{times.first[1]:.1f} s of processor time'
      )
    for ratio in rivals.ratios(found['training']['torch'], found['training']['ours']):
      print(f'  ours over torch {ratio}', flush=True)


if __name__ == '__main__':
  main()
