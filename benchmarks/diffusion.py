"""Images per second of the diffusion model, sampled and in training, against PyTorch.

  python -m benchmarks.diffusion [--rounds 7] [--threads 2] [--cases digits medium …]

The rivals, each in a process of its own; turns alternate in order, so that what else
the machine does meets all of them:
  ours         `recipe.make_step` as `generate` trains, `DDPM.sample` as it samples
  torch        PyTorch eager: same network, batch and arithmetic
  torch-last   the same in the channels-last layout

A case is a network and its batches: `digits` that of experiments/digits_ddpm.py,
`medium` for 32x32x3 with half of the base config's channels, `cifar10` with all.
Training: noise, time and dropout of each image, mean square error, clipped gradient,
Adam, averaged parameters. Sampling: 20 evaluations of the network in DPM-Solver++,
down to uint8. All in float32. The same number of parameters is asserted. PyTorch draws
from one stream in place of a key an image, has its fused Adam and attention, and is
spared augmentation; its stride-2 convolutions pad both sides, at the same cost. Figures
are medians with their range; ratios are of the turns of one round, ours over rival's.
"""

import argparse
import copy
import importlib.util
import multiprocessing
import os
import statistics
import time

# Data set, channels at full resolution (None: the experiment's), images of a training
# batch and of one of samples, training steps a turn.
CASES = {
  'digits': ('digits', None, 64, 250, 10),
  'medium': ('cifar10', 64, 16, 16, 2),
  'cifar10': ('cifar10', 128, 16, 16, 1),
}
TASKS = ('training', 'sampling')


def make_settings(dataset, channels):
  """(`config.generator`, the data set's info)."""
  from jaxrobust.config import dataset_info, experiments

  settings = experiments.load(f'{dataset}_ddpm').unlock().generator
  if channels:
    settings.network.channels = channels
  return settings, dataset_info.INFO[dataset]


def jax_tasks(settings, info, train_batch, sample_batch):
  """Functions that make one step and draw one batch, and the number of parameters."""
  import jax
  import numpy as np

  from jaxrobust.data import pipeline
  from jaxrobust.distributed import parallel
  from jaxrobust.generators import ddpm
  from jaxrobust.generators import recipe as recipes

  recipe = ddpm.DDPM.recipe(settings, info)
  fresh = jax.jit(lambda: recipes.init_state(recipe, 0))()
  variables = jax.tree.map(np.asarray, fresh.averaged)
  generator = ddpm.DDPM(variables, settings, info)
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
  from torch.nn import functional

  from jaxrobust.generators import diffusion, samplers

  torch.manual_seed(0)
  training, process = settings.training, diffusion.linear(**settings.process)
  table = samplers.SAMPLERS[settings.sampling.sampler](
    process, settings.sampling.num_steps
  )
  layout = torch.channels_last if channels_last else torch.contiguous_format
  to_layout = lambda x: x.contiguous(memory_format=layout)
  network = torch_network(settings.network, info).to(memory_format=layout)
  average = copy.deepcopy(network).eval()
  params, averages = list(network.parameters()), list(average.parameters())
  adam = torch.optim.Adam(params, training.learning_rate, fused=True)
  signals, spreads = (
    torch.tensor(x**0.5, dtype=torch.float32).view(-1, 1, 1, 1)
    for x in (process.alpha_bars, 1 - process.alpha_bars)
  )
  height, width, channels = info.image_shape
  images = torch.randint(0, 256, (train_batch, channels, height, width))
  images = to_layout(images.to(torch.uint8))

  def train():
    times = torch.randint(0, len(process.betas), (train_batch,))
    clean = images.float() / 127.5 - 1
    noise = torch.randn_like(clean)
    noisy = signals[times] * clean + spreads[times] * noise
    loss = functional.mse_loss(network(noisy, times.float()), noise)
    adam.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, training.gradient_clip)
    adam.step()
    with torch.no_grad():
      torch._foreach_lerp_(averages, params, 1 - training.ema_decay)
    return loss.item()

  @torch.inference_mode()
  def sample():
    x = to_layout(torch.randn(sample_batch, channels, height, width))
    before = torch.zeros_like(x)
    for i in range(len(table.times)):
      row = table._make(float(column[i]) for column in table)
      noise = average(x, torch.full((sample_batch,), row.times))
      clean = ((x - row.sigmas * noise) / row.signals).clamp_(-1, 1)
      x = row.keep * x + row.now * clean + row.before * before
      before = clean
    return ((x.clamp_(-1, 1) + 1) * 127.5).round_().to(torch.uint8)

  count = sum(p.numel() for p in params)
  return {'training': train, 'sampling': sample}, count


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


