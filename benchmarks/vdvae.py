"""Images per second of the very deep VAE, sampled and in training, against PyTorch.

  python -m benchmarks.vdvae [--rounds 7] [--threads 2] [--cases digits medium …]

The rivals, each in a process of its own; turns alternate in order, so that what else
the machine does meets all of them:
  ours         `recipe.make_step` as `generate` trains, `VDVAE.sample` as it samples
  torch        PyTorch eager: same network, batch and arithmetic
  torch-last   the same in the channels-last layout

A case is a network and its batches: `digits` that of experiments/digits_vdvae.py,
`medium` the published blocks for 32x32x3 with a quarter of the channels and a third of
the blocks of each size, `cifar10` the published network. Training: a draw of all latent
numbers, the mixture of logistics, clipped gradient, AdamW, averaged parameters; an
update is skipped where the gradient is too great. Sampling: one pass of the decoder and
a draw of the mixture, down to uint8. All in float32. The same number of parameters is
asserted. PyTorch draws from one stream in place of a key an image, and has its fused
AdamW. Figures are medians with their range; ratios are of the turns of one round, ours
over rival's. The first call of each task, which compiles, is told apart.
"""

import copy
import math

from benchmarks import rivals

# Network of `make_settings`, images of a training batch and of one of samples, training
# steps a turn.
CASES = {
  'digits': ('digits', 32, 250, 10),
  'medium': ('medium', 16, 32, 2),
  'cifar10': ('cifar10', 16, 16, 1),
}


def make_settings(name):
  """(`config.generator`, the data set's info)."""
  from experiments import cifar10_vdvae, digits_vdvae
  from jaxrobust.config import dataset_info

  if name == 'digits':
    settings = digits_vdvae.get_config().unlock().generator
    return settings, dataset_info.INFO['digits']
  settings = cifar10_vdvae.get_config().unlock().generator
  if name == 'medium':
    settings.network.update(
      width=96,
      bottleneck=24,
      encoder='32x4,32d2,16x2,16d2,8x2,8d2,4x1,4d4,1x1',
      decoder='1x1,4m1,8m4,8x2,16m8,16x3,32m16,32x7',
    )
  return settings, dataset_info.INFO['cifar10']


def jax_tasks(settings, info, train_batch, sample_batch):
  """Functions that make one step and draw one batch, and the number of parameters."""
  import jax
  import numpy as np

  from jaxrobust.data import pipeline
  from jaxrobust.distributed import parallel
  from jaxrobust.generators import recipe as recipes
  from jaxrobust.generators import vdvae

  recipe = vdvae.VDVAE.recipe(settings, info)
  fresh = jax.jit(lambda: recipes.init_state(recipe, 0))()
  variables = jax.tree.map(np.asarray, fresh.averaged)
  generator = vdvae.VDVAE(variables, settings, info)
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


def torch_tasks(settings, info, train_batch, sample_batch, channels_last):
  """The same in PyTorch."""
  import torch

  torch.manual_seed(0)
  training, own = settings.training, settings.network
  layout = torch.channels_last if channels_last else torch.contiguous_format
  network = torch_network(settings, info).to(memory_format=layout)
  average = copy.deepcopy(network).eval()
  params, averages = list(network.parameters()), list(average.parameters())
  adam = torch.optim.AdamW(
    params,
    training.learning_rate,
    (training.b1, training.b2),
    training.epsilon,
    training.weight_decay,
    fused=True,
  )
  height, width, channels = info.image_shape
  images = torch.randint(0, 256, (train_batch, channels, height, width)).to(torch.uint8)
  images = images.contiguous(memory_format=layout)

  def train():
    x = images.float()
    outputs, rate = network((x - own.pixel_mean) / own.pixel_std)
    likelihood = torch_likelihood(outputs, x, own.num_mixtures)
    loss = (rate - likelihood.sum((1, 2))).mean() / math.prod(info.image_shape)
    adam.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(params, training.gradient_clip)
    if norm < training.gradient_skip:
      adam.step()
      with torch.no_grad():
        torch._foreach_lerp_(averages, params, 1 - training.ema_decay)
    return loss.item()

  @torch.inference_mode()
  def sample():
    outputs, _ = average(None, sample_batch)
    return torch_draw(outputs, channels, own.num_mixtures)

  count = sum(p.numel() for p in params)
  return {'training': train, 'sampling': sample}, count


