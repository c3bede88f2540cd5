"""Released checkpoints by name, model cards, and what a path is known to be."""

import dataclasses
import hashlib
import importlib
import json
import os

import pytest
from etils import epath

from experiments import digits
from jaxrobust import config as configs
from jaxrobust import evaluate
from jaxrobust.errors import UserError
from jaxrobust.models import architecture, classifier, parameter_files, zoo
from jaxrobust.models import card as cards
from tests.helpers import mutations
from tests.helpers.random_variables import random_variables


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """An empty folder of models."""
  monkeypatch.setenv('JAXROBUST_MODELS', str(tmp_path / 'models'))
  (tmp_path / 'models').mkdir()
  return tmp_path / 'models'


def test_released_checkpoints_are_what_their_names_say():
  card = zoo.ENTRIES['cifar10_l2_wrn70-16_cutmix_ddpm_v2']
  assert (card.dataset, card.norm, card.epsilon) == ('cifar10', 'l2', 128 / 255)
  assert card.architecture == architecture.Architecture('wrn-70-16', 10, 3)
  [published] = card.accuracies
  assert (published['clean_accuracy'], published['robust_accuracy']) == (0.9241, 0.8042)
  assert published['published'].startswith('Rebuffi')
  card = zoo.ENTRIES['cifar10_linf_resnet18_ddpm_100m']
  assert card.model['name'] == 'preact-resnet-18'
  card = zoo.ENTRIES['mnist_linf_wrn28-10_without']
  assert card.model['padding'] == 2
  assert card.epsilon == 0.3
  assert len(zoo.ENTRIES) == 33


@pytest.mark.parametrize('name', zoo.ENTRIES)
def test_each_can_be_built_as_its_experiment_would(name):
  """The values stand in experiments too, which the package cannot import."""
  card = zoo.ENTRIES[name]
  module = importlib.import_module(f'experiments.{card.dataset}_{card.norm}')
  config = module.get_config(f'{card.model["name"]},real')
  said = cards.from_config(config, source='')
  for field in ('dataset', 'norm', 'epsilon', 'model'):
    assert getattr(card, field) == getattr(said, field), field
  assert card.build()  # A network of that name exists.
  [published] = card.accuracies
  assert 0.25 < published['robust_accuracy'] < published['clean_accuracy'] < 1


def test_architecture_is_read_from_parameters():
  for wanted in (
    architecture.Architecture('wrn-10-1', 10, 1),
    architecture.Architecture('wrn-34-20', 100, 3),
    architecture.Architecture('preact-resnet-18', 7, 3),
  ):
    params, _ = architecture.template(wanted)
    assert architecture.infer(params, 'x') == wanted


def test_names_of_others_are_not_guessed():
  params = {'res_net/~/conv_2d': {'w': [[[[1.0]]]]}}
  with pytest.raises(UserError, match=r'r18.npy has res_net/~/conv_2d .*take that'):
    architecture.infer(params, 'r18.npy')


def test_a_name_is_found_and_its_file_expected(folder):
  name = 'cifar10_linf_wrn28-10_ddpm_v2'
  card, path = zoo.find(name)
  assert card is zoo.ENTRIES[name]
  assert path == epath.Path(folder / f'{name}.npy')
  (folder / f'{name}.pt').touch()
  assert zoo.find(name).path.suffix == '.pt'
  assert zoo.find(f'elsewhere/{name}.npy') == (
    card,
    epath.Path(f'elsewhere/{name}.npy'),
  )
  # The Haiku names of the released PreActResNet-18 are not known.
  assert zoo.find('cifar10_linf_resnet18_ddpm').path.suffix == '.pt'


@pytest.mark.parametrize(
  'path, words',
  [
    ('cifar10_linf_wrn28-10_ddpm_v2.npy', r'put .*_v2.npy there from https://storage'),
    ('cifar10_linf_resnet18_ddpm.pt', r'download cifar10_linf_resnet18_ddpm`'),
    ('cifar10_linf_wrn28-10_ddpm_v3', r'did you mean .*wrn28-10_ddpm_v2\?'),
    ('runs/none', r'a file \(.npy, .pt, .safetensors\), a workdir'),
  ],
)
def test_an_absent_file_is_told_with_the_remedy(path, words):
  with pytest.raises(UserError, match=f'no checkpoint at {path}: .*{words}') as e:
    parameter_files.read(path)
  assert '\n' not in str(e.value)


