"""Derived values, refusals, names, and the identity of a config."""

import json
import pathlib
import random

import pytest
from ml_collections import config_dict

from experiments import cifar10_linf, digits, digits_ddpm
from jaxrobust import config as configs
from jaxrobust.config import analysis, classifier, experiments, fields, generator
from jaxrobust.config.fields import field
from jaxrobust.errors import UserError


@pytest.fixture
def config():
  return classifier.get_config()


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
    ('loss.beta', float('nan'), '0 or more'),
    ('loss.name', 'trade', 'did you mean trades?'),
    ('threat.epsilon', 8.0, 'did you mean 8/255?'),
    ('threat.epsilon', 1.5, 'below 1'),
    ('model.std', (0.2, 0.0, 0.2), 'above 0'),
    ('dataset.name', 'folder', 'config.dataset.path'),
    ('dataset.name', 'cifar11', 'did you mean cifar10?'),
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


# Fields that were made after the first configs were written.
YOUNGER = {
  'classifier': (
    *('data.later_real_fraction', 'data.later_from_epoch', 'loss.divergence'),
    *('loss.pairwise', 'loss.class_temperature', 'loss.class_decay'),
    *('loss.natural_model', 'loss.awp_gamma', 'loss.awp_warmup_epochs'),
    *('optimizer.drop_fractions', 'augment.smooth_real_labels', 'augment.mixup'),
    *('augment.mixup_alpha', 'augment.cutout', 'augment.policy', 'model.remat'),
    *('augment.randaugment_operations', 'augment.randaugment_magnitude'),
    *('model.compute_dtype', 'training.accumulation', 'evaluation.save_adversarial'),
    *('dataset.path', 'dataset.image_shape'),
  ),
  'ddpm': (
    *('samples.top_fraction', 'generator.training.b1', 'generator.training.b2'),
    *('generator.training.epsilon', 'dataset.path', 'dataset.num_classes'),
  ),
  'analysis': ('dataset.path', 'dataset.train_size', 'features'),
}
MAKE = {
  'classifier': classifier.get_config,
  'analysis': analysis.get_config,
  'ddpm': lambda: generator.get_config('ddpm'),
}


def lacking(config, paths):
  """JSON of a config without some fields."""
  tree = config.to_dict()
  for path in paths:
    *parts, name = path.split('.')
    part = tree
    for x in parts:
      part = part[x]
    del part[name]
  return json.dumps(tree)


@pytest.mark.parametrize('kind', YOUNGER)
def test_a_config_from_before_a_field_means_what_it_did(kind):
  config = MAKE[kind]()
  read = configs.from_json(lacking(config, YOUNGER[kind]))
  assert configs.differences(config, read) == []
  for path in YOUNGER[kind]:  # It can be set, too, as on the command line.
    fields.override(read, {path: fields.flatten(read)[path]}, '')


def test_a_field_whose_default_changed_keeps_what_it_meant(config):
  old = configs.from_json(lacking(config, ['augment.cutmix_workers']))
  assert old.augment.cutmix_workers == 4
  # The same command goes on with it.
  assert configs.differences(old, config) == []
  assert configs.continued(config, old).augment.cutmix_workers == 4
  assert configs.differences(old, config, ()) == ['augment.cutmix_workers: 4 → None']
  config.augment.cutmix_workers = 8
  assert configs.differences(old, config) == ['augment.cutmix_workers: 4 → 8']
  assert configs.continued(config, old).augment.cutmix_workers == 8


def test_another_optimizer_of_a_generator_gets_no_fields_of_adam():
  config = generator.get_config('ddpm')
  config.generator = {'name': 'mine', 'training': {'momentum': 0.9}}
  again = configs.from_json(configs.to_json(config))
  assert again.generator.to_dict() == {'name': 'mine', 'training': {'momentum': 0.9}}
  assert configs.differences(again, config) == []


def test_a_generators_own_fields_are_known_once_declared(monkeypatch):
  monkeypatch.setattr(generator, 'GENERATORS', dict(generator.GENERATORS))
  generator.register('noise', {'scale': field(0.5, 'of the noise', above=0)})
  config = generator.get_config('noise')
  assert config.generator.to_dict() == {'name': 'noise', 'scale': 0.5}
  assert configs.from_json(lacking(config, ['generator.scale'])).generator.scale == 0.5
  with pytest.raises(UserError, match='has its fields already'):
    generator.register('ddpm', {})


GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / 'golden' / 'configs.json').read_text()
)
# What was added to or changed in all configs since the golden ones were written.
SINCE = dict.fromkeys(
  [f'dataset.{x}' for x in ('image_shape', 'num_classes', 'train_size', 'test_size')]
) | {'dataset.path': ''}


def golden(kind, changed):
  values = GOLDEN['defaults'][kind] | changed | SINCE
  later = {'augment.cutmix_workers': None, 'data.streams': 1}
  return values | later if kind == 'classifier' else values


@pytest.mark.parametrize('kind', GOLDEN['defaults'])
def test_defaults_are_what_they_were(kind):
  make = MAKE.get(kind, lambda: generator.get_config(kind))
  assert fields.flatten(json.loads(configs.to_json(make()))) == golden(kind, {})


@pytest.mark.parametrize('experiment', GOLDEN['experiments'])
def test_every_experiment_is_what_it_was(experiment):
  config = experiments.load(experiment)
  kind = 'analysis' if 'rules' in config else 'classifier'
  if 'generator' in config:
    kind = config.generator.name
  found = fields.flatten(json.loads(configs.to_json(config)))
  assert found == golden(kind, GOLDEN['experiments'][experiment])


@pytest.mark.parametrize(
  'text, words',
  [
    ('[]', 'a list and not an object'),
    ('{"loss": {"beta": 1e999}}', 'not a finite number'),
    ('{"loss"', 'is not JSON'),
    ('{"loss": 3}', 'loss is 3'),
    ('{"loss": {"beta": "6"}}', "loss.beta is '6', and not a number"),
    ('{"loss": {}, "seed": true}', 'seed is True, and not a whole number'),
    ('{"loss": {}, "seed": null}', 'seed is None'),
    ('{"loss": {}, "model": {"mean": {}}}', 'model.mean is {}'),
    ('{"generator": 5}', 'generator is 5'),
    ('{"generator": {"name": []}}', 'generator.name is (), and not text'),
    ('{"rules": {"most_flips": []}}', 'rules.most_flips is ()'),
  ],
)
def test_what_is_no_config_is_told_in_one_line(text, words):
  with pytest.raises(UserError) as e:
    configs.from_json(text)
  assert words in str(e.value) and '\n' not in str(e.value)


def test_mutated_configs_are_read_or_refused(config):
  rng = random.Random(0)
  values = [
    'null',
    '[]',
    '{}',
    '-1',
    '"x"',
    'true',
    '1e999',
    '[[1]]',
    '{"a": 1}',
    '',
    ',',
  ]
  texts = [configs.to_json(make()) for make in MAKE.values()]
  for number in range(300):
    lines = texts[number % len(texts)].splitlines()
    for _ in range(rng.randint(1, 3)):
      place = rng.randrange(len(lines))
      name, colon, _ = lines[place].partition(': ')
      lines[place] = name + colon + rng.choice(values) + rng.choice(['', ','])
    try:
      read = configs.from_json('\n'.join(lines))
      configs.check(read)
    except UserError as e:
      assert '\n' not in str(e)


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
  with pytest.raises(UserError, match='names two data sources'):
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


def test_differences_say_what_none_comes_to(config):
  other = configs.from_json(configs.to_json(config)).unlock()
  other.training.num_steps = 60
  other.optimizer.learning_rate = 0.3
  found = configs.differences(other, config)
  assert found == [
    'optimizer.learning_rate: 0.3 → None (0.4 by the other fields)',
    'training.num_steps: 60 → None (19,531 by the other fields)',
  ]


def test_the_mix_means_nothing_without_a_sample_set(config):
  config.data.samples = ''
  assert 'data.real_fraction' in configs.ignored(config)
  config.data.samples = 'data/cifar10_ddpm'
  assert not configs.ignored(config) and not configs.ignored(generator.get_config())


def test_any_two_trees_are_compared():
  """As processes compare what they are about to do."""
  tree = lambda name: config_dict.ConfigDict({'dataset': name, 'name': {'x': 1}})
  found = configs.differences(tree('digits'), tree('mnist'), ())
  assert found == ['dataset: digits → mnist']