def serve(pipe, rival, case, threads):
  """Makes the tasks, says how many parameters; answers a task with its seconds."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  os.environ['OMP_NUM_THREADS'] = str(threads)
  os.environ['JAX_NUM_CPU_DEVICES'] = '1'
  dataset, channels, train_batch, sample_batch, num_steps = CASES[case]
  args = (*make_settings(dataset, channels), train_batch, sample_batch)
  if rival.startswith('torch'):
    import torch

    torch.set_num_threads(threads)
    tasks, num_params = torch_tasks(*args, rival == 'torch-last')
  else:
    tasks, num_params = jax_tasks(*args)
  for task in tasks.values():
    for _ in range(2):  # compiles, then warms up
      task()
  pipe.send(num_params)
  while name := pipe.recv():
    start = time.perf_counter(), time.process_time()
    for _ in range(num_steps if name == 'training' else 1):
      tasks[name]()
    pipe.send((time.perf_counter() - start[0], time.process_time() - start[1]))


def measure(rivals, case, threads, rounds):
  """Seconds of each task and rival in each round, (wall, processor)."""
  context = multiprocessing.get_context('spawn')
  pipes, processes, num_params = {}, [], set()
  for rival in rivals:
    pipes[rival], theirs = context.Pipe()
    processes.append(
      context.Process(target=serve, args=(theirs, rival, case, threads), daemon=True)
    )
    processes[-1].start()
    num_params.add(pipes[rival].recv())
  assert len(num_params) == 1, f'networks of different sizes: {num_params}'
  seconds = {(task, rival): [] for task in TASKS for rival in rivals}
  for index in range(rounds):
    for task in TASKS:
      for rival in rivals if index % 2 == 0 else reversed(rivals):
        pipes[rival].send(task)
        seconds[task, rival].append(pipes[rival].recv())
  for pipe in pipes.values():
    pipe.send('')
  for process in processes:
    process.join()
  return seconds, num_params.pop()


def spread(values, form):
  """Median (least … greatest)."""
  return (
    f'{statistics.median(values):{form}} ({min(values):{form}} … {max(values):{form}})'
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--cases', nargs='+', choices=CASES, default=['digits', 'medium'])
  args = parser.parse_args()
  rivals = ['ours', 'torch', 'torch-last']
  if importlib.util.find_spec('torch') is None:
    print('PyTorch is not installed (pip install torch): without its rivals')
    rivals = rivals[:1]
  print(f'{args.threads} threads, {args.rounds} rounds')
  for case in args.cases:
    _, _, train_batch, sample_batch, num_steps = CASES[case]
    seconds, num_params = measure(rivals, case, args.threads, args.rounds)
    print(f'{case}, {num_params:,} parameters')
    for task in TASKS:
      images = sample_batch if task == 'sampling' else train_batch * num_steps
      for rival in rivals:
        rates = [images / s[0] for s in seconds[task, rival]]
        line = f'  {task:<9} {rival:<10} {spread(rates, ".1f")} images/s'
        if rival != 'ours':
          for index, kind in enumerate(('', ' in processor time')):
            ratios = [
              theirs[index] / ours[index]
              for theirs, ours in zip(
                seconds[task, rival], seconds[task, 'ours'], strict=True
              )
            ]
            line += f'   {spread(ratios, ".2f")} x{kind}'
        print(line, flush=True)


if __name__ == '__main__':
  main()