def test_an_absent_path_is_told_with_the_names_beside_it(tmp_path):
  for name in ('digits', 'half'):
    (tmp_path / name).mkdir()
  zoo.refuse_absent(str(tmp_path / 'half'), 'x')
  with pytest.raises(UserError, match="x: 'abc' is no step of .*half: give its number"):
    zoo.refuse_absent(str(tmp_path / 'half@abc'), 'x')
  with pytest.raises(UserError, match='x: it does not exist; did you mean .*/half?'):
    zoo.refuse_absent(str(tmp_path / 'halve'), 'x')
  with pytest.raises(UserError, match='not exist; give a file .* lists them.*, or y'):
    zoo.refuse_absent(str(tmp_path / 'absent' / 'z'), 'x', ', or y')


def test_a_card_of_other_formats_is_named(tmp_path, workdir):
  card = dataclasses.replace(cards.from_workdir(workdir), formats=('.npy',))
  (tmp_path / 'x.json').write_text(card.to_json())
  (tmp_path / 'x.pt').write_bytes(b'')
  said = r'nothing says what its network is \(.*x.json describes .npy files only\)'
  with pytest.raises(UserError, match=said):
    classifier.load(tmp_path / 'x.pt')
  with pytest.raises(UserError, match=said):
    evaluate.default_config(str(tmp_path / 'y'), '', str(tmp_path / 'x.pt'))


def test_a_run_that_is_judged_elsewhere_keeps_its_name(tmp_path, workdir):
  """Else tables would say of what was trained on samples that it saw real images."""
  trained = configs.from_json((workdir / 'config.json').read_text()).unlock()
  trained.data.samples, trained.seed = str(tmp_path / 'pca' / 'samples'), 3
  trained.loss.name, trained.evaluation.suite = 'of-my-own', 'aa+mt'
  (workdir / 'config.json').write_text(configs.to_json(trained))
  found = evaluate.default_config(str(tmp_path / 'y'), '', str(workdir))
  configs.check(found)  # Who judges it need not know its loss.
  found.threat.norm = 'l2'
  assert found.data == trained.data and found.loss == trained.loss and found.seed == 3
  assert configs.experiment_name(found) == (
    configs.experiment_name(trained).replace('linf', 'l2')
  )
  assert found.evaluation.suite == 'pgd' and found.training != trained.training


def test_a_network_of_ones_own_says_what_to_run_first(workdir):
  config = json.loads((workdir / 'config.json').read_text())
  config['model']['name'] = 'mine'
  (workdir / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='run: .*mine.*; run the file that registers one'):
    classifier.load(str(workdir))


def test_nothing_known_is_none(tmp_path):
  assert zoo.find(str(tmp_path / 'none.npy')) is None
  assert zoo.find(str(tmp_path)) is None


@pytest.fixture
def workdir(tmp_path):
  """A finished run with two evaluations, the second of another checkpoint."""
  path = epath.Path(tmp_path / 'run')
  path.mkdir()
  (path / 'config.json').write_text(configs.to_json(digits.get_config()))
  parameter_files.export_npy(
    path / 'checkpoint.npy', *random_variables('wrn-10-1', 10, 1)
  )
  sha256 = hashlib.sha256((path / 'checkpoint.npy').read_bytes()).hexdigest()
  entries = [
    {'protocol': {'suite': 'pgd-40', 'checkpoint_sha256': s}, 'clean_accuracy': a}
    for s, a in ((sha256, 0.75), ('0' * 64, 0.5))
  ]
  (path / 'results.json').write_text(json.dumps(entries))
  return path


