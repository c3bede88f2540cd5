"""safetensors files: exact, in PyTorch's names, and refused when damaged."""

import sys

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.models import parameter_files
from jaxrobust.models import safetensors as files
from tests.helpers.random_variables import assert_same, random_variables


@pytest.mark.parametrize('name', ['wrn-10-1', 'wrn-16-2', 'preact-resnet-18'])
def test_round_trip_is_exact(name, tmp_path):
  variables = random_variables(name, 10, 3)
  raw = files.write(*variables, {'card': 'text'})
  assert_same(files.read(raw, 'x'), variables)
  path = epath.Path(tmp_path / 'x.safetensors')
  path.write_bytes(raw)
  assert files.metadata(path) == {'card': 'text'}
  assert files.write(*files.read(raw, 'x'), {'card': 'text'}) == raw


def test_every_format_gives_the_others_arrays(tmp_path):
  variables = random_variables('wrn-10-1', 10, 3)
  for suffix in ('.npy', '.safetensors', '.npy'):
    path = epath.Path(tmp_path / f'x{suffix}')
    parameter_files.export(path, *variables, {})
    variables = parameter_files.read(path)
    assert_same(variables, random_variables('wrn-10-1', 10, 3))


def test_names_and_layouts_are_those_of_pytorch():
  params, net_state = random_variables('wrn-16-2', 10, 3)
  state = safetensors.numpy.load(files.write(params, net_state, {}))
  block = 'wide_res_net/~/resnet_lay_1_block_0/~/'
  kernel = params[f'{block}conv_0']['w']
  assert kernel.shape == (3, 3, 32, 64)
  found = state['layer.1.block.0.conv_0.weight']
  assert found.shape == (64, 32, 3, 3)
  assert found[5, 7, 1, 2] == kernel[1, 2, 7, 5]
  np.testing.assert_array_equal(
    state['logits.weight'], params['wide_res_net/~/logits']['w'].T
  )
  name = f'{block}batchnorm_1'
  for theirs, ours in (
    ('weight', params[name]['scale']),
    ('bias', params[name]['offset']),
    ('running_mean', net_state[f'{name}/~/mean_ema']['average']),
    ('running_var', net_state[f'{name}/~/var_ema']['average']),
  ):
    np.testing.assert_array_equal(
      state[f'layer.1.block.0.batchnorm_1.{theirs}'], ours[0, 0, 0]
    )
  count = state['batchnorm.num_batches_tracked']
  assert (count, count.dtype, count.shape) == (5000, np.int64, ())


@pytest.mark.parametrize('length', [0, 7, 100, 20_000])
def test_a_truncated_file_is_named(tmp_path, length):
  path = epath.Path(tmp_path / 'cut.safetensors')
  raw = files.write(*random_variables('wrn-10-1', 10, 3), {})
  path.write_bytes(raw[:length])
  with pytest.raises(UserError, match='cut.safetensors is not a whole') as e:
    parameter_files.read(path)
  assert '\n' not in str(e.value)
  if length < 20_000:
    with pytest.raises(UserError, match='cut.safetensors is not a whole'):
      files.metadata(path)


def test_an_ending_that_no_format_has(tmp_path):
  path = epath.Path(tmp_path / 'x.ckpt')
  path.touch()
  for action in (parameter_files.read, lambda p: parameter_files.export(p, {}, {}, {})):
    with pytest.raises(UserError, match='x.ckpt: the name must end in one of .npy'):
      action(path)


def test_without_pytorch_its_files_are_not_written(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = epath.Path(tmp_path / 'x.pt')
  with pytest.raises(UserError, match=r"pip install -e '.\[torch\]'.*safetensors"):
    parameter_files.export(path, *random_variables('wrn-10-1', 10, 3), {})
  assert not path.exists()
