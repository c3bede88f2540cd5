"""Images per second of diffusion models, sampled and in training, against PyTorch.

  python -m benchmarks.diffusion [--rounds 7] [--threads 2] [--cases digits medium …]

The rivals, each in a process of its own; turns alternate in order, so that what else
the machine does meets all of them:
  ours         `recipe.make_step` as `generate` trains, `Generator.sample` as it samples
  torch        PyTorch eager: same network, batch and arithmetic
  torch-last   the same in the channels-last layout

A case is a network and its batches: `digits` that of experiments/digits_ddpm.py,
`medium` for 32x32x3 with half of the base config's channels, `cifar10` with all;
`edm-digits`, `edm-medium` and `edm-cifar10` the same of edm, whose `medium` has a
quarter of the channels. Training: noise, its strength and dropout of each image, mean
square error, Adam, averaged parameters; of ddpm a clipped gradient, of edm no
augmentation. Sampling: 20 evaluations of the network in DPM-Solver++, or 35 by Heun's
method, down to uint8. All in float32. The same number of parameters is asserted.
PyTorch draws from one stream in place of a key an image, has its fused Adam and
attention, and is spared augmentation; its stride-2 convolutions pad both sides, at the
same cost. Figures are medians with their range; ratios are of the turns of one round,
ours over rival's. What the first call of a task took beyond those figures is said
apart: for ours, compilation, unless $JAX_COMPILATION_CACHE_DIR has it.
"""

import copy

from benchmarks import rivals

# Experiment, channels at full resolution (None: the experiment's), images of a training
# batch and of one of samples, training steps a turn.
CASES = {
  'digits': ('digits_ddpm', None, 64, 250, 10),
  'medium': ('cifar10_ddpm', 64, 16, 16, 2),
  'cifar10': ('cifar10_ddpm', 128, 16, 16, 1),
  'edm-digits': ('digits_edm', None, 32, 250, 10),
  'edm-medium': ('cifar10_edm', 32, 16, 16, 1),
  'edm-cifar10': ('cifar10_edm', 128, 16, 16, 1),
}


def make_config(experiment, channels):
  """The experiment's, as it is compared."""
  from jaxrobust.config import experiments

  config = experiments.load(experiment).unlock()
  settings = config.generator
  if channels:
    settings.network.channels = channels
  if settings.name == 'edm':
    settings.training.update(augmentation=0.0, flip=False)
    settings.sampling.update(sampler='heun', num_steps=18)
  return config


def jax_tasks(config, train_batch, sample_batch):
  """Functions that make one step and draw one batch, and the number of parameters."""
  import jax
  import numpy as np

  from jaxrobust.config import dataset_info, registries
  from jaxrobust.data import pipeline
  from jaxrobust.distributed import parallel
  from jaxrobust.generators import recipe as recipes

  settings, info = config.generator, dataset_info.of(config.dataset)
  kind = registries.GENERATORS.get(settings.name)
  recipe = kind.recipe(settings, info)
  fresh = jax.jit(lambda: recipes.init_state(recipe, 0))()
  variables = jax.tree.map(np.asarray, fresh.averaged)
  generator = kind(variables, settings, info)
  num_params = sum(x.size for x in jax.tree.leaves(variables))
  state, step_fn = parallel.replicate(fresh), recipes.make_step(recipe, 0, 0)
  rng = np.random.RandomState(0)
  batch = pipeline.Batch(
    rng.randint(0, 256, (train_batch, *info.image_shape)).astype(np.uint8),
    np.zeros(train_batch, np.int32),
    np.zeros(train_batch, bool),
    np.arange(train_batch, dtype=np.int32),
  )

  def train():
    nonlocal state
    state, metrics = step_fn(state, parallel.shard(batch))
    jax.block_until_ready(metrics)

  def sample():
    generator.sample(jax.random.key(0), np.arange(sample_batch), sample_batch)

  return {'training': train, 'sampling': sample}, num_params


