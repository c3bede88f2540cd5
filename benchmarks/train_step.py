"""Seconds of a TRADES-PGD-10 step against PyTorch and against a plain gradient rule.

  python -m benchmarks.train_step [--rounds 7] [--threads 2] [--cases wrn-16-4:64 …]

The rivals, each in a process of its own; turns alternate in order, so that what else
the machine does meets all of them:
  ours         `update.make_step` as `train` runs it, the attack in a `fori_loop`
  plain        the same with jax's own gradient rule for convolutions
  torch        PyTorch eager: same architecture, batch and arithmetic
  torch-last   the same in the channels-last layout
  (PyTorch is needed for the last two only.)

The arithmetic: one clean pass for the loss and the attack's target, 10 steps of PGD
with Adam on the KL divergence, one adversarial pass, gradient of both, SGD with
Nesterov momentum, weight decay, averaged parameters, float32. PyTorch is spared
augmentation; its stride-2 convolutions pad both sides, at the same cost; its attack
asks only for the gradient of the images. Figures are medians with their range;
ratios are of the turns of one round, rival's time over ours.
"""

from benchmarks import rivals

EPSILON, NUM_STEPS, BETA = 8 / 255, 10, 6.0
CASES = ('wrn-16-4:64', 'wrn-28-4:32')


def make_config(name, batch_size, dtype='float32'):
  """Of the paper's recipe for CIFAR-10, BatchNorm over the whole batch."""
  from jaxrobust.config import experiments

  config = experiments.load(f'cifar10_linf:{name}').unlock()
  config.data.batch_size = config.model.batch_norm_group = batch_size
  config.model.compute_dtype = dtype
  return config