def torch_network(settings, info):
  """The network of jaxrobust.generators.vdvae as a module of PyTorch."""
  import torch
  from torch import nn
  from torch.nn import functional

  from jaxrobust.generators import vdvae
  from jaxrobust.generators.vdvae import mixture

  own = vdvae.make_network(settings, info)
  width, middle, latent = own.width, own.bottleneck, own.latent

  class Block(nn.Module):
    def __init__(self, size, before, after, residual=False):
      super().__init__()
      kernel = 1 if size <= 2 else 3
      sizes = [(before, middle, 1), (middle, middle, kernel)]
      sizes += [(middle, middle, kernel), (middle, after, 1)]
      self.convs = nn.ModuleList(nn.Conv2d(*x, padding=x[2] // 2) for x in sizes)
      self.residual = residual

    def forward(self, x):
      y = x
      for conv in self.convs:
        y = conv(functional.gelu(y))
      return x + y if self.residual else y

  class Layer(nn.Module):
    def __init__(self, size):
      super().__init__()
      self.posterior = Block(size, 2 * width, 2 * latent)
      self.prior = Block(size, width, 2 * latent + width)
      nn.init.zeros_(self.prior.convs[-1].weight)
      self.latent = nn.Conv2d(latent, width, 1)
      self.rest = Block(size, width, width, residual=True)

    def forward(self, x, encoded):
      prior = self.prior(x)
      mean, log_std = prior[:, : 2 * latent].chunk(2, 1)
      found, rate = (mean, log_std), 0.0
      if encoded is not None:
        found = self.posterior(torch.cat([x, encoded], 1)).chunk(2, 1)
        squares = (2 * found[1]).exp() + (found[0] - mean) ** 2
        rate = log_std - found[1] - 0.5 + squares * (-2 * log_std).exp() / 2
        rate = rate.sum((1, 2, 3))
      drawn = found[0] + found[1].exp() * torch.randn_like(found[0])
      return self.rest(x + prior[:, 2 * latent :] + self.latent(drawn)), rate

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.first = nn.Conv2d(own.image_channels, width, 3, 1, 1)
      self.encoder = nn.ModuleList(
        nn.ModuleList(Block(x.size, width, width, True) for _ in range(x.count))
        for x in own.encoder
      )
      self.decoder = nn.ModuleList(
        nn.ModuleList(Layer(x.size) for _ in range(x.count)) for x in own.decoder
      )
      self.maps = nn.ParameterDict(
        {
          str(size): nn.Parameter(torch.zeros(1, width, size, size))
          for size in {x.size for x in own.decoder}
        }
      )
      self.gain = nn.Parameter(torch.ones(1, width, 1, 1))
      self.bias = nn.Parameter(torch.zeros(1, width, 1, 1))
      outputs = mixture.num_outputs(own.num_mixtures, own.image_channels)
      self.last = nn.Conv2d(width, outputs, 1)

    def encode(self, images):
      x = self.first(images)
      found = {x.shape[2]: x}
      for stage, blocks in zip(own.encoder, self.encoder, strict=True):
        for block in blocks:
          found[stage.size] = x
          x = block(x)
        if stage.factor == 1:
          found[stage.size] = x
        else:
          x = functional.avg_pool2d(x, stage.factor)
          found[x.shape[2]] = x
      return found

    def forward(self, images, count=0):
      encoded = {} if images is None else self.encode(images)
      count = count or len(images)
      maps = {int(k): x.expand(count, -1, -1, -1) for k, x in self.maps.items()}
      total = 0.0
      for stage, layers in zip(own.decoder, self.decoder, strict=True):
        x = maps[stage.size]
        if stage.source:
          times = stage.size // stage.source
          x = x + functional.interpolate(maps[stage.source], scale_factor=times)
        for layer in layers:
          x, rate = layer(x, encoded.get(stage.size))
          total = total + rate
        maps[stage.size] = x
      return self.last(x * self.gain + self.bias).permute(0, 2, 3, 1), total

  return Network()


def torch_split(outputs, channels, mixtures):
  """Logits; means, log-scales and coefficients [B, H, W, C, M]."""
  logits, rest = outputs[..., :mixtures], outputs[..., mixtures:]
  rest = rest.reshape(*outputs.shape[:3], channels, -1, mixtures)
  coefficients = rest[..., 2, :].tanh() if channels == 3 else None
  return logits, rest[..., 0, :], rest[..., 1, :].clamp(min=-7), coefficients


def torch_likelihood(outputs, images, mixtures):
  """The log of the probability of each pixel [B, H, W]; images are [B, C, H, W]."""
  import torch
  from torch.nn import functional

  levels = images.permute(0, 2, 3, 1)[..., None]
  x = levels / 127.5 - 1
  logits, means, log_scales, coefficients = torch_split(
    outputs, images.shape[1], mixtures
  )
  if images.shape[1] == 3:
    red, green = x[..., 0, :], x[..., 1, :]
    first, second, third = coefficients.unbind(3)
    shifts = [torch.zeros_like(first), first * red, second * red + third * green]
    means = means + torch.stack(shifts, 3)
  inverse, centred = (-log_scales).exp(), x - means
  upper, lower = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255)
  middle = inverse * centred
  chance = upper.sigmoid() - lower.sigmoid()
  density = middle - log_scales - 2 * functional.softplus(middle) - math.log(127.5)
  inside = torch.where(chance > 1e-5, chance.clamp(min=1e-12).log(), density)
  bins = torch.where(
    levels == 0,
    functional.logsigmoid(upper),
    torch.where(levels == 255, functional.logsigmoid(-lower), inside),
  )
  return torch.logsumexp(bins.sum(-2) + logits.log_softmax(-1), -1)


def torch_draw(outputs, channels, mixtures):
  """Images uint8 [B, H, W, C]."""
  import torch

  logits, means, log_scales, coefficients = torch_split(outputs, channels, mixtures)
  uniform = lambda like: torch.empty_like(like).uniform_(1e-5, 1 - 1e-5)
  gumbel = -(-uniform(logits).log()).log()
  chosen = (logits + gumbel).argmax(-1)[..., None, None]
  take = lambda x: x.gather(-1, chosen.expand(*x.shape[:-1], 1))[..., 0]
  means, scales = take(means), take(log_scales).exp()
  drawn = uniform(means)
  noise = scales * (drawn.log() - (-drawn).log1p())
  if channels == 1:
    pixels = (means + noise).clamp(-1, 1)
  else:
    first, second, third = take(coefficients).unbind(3)
    red = (means[..., 0] + noise[..., 0]).clamp(-1, 1)
    green = (means[..., 1] + first * red + noise[..., 1]).clamp(-1, 1)
    blue = means[..., 2] + second * red + third * green + noise[..., 2]
    pixels = torch.stack([red, green, blue.clamp(-1, 1)], -1)
  return ((pixels + 1) * 127.5).round().to(torch.uint8)


def make(rival, case):
  """Both tasks of a rival, and its number of parameters."""
  name, train_batch, sample_batch, num_steps = CASES[case]
  args = (*make_settings(name), train_batch, sample_batch)
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
    _, train_batch, sample_batch, num_steps = CASES[case]
    images = {'training': train_batch * num_steps, 'sampling': sample_batch}
    found, num_params = rivals.measure(make, names, case, args.threads, args.rounds)
    print(f'{case}, {num_params:,} parameters')
    for task, by_rival in found.items():
      for rival, times in by_rival.items():
        rates = rivals.spread([images[task] / wall for wall, _ in times.turns], '.1f')
        first = '{:.1f} s ({:.1f} of processors)'.format(*times.first)
        line = f'  {task:<9} {rival:<10} {rates} images/s   first call {first}'
        compared = rivals.ratios(times, by_rival['ours']) if rival != 'ours' else []
        print('   '.join([line, *compared]), flush=True)


if __name__ == '__main__':
  main()