def torch_tasks(
  config, train_batch, sample_batch, channels_last, device='cpu', compiled=False
):
  """The same in PyTorch."""
  import torch

  from jaxrobust.config import dataset_info

  settings, info = config.generator, dataset_info.of(config.dataset)
  torch.manual_seed(0)
  torch.set_default_device(device)
  training, is_edm = settings.training, settings.name == 'edm'
  layout = torch.channels_last if channels_last else torch.contiguous_format
  to_layout = lambda x: x.contiguous(memory_format=layout)
  make_network = torch_edm_network if is_edm else torch_network
  network = make_network(settings.network, info).to(memory_format=layout)
  average = copy.deepcopy(network).eval()
  params, averages = list(network.parameters()), list(average.parameters())
  adam = torch.optim.Adam(params, training.learning_rate, fused=True)
  height, width, channels = info.image_shape
  images = torch.randint(0, 256, (train_batch, channels, height, width))
  images = to_layout(images.to(torch.uint8))
  loss_fn, draw = (torch_edm if is_edm else torch_ddpm)(settings)
  torch.set_default_device(None)  # It costs something at every call.
  fitted, drawing = network, average
  if compiled:
    fitted, drawing = torch.compile(network), torch.compile(average)

  def train():
    loss = loss_fn(fitted, images.float() / 127.5 - 1)
    adam.zero_grad()
    loss.backward()
    if not is_edm:
      torch.nn.utils.clip_grad_norm_(params, training.gradient_clip)
    adam.step()
    with torch.no_grad():
      torch._foreach_lerp_(averages, params, 1e-3)
    return loss.item()

  @torch.inference_mode()
  def sample():
    noise = torch.randn(sample_batch, channels, height, width, device=device)
    x = draw(drawing, to_layout(noise))
    return ((x.clamp_(-1, 1) + 1) * 127.5).round_().to(torch.uint8).cpu()

  count = sum(p.numel() for p in params)
  return {'training': train, 'sampling': sample}, count


def torch_ddpm(settings):
  """Of ddpm: `(network, images) -> loss`, and `(network, noise) -> images`."""
  import torch
  from torch.nn import functional

  from jaxrobust.generators import diffusion, samplers

  process = diffusion.linear(**settings.process)
  table = samplers.SAMPLERS[settings.sampling.sampler](
    process, settings.sampling.num_steps
  )
  signals, spreads = (
    torch.tensor(x**0.5, dtype=torch.float32).view(-1, 1, 1, 1)
    for x in (process.alpha_bars, 1 - process.alpha_bars)
  )

  def loss_fn(network, clean):
    times = torch.randint(0, len(process.betas), (len(clean),), device=clean.device)
    noise = torch.randn_like(clean)
    noisy = signals[times] * clean + spreads[times] * noise
    return functional.mse_loss(network(noisy, times.float()), noise)

  def draw(network, x):
    before = torch.zeros_like(x)
    for i in range(len(table.times)):
      row = table._make(float(column[i]) for column in table)
      noise = network(x, torch.full((len(x),), row.times, device=x.device))
      clean = ((x - row.sigmas * noise) / row.signals).clamp_(-1, 1)
      x = row.keep * x + row.now * clean + row.before * before
      before = clean
    return x

  return loss_fn, draw


def torch_edm(settings):
  """The same of EDM."""
  import torch

  from jaxrobust.generators import heun

  data, training, sampling = (
    settings.network.data_sigma,
    *map(settings.get, ('training', 'sampling')),
  )
  levels = heun.schedule(
    sampling.num_steps, sampling.least_sigma, sampling.greatest_sigma
  )

  def denoise(network, x, sigma):
    classes = torch.zeros(len(x), dtype=torch.long, device=x.device)
    total = sigma**2 + data**2
    out = network(x * total.rsqrt(), sigma.flatten().log() / 4, classes)
    return data**2 / total * x + sigma * data * total.rsqrt() * out

  def loss_fn(network, clean):
    normal = torch.randn(len(clean), 1, 1, 1, device=clean.device)
    sigma = (training.log_sigma_mean + training.log_sigma_deviation * normal).exp()
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    noisy = clean + sigma * torch.randn_like(clean)
    return (weight * (denoise(network, noisy, sigma) - clean) ** 2).mean()

  def draw(network, x):
    level = lambda x, s: torch.full((len(x), 1, 1, 1), float(s), device=x.device)
    slope = lambda x, sigma: (x - denoise(network, x, level(x, sigma))) / float(sigma)
    x = x * float(levels[0])
    for sigma, following in zip(levels[:-1], levels[1:], strict=True):
      first = slope(x, sigma)
      moved = x + float(following - sigma) * first
      if following:
        first = (first + slope(moved, following)) / 2
      x = x + float(following - sigma) * first
    return x

  return loss_fn, draw