def jax_step(config, plain=False, batches=None):
  """A function that makes one step, waits for it and returns the loss.

  On the next of `batches` of uint8 images, or always on the same one.
  """
  import jax
  import numpy as np

  from jaxrobust import config as configs
  from jaxrobust import models
  from jaxrobust.config import dataset_info
  from jaxrobust.distributed import parallel
  from jaxrobust.models import convolution
  from jaxrobust.training import optimizer, update

  if plain:
    convolution.conv2d = lambda images, kernel, stride: jax.lax.conv_general_dilated(
      images,
      kernel,
      (stride, stride),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
  batch_size = config.data.batch_size
  model = models.from_config(config.model, dataset_info.INFO['cifar10'])
  sgd = optimizer.make(config.optimizer, configs.resolve(config))
  state = parallel.replicate(jax.jit(lambda: update.init_state(config, model, sgd))())
  step_fn = parallel.pmap(update.make_step(config, model, sgd, 10), donate_argnums=0)
  rng = np.random.RandomState(0)
  batch = parallel.shard(
    update.Batch(
      rng.randint(0, 256, (batch_size, 32, 32, 3)).astype(np.uint8),
      rng.randint(0, 10, batch_size).astype(np.int32),
      np.zeros(batch_size, bool),
      np.arange(batch_size, dtype=np.int32),
    )
  )

  def step():
    nonlocal state
    now = parallel.shard(next(batches)) if batches else batch
    state, metrics = step_fn(state, now)
    return float(jax.block_until_ready(metrics)['train/loss'][0])

  return step


def torch_step(
  name, batch_size, channels_last=False, device='cpu', dtype='float32', compiled=False
):
  """The same in PyTorch; bfloat16 is that of its automatic mixed precision."""
  import copy

  import torch
  from torch import nn
  from torch.nn import functional

  from jaxrobust.config import dataset_info

  info = dataset_info.INFO['cifar10']
  torch.manual_seed(0)
  torch.set_default_device(device)
  depth, width = map(int, name.split('-')[1:])

  class Norm(nn.BatchNorm2d):
    """Batch statistics; the running ones move only when they should."""

    def __init__(self, channels):
      super().__init__(channels)
      self.moves = False  # Of the instance, or it would be compiled twice.

    def forward(self, x):
      running = (self.running_mean, self.running_var) if self.moves else (None, None)
      return functional.batch_norm(
        x, *running, self.weight, self.bias, True, 0.01, 1e-5
      )

  class Block(nn.Module):
    def __init__(self, before, channels, stride, projects):
      super().__init__()
      self.norms = nn.ModuleList([Norm(before), Norm(channels)])
      self.convs = nn.ModuleList(
        [
          nn.Conv2d(before, channels, 3, stride, 1, bias=False),
          nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
        ]
      )
      self.shortcut = (
        nn.Conv2d(before, channels, 1, stride, bias=False) if projects else None
      )

    def forward(self, inputs):
      x = functional.silu(self.norms[0](inputs))
      shortcut = self.shortcut(x) if self.shortcut else inputs
      return shortcut + self.convs[1](functional.silu(self.norms[1](self.convs[0](x))))

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      layers, before = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)], 16
      for channels, stride in ((16, 1), (32, 2), (64, 2)):
        for index in range((depth - 4) // 6):
          layers.append(
            Block(before, channels * width, stride if index == 0 else 1, index == 0)
          )
          before = channels * width
      self.layers = nn.Sequential(*layers, Norm(before), nn.SiLU())
      self.logits = nn.Linear(before, 10)
      nn.init.zeros_(self.logits.weight)
      nn.init.zeros_(self.logits.bias)
      self.register_buffer('mean', torch.tensor(info.mean).view(1, 3, 1, 1))
      self.register_buffer('std', torch.tensor(info.std).view(1, 3, 1, 1))

    def forward(self, images):
      return self.logits(self.layers((images - self.mean) / self.std).mean((2, 3)))

  network = Network()
  images = torch.rand(batch_size, 3, 32, 32)
  if channels_last:
    network = network.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
  labels = torch.randint(0, 10, (batch_size,))
  norms = [m for m in network.modules() if isinstance(m, Norm)]
  decayed = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]
  decayed += list(network.logits.parameters())
  others = [p for m in norms for p in m.parameters()]
  sgd = torch.optim.SGD(
    [{'params': decayed, 'weight_decay': 5e-4}, {'params': others}],
    lr=0.1,
    momentum=0.9,
    nesterov=True,
  )
  average = copy.deepcopy(network)
  torch.set_default_device(None)  # It costs something at every call.
  forward = torch.compile(network) if compiled else network
  divergence = lambda log_q, log_p: functional.kl_div(
    log_q, log_p, log_target=True, reduction='sum'
  )

  def log_probabilities(x):
    with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
      logits = forward(x)
    return functional.log_softmax(logits.float(), 1)

  def attack(log_p):
    # Only the images' gradient is wanted, and only it is computed.
    network.requires_grad_(False)
    x = images + torch.empty_like(images).uniform_(-EPSILON, EPSILON)
    x = x.clamp_(0, 1)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(NUM_STEPS):
      x.requires_grad_(True)
      loss = divergence(log_probabilities(x), log_p)
      (gradient,) = torch.autograd.grad(loss, x)
      with torch.no_grad():
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        update = (first / (1 - 0.9 ** (i + 1))).div_(
          (second / (1 - 0.999 ** (i + 1))).sqrt_().add_(1e-9)
        )
        x = x.detach() + (0.1 if i < 5 else 0.01) * update
        x = torch.min(torch.max(x, images - EPSILON), images + EPSILON).clamp_(0, 1)
    network.requires_grad_(True)
    return x

  def step():
    log_p = log_probabilities(images)
    adversarial = attack(log_p.detach())
    for norm in norms:
      norm.moves = True
    log_q = log_probabilities(adversarial)
    for norm in norms:
      norm.moves = False
    loss = functional.nll_loss(log_p, labels) + (
      BETA * divergence(log_q, log_p) / batch_size
    )
    sgd.zero_grad()
    loss.backward()
    sgd.step()
    with torch.no_grad():
      for old, new in zip(average.parameters(), network.parameters(), strict=True):
        old.lerp_(new, 0.005)
    return loss.item()

  return step


def make(rival, case):
  """The step of a rival; there is no size to compare."""
  name, batch_size = case.split(':')
  if rival.startswith('torch'):
    step = torch_step(name, int(batch_size), rival == 'torch-last')
  else:
    step = jax_step(make_config(name, int(batch_size)), rival == 'plain')
  return {'step': rivals.Task(step)}, None


def main():
  parser = rivals.parser(__doc__, None, CASES, rounds=7, threads=2)
  parser.add_argument('--rivals', nargs='+', default=['plain', 'torch', 'torch-last'])
  args = parser.parse_args()
  names = rivals.installed(['ours', *args.rivals])
  print(f'{args.threads} threads, {args.rounds} rounds')
  for case in args.cases:
    found, _ = rivals.measure(make, names, case, args.threads, args.rounds)
    print('{}, batch {}'.format(*case.split(':')))
    for rival, times in found['step'].items():
      seconds = rivals.spread([wall for wall, _ in times.turns], '.2f')
      line = [f'  {rival:<10} {seconds} s a step']
      if rival != 'ours':
        line += rivals.ratios(times, found['step']['ours'])
      print('   '.join(line), flush=True)


if __name__ == '__main__':
  main()