def test_a_workdir_is_known_by_its_config(workdir):
  for path in (workdir, workdir / 'checkpoint.npy'):
    card, file = zoo.find(str(path))
    assert file == workdir / 'checkpoint.npy'
    assert (card.name, card.dataset, card.epsilon) == (
      'digits_linf_wrn-10-1_real',
      'digits',
      0.2,
    )
    assert card.model['mean'] == (0.5,)
    assert [x['clean_accuracy'] for x in card.accuracies] == [0.75]
    assert len(card.config_sha256) == 64
  assert parameter_files.load(file, card.build())


def test_a_card_beside_a_file_and_inside_it(workdir, tmp_path):
  card = cards.from_workdir(workdir)
  variables = parameter_files.read(workdir)
  file = epath.Path(tmp_path / 'x.safetensors')
  parameter_files.export(file, *variables, {'card': card.to_json()})
  assert zoo.find(str(file)) == (card, file)
  other = epath.Path(tmp_path / 'y.npy')
  parameter_files.export_npy(other, *variables)
  assert zoo.find(str(other)) is None
  cards.path_of(other).write_text(card.to_json())
  assert zoo.find(str(other)) == (card, other)


@pytest.mark.parametrize(
  'text', ['', '[]', '{"name": "x"}', '{"model": 3}', '[32]', 'linf9']
)
def test_a_damaged_card_is_told_in_one_line(tmp_path, text):
  whole = zoo.ENTRIES['cifar10_linf_wrn28-10_ddpm_v2'].to_json()
  if text == 'linf9':
    text = whole.replace('"linf"', '"linf9"')
  elif text == '[32]':  # The shape of images of one's own.
    text = json.dumps(json.loads(whole) | {'dataset': 'own', 'image_shape': [32]})
  (tmp_path / 'x.json').write_text(text)
  with pytest.raises(UserError, match='x.json is not .*: remove it and say') as e:
    zoo.find(str(tmp_path / 'x.pt'))
  assert '\n' not in str(e.value)


def changed(**changes):
  """A card with other values; fields of its model begin with `model_`."""
  values = json.loads(zoo.ENTRIES['cifar10_linf_wrn28-10_ddpm_v2'].to_json())
  for field, value in changes.items():
    target = values['model'] if field.startswith('model_') else values
    target[field.removeprefix('model_')] = value
  return json.dumps(values)


@pytest.mark.parametrize(
  'content, words',
  [
    (changed(name=5), 'name must be text'),
    (changed(name='x' * 9999), 'name must be text of at most 200'),
    (changed(dataset='cifar11\nx'), r'the data set cifar11 x is unknown'),
    (changed(dataset=['cifar10']), 'dataset must be text'),
    (changed(norm='linf9'), 'the norm linf9 is none of linf, l2, l1'),
    (changed(epsilon='8/255'), 'epsilon must be a number'),
    (changed(epsilon=-1), 'epsilon must not be negative'),
    (changed(epsilon=True), 'epsilon must be a number'),
    (changed(epsilon=10**400), 'too large a number'),
    (changed(accuracies={'a': 1}), 'accuracies must be a list of objects'),
    (changed(accuracies=[5]), 'accuracies must be a list of objects'),
    (changed(source=None), 'source must be text'),
    (changed(config_sha256=5), 'config_sha256 must be text'),
    (changed(model=5), 'its model is none'),
    (changed(model={}), 'its model is none: name, activation'),
    (changed(model_mean=0.5), 'model.mean is no list'),
    (changed(model_mean=[0.5]), '3 values, one a channel'),
    (changed(model_mean=[0.5] * 10**5), 'model.mean is no list'),
    (changed(model_std=[1, 1, 0]), 'model.std must be above 0'),
    (changed(model_std=[1, 1, None]), 'model.std must be a number'),
    (changed(model_padding=-1), 'model.padding must be a number of pixels, 0 to 64'),
    (changed(model_padding=2.5), 'model.padding must be'),
    (changed(model_padding=10**9), 'model.padding must be'),
    (changed(model_name='wrn-99999994-1'), "model.name = 'wrn-99999994-1'"),
    (changed(model_name='wrn-' + '9' * 150 + '-1'), 'model.name = '),
    (changed(model_activation='system'), "model.activation = 'system'"),
    (b'5', 'not as expected'),
    (b'[' * 10**5, 'nested too deeply'),
    (b'{"name": "\xff"}', 'not JSON'),
    (b'{"epsilon": Infinity}', 'not a finite number'),
  ],
)
def test_a_card_that_cannot_be_meant(tmp_path, content, words):
  content = content if isinstance(content, bytes) else content.encode()
  (tmp_path / 'x.json').write_bytes(content)
  with pytest.raises(UserError, match=rf'x\.json .*{words}.*: remove it') as e:
    zoo.find(str(tmp_path / 'x.pt'))
  assert '\n' not in str(e.value) and len(str(e.value)) < 600