def torch_network(network, info):
  """The U-Net of jaxrobust.generators.unet as a module of PyTorch."""
  import math

  import torch
  from torch import nn
  from torch.nn import functional

  width = 4 * network.channels

  def norm(channels):
    return nn.GroupNorm(math.gcd(32, channels // 4), channels, 1e-6)

  class Block(nn.Module):
    def __init__(self, before, channels):
      super().__init__()
      self.norms = nn.ModuleList([norm(before), norm(channels)])
      self.convs = nn.ModuleList(
        [nn.Conv2d(n, channels, 3, 1, 1) for n in (before, channels)]
      )
      self.embedding = nn.Linear(width, channels)
      self.shortcut = nn.Conv2d(before, channels, 1) if before != channels else None
      self.dropout = nn.Dropout(network.dropout)

    def forward(self, inputs, embedding):
      x = self.convs[0](functional.silu(self.norms[0](inputs)))
      x = x + self.embedding(functional.silu(embedding))[:, :, None, None]
      x = self.convs[1](self.dropout(functional.silu(self.norms[1](x))))
      return x + (self.shortcut(inputs) if self.shortcut else inputs)

  class Attention(nn.Module):
    def __init__(self, channels):
      super().__init__()
      self.norm = norm(channels)
      self.inputs = nn.Linear(channels, 3 * channels)
      self.out = nn.Linear(channels, channels)

    def forward(self, inputs):
      x = self.inputs(self.norm(inputs).flatten(2).transpose(1, 2))
      x = functional.scaled_dot_product_attention(*x[:, None].chunk(3, -1))[:, 0]
      return inputs + self.out(x).transpose(1, 2).reshape(inputs.shape)

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      size, before = info.image_shape[0], network.channels
      attended = lambda c: Attention(c) if size in network.attention_sizes else None
      self.times = nn.Sequential(
        nn.Linear(network.channels, width), nn.SiLU(), nn.Linear(width, width)
      )
      half = network.channels // 2
      self.register_buffer(
        'frequencies', torch.exp(-math.log(1e4) * torch.arange(half) / (half - 1))
      )
      self.first = nn.Conv2d(info.image_shape[2], before, 3, 1, 1)
      self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [before]
      last = len(network.multipliers) - 1
      for level, multiplier in enumerate(network.multipliers):
        after = network.channels * multiplier
        for _ in range(network.num_blocks):
          self.down.append(nn.ModuleList([Block(before, after), attended(after)]))
          before = after
          skips.append(before)
        if level != last:
          self.down.append(nn.Conv2d(before, before, 3, 2, 1))
          skips.append(before)
          size //= 2
      self.middle = nn.ModuleList(
        [Block(before, before), Attention(before), Block(before, before)]
      )
      for level, multiplier in reversed(list(enumerate(network.multipliers))):
        after = network.channels * multiplier
        for _ in range(network.num_blocks + 1):
          self.up.append(
            nn.ModuleList([Block(before + skips.pop(), after), attended(after)])
          )
          before = after
        if level:
          self.up.append(nn.Conv2d(before, before, 3, 1, 1))
          size *= 2
      self.norm = norm(before)
      self.last = nn.Conv2d(before, info.image_shape[2], 3, 1, 1)
      nn.init.zeros_(self.last.weight)

    def forward(self, images, times):
      angles = times[:, None] * self.frequencies
      embedding = self.times(torch.cat([angles.sin(), angles.cos()], 1))

      def both(pair, x):
        x = pair[0](x, embedding)
        return pair[1](x) if pair[1] is not None else x

      x = self.first(images)
      skips = [x]
      for part in self.down:
        x = part(x) if isinstance(part, nn.Conv2d) else both(part, x)
        skips.append(x)
      x = self.middle[1](self.middle[0](x, embedding))
      x = self.middle[2](x, embedding)
      for part in self.up:
        if isinstance(part, nn.Conv2d):
          x = part(functional.interpolate(x, scale_factor=2.0))
        else:
          x = both(part, torch.cat([x, skips.pop()], 1))
      return self.last(functional.silu(self.norm(x)))

  return Network()


def torch_edm_network(network, info):
  """DDPM++ of jaxrobust.generators.edm as a module of PyTorch."""
  import math

  import torch
  from torch import nn
  from torch.nn import functional

  width = 4 * network.channels
  num_classes = info.num_classes if network.conditional else 0

  def norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, 1e-6)

  class Block(nn.Module):
    def __init__(self, before, channels, scale=1.0, attends=False):
      super().__init__()
      self.norms = nn.ModuleList([norm(before), norm(channels)])
      self.convs = nn.ModuleList(
        [nn.Conv2d(n, channels, 3, 1, 1) for n in (before, channels)]
      )
      self.embedding = nn.Linear(width, channels)
      passes = before == channels and scale == 1
      self.shortcut = None if passes else nn.Conv2d(before, channels, 1)
      self.dropout, self.scale = nn.Dropout(network.dropout), scale
      self.attends = attends
      if attends:
        self.norm = norm(channels)
        self.inputs = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def resample(self, x):
      if self.scale == 2:
        return functional.interpolate(x, scale_factor=2.0)
      return functional.avg_pool2d(x, 2) if self.scale < 1 else x

    def forward(self, inputs, embedding):
      x = self.convs[0](self.resample(functional.silu(self.norms[0](inputs))))
      x = x + self.embedding(embedding)[:, :, None, None]
      x = self.convs[1](self.dropout(functional.silu(self.norms[1](x))))
      inputs = self.resample(inputs)
      x = (x + (self.shortcut(inputs) if self.shortcut else inputs)) * 0.5**0.5
      if self.attends:
        y = self.inputs(self.norm(x).flatten(2).transpose(1, 2))
        y = functional.scaled_dot_product_attention(*y[:, None].chunk(3, -1))[:, 0]
        x = (x + self.out(y).transpose(1, 2).reshape(x.shape)) * 0.5**0.5
      return x

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      channels = network.channels
      half = channels // 2
      self.register_buffer(
        'frequencies', torch.exp(-math.log(1e4) * torch.arange(half) / (half - 1))
      )
      self.classes = nn.Linear(num_classes, channels) if num_classes else None
      self.labels = nn.Linear(9, channels, bias=False)
      self.embed = nn.Sequential(
        *(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
      )
      self.first = nn.Conv2d(info.image_shape[2], channels, 3, 1, 1)
      widths = [channels * multiplier for multiplier in network.multipliers]
      sizes = [info.image_shape[0] >> i for i in range(len(widths))]
      attends = [size in network.attention_sizes for size in sizes]
      before, skips = channels, [channels]
      self.down, self.up = nn.ModuleList(), nn.ModuleList()
      for level, after in enumerate(widths):
        if level:
          self.down.append(Block(before, before, 0.5))
          skips.append(before)
        for _ in range(network.num_blocks):
          self.down.append(Block(before, after, attends=attends[level]))
          before = after
          skips.append(before)
      self.middle = nn.ModuleList(
        [Block(before, before, attends=True), Block(before, before)]
      )
      for level, after in reversed(list(enumerate(widths))):
        if level < len(widths) - 1:
          self.up.append(Block(before, before, 2))
        for index in range(network.num_blocks + 1):
          last = attends[level] and index == network.num_blocks
          self.up.append(Block(before + skips.pop(), after, attends=last))
          before = after
      self.norm = norm(before)
      self.last = nn.Conv2d(before, info.image_shape[2], 3, 1, 1)

    def forward(self, images, levels, classes):
      angles = levels[:, None] * self.frequencies
      x = torch.cat([angles.sin(), angles.cos()], 1)
      if self.classes is not None:
        known = functional.one_hot(classes, num_classes).float()
        x = x + self.classes(known * num_classes**0.5)
      embedding = self.embed(x + self.labels(x.new_zeros(len(x), 9)))
      x = self.first(images)
      skips = [x]
      for block in self.down:
        x = block(x, embedding)
        skips.append(x)
      for block in self.middle:
        x = block(x, embedding)
      for block in self.up:
        x = x if block.scale == 2 else torch.cat([x, skips.pop()], 1)
        x = block(x, embedding)
      return self.last(functional.silu(self.norm(x)))

  return Network()


def make(rival, case):
  """Both tasks of a rival, and its number of parameters."""
  experiment, channels, train_batch, sample_batch, num_steps = CASES[case]
  args = make_config(experiment, channels), train_batch, sample_batch
  if rival.startswith('torch'):
    tasks, num_params = torch_tasks(*args, rival == 'torch-last')
  else:
    tasks, num_params = jax_tasks(*args)
  times = {'training': num_steps, 'sampling': 1}
  return {k: rivals.Task(task, times[k]) for k, task in tasks.items()}, num_params


def main():
  parser = rivals.parser(__doc__, CASES, ['digits', 'medium'], rounds=7, threads=2)
  args = parser.parse_args()
  names = rivals.installed(['ours', 'torch', 'torch-last'])
  print(f'{args.threads} threads, {args.rounds} rounds')
  for case in args.cases:
    _, _, train_batch, sample_batch, num_steps = CASES[case]
    images = {'training': train_batch * num_steps, 'sampling': sample_batch}
    found, num_params = rivals.measure(make, names, case, args.threads, args.rounds)
    print(f'{case}, {num_params:,} parameters')
    for task, by_rival in found.items():
      for rival, times in by_rival.items():
        rates = rivals.spread([images[task] / wall for wall, _ in times.turns], '.1f')
        first = times.first[0] - times.warm[0]
        line = (
          f'  {task:<9} {rival:<10} {rates} images/s, first call {first:.1f} s more'
        )
        compared = rivals.ratios(times, by_rival['ours']) if rival != 'ours' else []
        print('   '.join([line, *compared]), flush=True)


if __name__ == '__main__':
  main()
