"""Seconds of AutoAttack (standard) against the published PyTorch implementation.

  python -m benchmarks.autoattack [--model wrn-10-1] [--num_images 48] [--rounds 2]
      [--norm linf] [--checkpoint FILE.npy --images FILE.npz]

Both judge one network, on the same images, in a process of its own each, in
alternating order. The network has CIFAR's shape and is trained here by TRADES, for
some hundred steps, on coloured 32x32 pictures of scikit-learn's digits; or it is
--checkpoint with --images (arrays `image` and `label`), normalised as CIFAR-10. Ours is
timed with and without what XLA spends on compiling (none of it is cached).
PyTorch runs with the number of threads that is faster for it. Needs PyTorch and the
published `autoattack` package; both are used as they come.
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

import numpy as np

EPSILON = {'linf': 8 / 255, 'l2': 128 / 255}


def pictures():
  """Digits in colour, with noise: uint8 [1797, 32, 32, 3], labels [1797]."""
  import jax
  from sklearn.datasets import load_digits

  digits, rng = load_digits(), np.random.RandomState(0)
  shape = (len(digits.images), 32, 32)
  strokes = np.asarray(jax.image.resize(digits.images / 16.0, shape, 'linear'))
  strokes = strokes[..., None]
  ink, paper = (rng.uniform(*r, (len(strokes), 1, 1, 3)) for r in ((0.3, 1), (0, 0.4)))
  images = strokes * ink + (1 - strokes) * paper + 0.08 * rng.randn(*shape, 3)
  return (np.clip(images, 0, 1) * 255).astype(np.uint8), digits.target


def train(name, steps):
  """A network after so many TRADES steps on the first 1,000 pictures."""
  import jax

  from jaxrobust import config as configs
  from jaxrobust import models
  from jaxrobust.config import dataset_info, experiments
  from jaxrobust.distributed import parallel
  from jaxrobust.training import optimizer, update

  config = experiments.load(f'cifar10_linf:{name},real').unlock()
  batch = config.data.batch_size = config.model.batch_norm_group = 64
  config.training.num_steps, config.optimizer.warmup_epochs = steps, 0.0
  config.augment.flip, config.augment.pad, config.data.real_repeats = False, 2, 1
  model = models.from_config(config.model, dataset_info.INFO['cifar10'])
  sgd = optimizer.make(config.optimizer, configs.resolve(config))
  state = parallel.replicate(jax.jit(lambda: update.init_state(config, model, sgd))())
  step = parallel.pmap(update.make_step(config, model, sgd, 10), donate_argnums=0)
  images, labels = pictures()
  rng = np.random.RandomState(1)
  slots, real = np.arange(batch, dtype=np.int32), np.zeros(batch, bool)
  for done in range(steps):
    chosen = rng.randint(0, 1000, batch)
    shard = update.Batch(images[chosen], labels[chosen].astype(np.int32), real, slots)
    state, metrics = step(state, parallel.shard(shard))
    if done % 40 == 0:
      accuracy = parallel.unreplicate(metrics)['train/adv_accuracy']
      print(f'step {done} of {steps}: adversarial accuracy {accuracy:.1%}', flush=True)
  state = parallel.unreplicate(state)
  return state.ema_params, state.ema_net_state


def ours(path, images, labels, norm, epsilon, batch_size):
  """(robust count, seconds, seconds of them compiling)."""
  import jax

  from jaxrobust import models
  from jaxrobust.attacks.robustness import evaluate_robustness
  from jaxrobust.config import dataset_info
  from jaxrobust.distributed import parallel
  from jaxrobust.models import architecture, parameter_files

  parallel.use_cores(min(batch_size, len(images)), os.path.getsize(path))
  compiling = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: (
      # Those of tracing lie within each other.
      compiling.append(seconds) if 'backend_compile' in event else None
    )
  )
  info = dataset_info.INFO['cifar10']
  params, net_state = parameter_files.read(path)
  found = architecture.infer(params, path)
  model = models.build(
    found.name, num_classes=found.num_classes, image_shape=images.shape[1:],
    activation='swish', mean=info.mean, std=info.std, padding=0, group_size=None,
  )  # fmt: skip
  start = time.perf_counter()
  outcome = evaluate_robustness(
    lambda x: model.apply(params, net_state, x, batch_stats=False)[0],
    images,
    labels,
    norm=norm,
    epsilon=epsilon,
    batch_size=batch_size,
  )
  seconds = time.perf_counter() - start
  return int(outcome.robust.sum()), seconds, sum(compiling)


def published(path, images, labels, norm, epsilon, batch_size, device='cpu'):
  """The same by the published implementation."""
  import torch
  from autoattack import AutoAttack

  from jaxrobust.config import dataset_info
  from jaxrobust.models import architecture, parameter_files, pytorch
  from tests.helpers import torch_networks

  info = dataset_info.INFO['cifar10']
  params, net_state = parameter_files.read(path)
  _, depth, width = architecture.infer(params, path).name.split('-')
  network = torch_networks.WideResNet(
    int(depth), int(width), 10, 3, info.mean, info.std, 0, torch.nn.functional.silu
  )
  state = pytorch.to_state_dict(params, net_state)
  network.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
  network.eval().to(device)
  inputs = torch.tensor(images / 255, dtype=torch.float32).permute(0, 3, 1, 2)
  inputs = inputs.contiguous().to(device)
  targets = torch.tensor(labels, dtype=torch.long, device=device)
  if device == 'cpu':
    torch.set_num_threads(fastest_threads(torch, network, inputs[:batch_size]))
  judge = AutoAttack(
    network,
    norm=norm.replace('l', 'L'),
    eps=epsilon,
    device=device,
    seed=0,
    verbose=False,
  )
  start = time.perf_counter()
  adversarial = judge.run_standard_evaluation(inputs, targets, bs=batch_size)
  seconds = time.perf_counter() - start
  with torch.no_grad():
    robust = (network(adversarial).argmax(1) == targets).sum()
  return int(robust), seconds, 0.0


def fastest_threads(torch, network, images):
  """One thread or all: on a busy machine more of them can be slower."""
  best = []
  for threads in {1, len(os.sched_getaffinity(0))}:
    torch.set_num_threads(threads)
    for _ in range(2):  # The first time warms up.
      start = time.perf_counter()
      with torch.no_grad():
        for _ in range(5):
          network(images)
      seconds = time.perf_counter() - start
    best.append((seconds, threads))
  return min(best)[1]


def serve(pipe, rival, *args):
  """Sends the result of one evaluation."""
  pipe.send({'ours': ours, 'published': published}[rival](*args))


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', default='wrn-10-1')
  parser.add_argument('--steps', type=int, default=240, help='of training')
  parser.add_argument('--num_images', type=int, default=48)
  parser.add_argument('--batch_size', type=int, default=250)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--norm', choices=EPSILON, default='linf')
  parser.add_argument('--checkpoint', default='')
  parser.add_argument('--images', default='')
  args = parser.parse_args()
  if missing := [m for m in ('torch', 'autoattack') if not importlib.util.find_spec(m)]:
    sys.exit(f'needs {" and ".join(missing)}')
  context = multiprocessing.get_context('spawn')
  with tempfile.TemporaryDirectory() as folder:
    path = args.checkpoint
    if path:
      with np.load(args.images) as arrays:
        images, labels = arrays['image'], arrays['label']
    else:
      from etils import epath

      from jaxrobust.models import parameter_files

      path = f'{folder}/network.npy'
      parameter_files.export_npy(epath.Path(path), *train(args.model, args.steps))
      images, labels = (x[1000:] for x in pictures())
    images, labels = images[: args.num_images], labels[: args.num_images]
    found = {'ours': [], 'published': []}
    for turn in range(args.rounds):
      for rival in sorted(found, reverse=turn % 2 == 1):
        mine, theirs = context.Pipe()
        epsilon = EPSILON[args.norm]
        task = (theirs, rival, path, images, labels, args.norm, epsilon)
        task += (args.batch_size,)
        process = context.Process(target=serve, args=task)
        process.start()
        found[rival].append(mine.recv())
        process.join()
        robust, seconds, compiling = found[rival][-1]
        print(
          f'{rival}: {robust} of {len(images)} robust, {seconds:.1f} s, of them '
          f'{compiling:.1f} s compiling',
          flush=True,
        )
  for what, spent in (
    ('all', lambda s, c: s),
    ('without compiling', lambda s, c: s - c),
  ):
    ratios = [
      spent(*theirs[1:]) / spent(*mine[1:])
      for mine, theirs in zip(found['ours'], found['published'], strict=True)
    ]
    print(
      f'published / ours, {what}: {statistics.median(ratios):.2f}x '
      f'({min(ratios):.2f} … {max(ratios):.2f})'
    )


if __name__ == '__main__':
  main()