def test_damaged_copies_of_a_card_are_read_or_refused_in_a_line(tmp_path):
  path, taken = tmp_path / 'x.json', 0
  for damaged in mutations.mutations(changed().encode(), 800):
    path.write_bytes(damaged)
    try:
      card = zoo.find(str(tmp_path / 'x.pt')).card
    except UserError as e:
      assert str(e).startswith(str(path)) and '\n' not in str(e)
      assert len(str(e)) < len(str(path)) + 600
    else:
      taken += 1
      assert card.build() and card.architecture and json.loads(card.to_json())
  assert 50 < taken < 400


def test_2000_blocks_in_a_group_are_refused_before_a_network_is_built():
  params, _ = architecture.template(architecture.Architecture('wrn-10-1', 10, 3))
  block = params['wide_res_net/~/resnet_lay_0_block_0/~/conv_0']
  params |= {
    f'wide_res_net/~/resnet_lay_0_block_{i}/~/conv_0': block for i in range(2000)
  }
  with pytest.raises(UserError, match=r'x.npy has 2000 blocks .* at most 41 blocks'):
    architecture.infer(params, 'x.npy')


def test_the_deepest_networks_are_still_known():
  wanted = architecture.Architecture('wrn-106-16', 10, 3)
  assert architecture.infer(architecture.template(wanted)[0], 'x') == wanted


@pytest.mark.parametrize('suffix', ['.npy', '.pt', '.safetensors'])
def test_a_fifo_is_no_checkpoint(tmp_path, suffix):
  """Reading one would wait for ever."""
  os.mkfifo(tmp_path / f'x{suffix}')
  os.mkfifo(tmp_path / 'x.json')
  with pytest.raises(UserError, match=r'x\.json is no file'):
    zoo.find(str(tmp_path / f'x{suffix}'))
  with pytest.raises(UserError, match=f'x{suffix} is no file'):
    parameter_files.read(tmp_path / f'x{suffix}')


def test_a_file_of_gigabytes_of_nothing(tmp_path):
  for suffix in parameter_files.SUFFIXES:
    path = tmp_path / f'x{suffix}'
    with open(path, 'wb') as f:
      f.truncate(2**40)
    with pytest.raises(UserError, match=f'x{suffix} (has|is not)'):
      parameter_files.read(path)


def test_the_home_folder_is_found(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  path = epath.Path(tmp_path / 'x.npy')
  parameter_files.export_npy(path, *random_variables('wrn-10-1', 10, 1))
  cards.path_of(path).write_text(changed())
  assert parameter_files.read('~/x.npy')
  assert zoo.find('~/x.npy').path == path
  monkeypatch.setenv('JAXROBUST_MODELS', '~/models')
  assert zoo.folder() == epath.Path(tmp_path / 'models')


def test_a_released_file_is_compared_with_its_first_use(folder):
  path = epath.Path(folder / 'mnist_linf_wrn28-10_without.npy')
  parameter_files.export_npy(path, *random_variables('wrn-10-1', 10, 1))
  parameter_files.read(path)
  parameter_files.read(path)
  parameter_files.export_npy(path, *random_variables('wrn-10-1', 10, 3))
  with pytest.raises(UserError, match='is not the file of its first use') as e:
    parameter_files.read(path)
  assert '\n' not in str(e.value)
