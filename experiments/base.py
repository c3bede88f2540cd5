"""Every field of a classifier's run, with its unit: CIFAR-10, l-inf 8/255.

The values are those of the released training recipe (Gowal et al., NeurIPS 2021).
An experiment starts from `get_config` and states what differs. Fields that are
`None` follow from others by the paper's rules, after the overrides of the command
line: see `jaxrobust.config.resolve`.
"""

import re

from ml_collections import config_dict


def get_config():
  """The base config, unlocked: an experiment changes it, then calls `with_arg`."""
  c = config_dict.ConfigDict()
  c.seed = 0  # of initialisation, data order, augmentation and attacks
  c.variant = ''  # last part of the experiment's name

  c.dataset = config_dict.ConfigDict()
  c.dataset.name = 'cifar10'  # digits cifar10 cifar100 svhn mnist tiny_imagenet
  c.dataset.data_dir = ''  # folder of tensorflow-datasets; '' is its default
  # The papers hold out the first 1,024 training images to choose the checkpoint;
  # the released code trains on all 50,000 (set 0, and checkpoint.export = 'last').
  c.dataset.validation_images = 1024
  # Use only the first so many of the remaining training images; None is all.
  c.dataset.train_images = config_dict.placeholder(int)

  c.data = config_dict.ConfigDict()
  c.data.batch_size = 1024  # images in a global batch, real and generated
  c.data.samples = ''  # folder of the sample set; '' is real images only
  # Share of real images in a batch; exact, so it must resolve to a count that all
  # devices and BatchNorm groups can share equally. Ignored without samples. The
  # Deviation: the published 0.3 was rounded in each device's batch, to 10 of 32
  # images; here the rounded number is the field.
  c.data.real_fraction = 0.3125
  # Share of real images from `later_from_epoch` on (in epochs of
  # training.epoch_examples); None keeps real_fraction. Follow-up work trains on
  # generated images alone at first.
  c.data.later_real_fraction = config_dict.placeholder(float)
  c.data.later_from_epoch = 0.0
  # Times that each real image occurs in a batch, each with its own crop and flip.
  # In the published runs four workers read the real images in the same order. For a
  # batch of 256 the released code advises 1.
  c.data.real_repeats = 4
  c.data.verify_samples = True  # compare checksums of the sample set once

  c.augment = config_dict.ConfigDict()
  c.augment.pad = 4  # pixels of zeros on each side before the random crop
  c.augment.flip = True  # horizontal, with probability 1/2
  c.augment.label_smoothing = 0.1  # on generated labels
  # Smooth the labels of real images too, as follow-up work does.
  c.augment.smooth_real_labels = False
  c.augment.cutmix = False
  # Of CutMix and mixup: parts of the batch, each with a ratio (and a box).
  c.augment.cutmix_workers = 4
  # The others that the paper compares; the values that it used are not known to us, so
  # these are common ones, not the paper's.
  c.augment.mixup = False  # not together with cutmix
  c.augment.mixup_alpha = 1.0  # the ratio is of Beta(alpha, alpha)
  c.augment.cutout = 0  # side of the erased square, in pixels; 0 is none, 16 usual
  c.augment.policy = ''  # '' randaugment autoaugment, before crop and flip
  c.augment.randaugment_operations = 2  # an image
  c.augment.randaugment_magnitude = 14  # of 30

  c.model = config_dict.ConfigDict()
  c.model.name = 'wrn-28-10'  # wrn-DEPTH-WIDTH or preact-resnet-18
  c.model.activation = 'swish'
  c.model.mean = (0.4914, 0.4822, 0.4465)  # of the data set, a channel
  c.model.std = (0.2471, 0.2435, 0.2616)
  c.model.padding = 0  # pixels of zeros on each side, before normalisation
  # Images that share BatchNorm statistics in training, whatever the devices. The
  # published runs had 32 cores with 32 images each.
  c.model.batch_norm_group = 32
  # To fit a large model; not part of the published recipe. `remat` computes the
  # activations of a residual block again in the backward pass, in place of keeping
  # them; the result is the same but for rounding.
  c.model.remat = False
  # float32 or bfloat16: of activations and kernels in the convolutions of training.
  # Parameters, statistics, logits and losses are float32, and so is all of inference,
  # so that accuracies of either are measured alike.
  c.model.compute_dtype = 'float32'

  c.threat = config_dict.ConfigDict()
  c.threat.norm = 'linf'  # linf l2 l1
  c.threat.epsilon = 8 / 255  # pixel values in [0, 1]

  c.loss = config_dict.ConfigDict()
  c.loss.name = 'trades'  # standard adversarial trades lbgat uat
  c.loss.beta = 6.0  # weight of the KL term, or of what takes its place
  # Of trades: kl; improved_kl, beta * soft cross-entropy + pairwise * differences of
  # logits (Cui et al. 2023); squared distances of probabilities in both terms (SCORE).
  c.loss.divergence = 'kl'
  c.loss.pairwise = 10.0  # improved_kl: weight of the differences of logits
  c.loss.class_temperature = 4.0  # improved_kl: of the mean prediction of a class
  # improved_kl: decay of that mean, a step. Deviation: published is the mean over the
  # epoch before.
  c.loss.class_decay = 0.99
  # lbgat: network trained without attacks beside the robust one. Deviation: published
  # is the ResNet-18 whose activations come after the sums.
  c.loss.natural_model = 'preact-resnet-18'
  # Adversarial weight perturbation (Wu et al. 2020): how far weights move, relative to
  # their norm (0.005 with trades, 0.01 with adversarial; 0 is off), and from when on.
  c.loss.awp_gamma = 0.0
  c.loss.awp_warmup_epochs = 10.0
  c.loss.weight_decay = 5e-4  # of 0.5 * sum of squares of weights and biases

  c.attack = config_dict.ConfigDict()  # of training
  # kl_divergence or squared_distance (to the clean prediction; with CutMix or mixup to
  # the targets), margin, or cross_entropy (plain adversarial training: loss.name
  # 'adversarial').
  c.attack.objective = 'kl_divergence'
  c.attack.step_rule = 'adam'  # adam sign normalized sparse
  c.attack.num_steps = 10
  c.attack.step_sizes = (0.1, 0.01)  # pixel values; one more than boundaries
  c.attack.step_boundaries = (5,)  # attack steps at which the next size starts
  c.attack.initialization = 'uniform'  # uniform zero
  c.attack.restarts = 1

  c.optimizer = config_dict.ConfigDict()
  # None: base_learning_rate * max(batch_size / 256, 1).
  c.optimizer.learning_rate = config_dict.placeholder(float)
  c.optimizer.base_learning_rate = 0.1
  c.optimizer.momentum = 0.9
  c.optimizer.nesterov = True
  c.optimizer.schedule = 'cosine'  # cosine step constant
  c.optimizer.drop_fractions = (2 / 3,)  # of the run, where step drops to a tenth
  c.optimizer.warmup_epochs = 10.0

  c.training = config_dict.ConfigDict()
  c.training.num_epochs = 400.0
  c.training.epoch_examples = 50_000  # images in an "epoch", real or generated
  # None: num_epochs * epoch_examples / batch_size, rounded down.
  c.training.num_steps = config_dict.placeholder(int)
  # Micro-batches that a device computes one after another, to fit a large model: the
  # same update as at once but for rounding. Each must hold whole BatchNorm groups.
  c.training.accumulation = 1

  c.ema = config_dict.ConfigDict()
  c.ema.decay = 0.995  # a step; at step t at most (1 + t) / (10 + t)
  # BatchNorm statistics that go with the averaged parameters: those of the 'raw'
  # network, as published, or their 'own' (one more forward pass a step).
  c.ema.batch_norm = 'raw'

  c.evaluation = config_dict.ConfigDict()
  c.evaluation.interval_epochs = 40.0  # between evaluations while training
  c.evaluation.batch_size = 1024
  # Of the evaluate program; change nothing in training.
  c.evaluation.checkpoint = ''  # '' is the workdir's checkpoint.npy
  c.evaluation.split = 'test'  # test validation train
  c.evaluation.num_images = config_dict.placeholder(int)  # None is all of them
  # pgd (the attack below), clean, pgd-40, autoattack, autoattack-plus, aa+mt, or
  # attacks with options, 'apgd-ce:restarts=5,square'; see jaxrobust.evaluate --help.
  c.evaluation.suite = 'pgd'
  c.evaluation.save_adversarial = False  # of every image that falls

  c.evaluation.attack = config_dict.ConfigDict()  # PGD-40
  c.evaluation.attack.objective = 'margin'
  c.evaluation.attack.step_rule = 'adam'
  c.evaluation.attack.num_steps = 40
  c.evaluation.attack.step_sizes = (0.1, 0.01, 0.0001)
  c.evaluation.attack.step_boundaries = (20, 30)
  c.evaluation.attack.initialization = 'uniform'
  c.evaluation.attack.restarts = 1

  c.checkpoint = config_dict.ConfigDict()
  c.checkpoint.interval_epochs = 10.0
  c.checkpoint.keep = 2  # last ones kept, besides the best
  # Written to checkpoint.npy at the end: the 'best' averaged parameters by PGD-40
  # accuracy on the validation images (clean accuracy for loss 'standard'), or 'last'.
  c.checkpoint.export = 'best'

  c.log = config_dict.ConfigDict()
  c.log.interval_epochs = 0.5

  return c


def parse_arg(arg: str) -> tuple[str, str]:
  """Splits 'MODEL,DATA' (in any order, each optional) into its two parts."""
  model = data = ''
  for part in filter(None, arg.split(',')):
    if re.fullmatch(r'wrn-\d+-\d+|preact-resnet-18', part):
      model = part
    elif data:
      raise ValueError(
        f'config argument {arg!r} names two data sources, {data!r} and {part!r}; '
        'it reads MODEL,DATA such as wrn-28-10,ddpm'
      )
    else:
      data = part
  return model, data


def with_arg(c, arg: str, default: str):
  """Sets model and sample set from 'MODEL,DATA', and locks the config.

  DATA is 'real', a name NAME for the sample set data/{dataset}_NAME, or a folder,
  which has a '/' in it. What `arg` leaves out is taken from `default`.
  """
  model, data = (
    given or usual
    for given, usual in zip(parse_arg(arg), parse_arg(default), strict=True)
  )
  c.model.name = model
  if data != 'real':
    c.data.samples = data if '/' in data else f'data/{c.dataset.name}_{data}'
  return c.lock()
