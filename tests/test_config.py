"""Derived values, refusals, names, and the identity of a config."""

import json

import pytest

from experiments import base, cifar10_linf, digits, digits_ddpm
from jaxrobust import config as configs
from jaxrobust.errors import UserError


@pytest.fixture
def config():
  return base.get_config()


def test_released_recipe_by_the_papers_rules(config):
  derived = configs.resolve(config)
  # int(400 * 50000 / 1024) = 19531, int(10 * 50000 / 1024) = 488,
  # 0.1 * 1024 / 256 = 0.4, int(40 * 50000 / 1024) = 1953.
  assert derived.num_steps == 19_531
  assert derived.warmup_steps == 488
  assert derived.learning_rate == pytest.approx(0.4, abs=1e-12)
  assert derived.eval_interval_steps == 1_953
  assert derived.real_fraction == 1.0


def test_batch_size_moves_steps_and_learning_rate(config):
  config.data.batch_size = 256
  derived = configs.resolve(config)
  assert derived.num_steps == 78_125
  assert derived.learning_rate == pytest.approx(0.1, abs=1e-12)
  config.data.batch_size = 128  # The rule never scales down.
  assert configs.resolve(config).learning_rate == pytest.approx(0.1, abs=1e-12)


def test_what_is_set_is_not_derived(config):
  config.data.batch_size = 256
  config.training.num_steps = 7
  config.optimizer.learning_rate = 0.3
  derived = configs.resolve(config)
  assert (derived.num_steps, derived.learning_rate) == (7, 0.3)


def test_short_runs_have_at_least_one_step(config):
  config.training.num_epochs = 0.001
  assert configs.resolve(config).num_steps == 1


@pytest.mark.parametrize(
  'field, value, words',
  [
    ('dataset.name', 'cifar', 'cifar10'),
    ('threat.norm', 'l0', 'linf, l2, l1'),
    ('threat.epsilon', 0.0, 'above 0'),
    ('data.batch_size', -4, 'above 0'),
    ('data.batch_size', 1000, 'batch_norm_group'),
    ('data.real_fraction', 1.5, 'from 0 to 1'),
    ('training.num_steps', 0, 'above 0'),
    ('dataset.validation_images', 0, 'checkpoint.export'),
    ('ema.batch_norm', 'mine', 'raw, own'),
    ('loss.beta', -1.0, '0 or more'),
    ('loss.divergence', 'js', 'kl, improved_kl, squared'),
    ('loss.awp_gamma', -0.1, '0 or more'),
    ('loss.class_temperature', 0.0, 'above 0'),
    ('data.later_real_fraction', 1.5, 'from 0 to 1'),
    ('optimizer.drop_fractions', (0.9, 0.5), 'rising order'),
    ('optimizer.drop_fractions', (1.0,), 'between 0 and 1'),
    ('augment.policy', 'auto', "'', randaugment, autoaugment"),
    ('augment.mixup_alpha', 0.0, 'above 0'),
    ('augment.cutout', 33, 'the side of the images, 32'),
    ('augment.randaugment_magnitude', 31, 'from 0 to 30'),
  ],
)
def test_refuses_in_one_line(config, field, value, words):
  parent, name = field.split('.')
  config[parent][name] = value
  with pytest.raises(UserError) as e:
    configs.resolve(config)
  assert field in str(e.value) or words in str(e.value)
  assert words in str(e.value)
  assert '\n' not in str(e.value)


def test_losses_that_do_not_go_together(config):
  config.loss.name = 'lbgat'
  config.loss.awp_gamma = 0.005
  with pytest.raises(UserError, match='awp_gamma = 0.005 with loss lbgat'):
    configs.resolve(config)
  config.loss.divergence = 'squared'
  with pytest.raises(UserError, match='not of lbgat'):
    configs.resolve(config)


def test_the_later_mix_needs_a_sample_set(config):
  config.data.later_real_fraction = 0.125
  config.data.later_from_epoch = 6.0
  assert configs.resolve(config).later_real_fraction is None
  config.data.samples = 'data/cifar10_ddpm'
  derived = configs.resolve(config)
  # int(6 * 50000 / 1024) = 292.
  assert (derived.later_real_fraction, derived.later_from_step) == (0.125, 292)


@pytest.mark.parametrize('option', ['cutmix', 'mixup'])
def test_workers_that_mix_must_divide_the_batch(config, option):
  config.augment[option] = True
  config.augment.cutmix_workers = 3
  with pytest.raises(UserError, match='cutmix_workers = 3'):
    configs.resolve(config)


def test_mixup_and_cutmix_together_are_refused(config):
  config.augment.cutmix = config.augment.mixup = True
  with pytest.raises(UserError, match='both mix'):
    configs.resolve(config)


def test_a_config_from_before_a_field_means_what_it_did(config):
  tree = config.to_dict()
  for part, fields in configs._YOUNGER.items():
    for name, old in fields.items():
      assert tree[part].pop(name) == old, 'also the default'
  assert configs.differences(config, configs.from_json(json.dumps(tree))) == []


def test_misspelt_field_is_refused():
  with pytest.raises((AttributeError, KeyError)):
    cifar10_linf.get_config().data.batchsize = 3


@pytest.mark.parametrize(
  'arg, name',
  [
    ('', 'cifar10_linf_wrn-28-10_ddpm'),
    ('wrn-70-16', 'cifar10_linf_wrn-70-16_ddpm'),
    ('real', 'cifar10_linf_wrn-28-10_real'),
    ('wrn-70-16,ddpm', 'cifar10_linf_wrn-70-16_ddpm'),
    ('ddpm-100m,preact-resnet-18', 'cifar10_linf_preact-resnet-18_ddpm-100m'),
    ('sets/cifar10_mine/', 'cifar10_linf_wrn-28-10_mine'),
    ('runs/gaussian/samples', 'cifar10_linf_wrn-28-10_gaussian'),
  ],
)
def test_names(arg, name):
  assert configs.experiment_name(cifar10_linf.get_config(arg)) == name


def test_variant_and_labeller_have_their_place_in_the_name():
  config = digits.get_config('labeller').unlock()
  config.variant = 'b'
  assert configs.experiment_name(config) == 'digits_standard_wrn-10-1_real_b'


def test_two_data_sources_are_refused():
  with pytest.raises(ValueError, match='names two data sources'):
    cifar10_linf.get_config('ddpm,real2')


def test_json_round_trip_keeps_types(config):
  again = configs.from_json(configs.to_json(config))
  assert again.to_dict() == config.to_dict()
  assert isinstance(again.attack.step_sizes, tuple)
  # Settings alone, as in the file of a generator.
  settings = digits_ddpm.get_config().generator
  assert configs.from_json(configs.to_json(settings)).to_dict() == settings.to_dict()


def test_differences_show_both_values_and_leave_out_what_may_change(config):
  other = configs.from_json(configs.to_json(config)).unlock()
  other.loss.beta = 5.0
  other.evaluation.num_images = 10
  other.dataset.data_dir = 'elsewhere'
  assert configs.differences(config, other) == ['loss.beta: 6.0 → 5.0']
