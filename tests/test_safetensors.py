"""safetensors files: exact, in PyTorch's names, and refused when damaged."""

import json
import sys

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.models import parameter_files
from jaxrobust.models import safetensors as files
from tests.helpers import mutations
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
  with pytest.raises(UserError, match=r"pip install '.\[torch\]'.*safetensors"):
    parameter_files.export(path, *random_variables('wrn-10-1', 10, 3), {})
  assert not path.exists()


def file_of(header, data=b'') -> bytes:
  """A file with any header, as an object or as bytes."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, 'little') + text + data


def test_half_precision_comes_in_single_precision():
  """BF16 is the upper half of a float; numpy has no name for it."""
  values = np.array([[1.5, -2.0, 3.140625], [0.0, 2.0**-130, np.inf]], np.float32)
  upper = (values.view(np.uint32) >> 16).astype('<u2').tobytes()
  half = np.float16([0.5, -7]).tobytes()
  header = {
    'a': {'dtype': 'BF16', 'shape': [2, 3], 'data_offsets': [0, 12]},
    'b': {'dtype': 'F16', 'shape': [2], 'data_offsets': [12, 16]},
  }
  found = files.tensors(file_of(header, upper + half), 'x')
  assert found['a'].dtype == found['b'].dtype == np.float32
  np.testing.assert_array_equal(found['a'], values)
  assert found['b'].tolist() == [0.5, -7]


def test_a_network_in_half_precision(tmp_path):
  """Written as others do; read as the network rounded to 8 bits."""
  variables = random_variables('wrn-10-1', 10, 3)
  header, parts, start = {}, [], 0
  state = safetensors.numpy.load(files.write(*variables, {}))
  for name, x in state.items():
    brain = x.dtype == np.float32
    part = (np.ascontiguousarray(x).view(np.uint32) >> 16).astype('<u2') if brain else x
    parts.append(part.tobytes())
    stop = start + len(parts[-1])
    header[name] = {
      'dtype': 'BF16' if brain else 'I64',
      'shape': list(x.shape),
      'data_offsets': [start, stop],
    }
    start = stop
  params, _ = files.read(file_of(header, b''.join(parts)), 'x')
  kernel = params['wide_res_net/~/init_conv']['w']
  assert kernel.dtype == np.float32
  wanted = variables[0]['wide_res_net/~/init_conv']['w']
  np.testing.assert_allclose(kernel, wanted, rtol=2**-7)  # Cut, not rounded.


def test_tensors_are_those_that_the_package_reads():
  rng = np.random.default_rng(0)
  state = {
    kind: rng.integers(0, 2, (2, 3)).astype(kind)
    for kind in ('f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', '?')
  } | {'empty': np.zeros((0, 4), np.float32), 'one': np.array(3)}
  found = files.tensors(safetensors.numpy.save(state), 'x')
  assert found.keys() == state.keys()
  for key, x in state.items():
    assert found[key].dtype == x.dtype
    np.testing.assert_array_equal(found[key], x)


def entry(**changes):
  return {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8], **changes}


@pytest.mark.parametrize(
  'raw, words',
  [
    (b'', '0 bytes, and a header of 0'),
    (b'\xff' * 8, 'a header of 18446744073709551615'),
    ((2**40).to_bytes(8, 'little') + b'{}', 'a header of 1099511627776'),
    (file_of([]), 'a list and not an object'),
    (file_of(5), '5 and not an object'),
    (file_of(b'[' * 10**5), 'nested too deeply'),
    (file_of(b'{"a": \xff}'), 'not JSON'),
    (file_of({'a': []}, bytes(8)), 'a has no dtype, shape and data_offsets'),
    (file_of({'a': entry(dtype=5)}, bytes(8)), 'a has no dtype'),
    (file_of({'a': entry(dtype='F8_E4M3')}, bytes(8)), 'type F8_E4M3; F64, F32'),
    (file_of({'a': entry(shape=[-2])}, bytes(8)), 'a shape or offsets that are none'),
    (file_of({'a': entry(shape=[True, 2])}, bytes(8)), 'a shape or offsets that'),
    (file_of({'a': entry(shape=[2.0])}, bytes(8)), 'a shape or offsets that are none'),
    (file_of({'a': entry(shape=[2**40, 2**40])}, bytes(8)), 'a takes 48357'),
    (file_of({'a': entry(shape=[2**61, 8])}, bytes(8)), 'a takes 7378'),
    (file_of({'a': entry(shape=[3])}, bytes(8)), 'a takes 12 bytes, at offsets 0 to 8'),
    (file_of({'a': entry(shape=[1] * 99)}, bytes(4)), 'a takes 4 bytes'),
    (
      file_of({'a': entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0])}),
      'a: .*too (big|large)',
    ),
    (file_of({'a': entry(data_offsets=[8, 0])}, bytes(8)), 'at offsets 8 to 0'),
    (file_of({'a': entry(data_offsets=[0])}, bytes(8)), 'a has no dtype'),
    (file_of({'a': entry(), 'b': entry()}, bytes(8)), 'overlap, or leave bytes over'),
    (file_of({'a': entry()}, bytes(12)), 'overlap, or leave bytes over'),
    (file_of({'a': entry(dtype='BOOL')}, b'\2\1'), 'a takes 2 bytes'),
    (
      file_of({'a': entry(dtype='BOOL', data_offsets=[0, 2])}, b'\2\1'),
      'booleans above 1',
    ),
    (file_of({'a\nb' * 99: entry(shape=[3])}, bytes(8)), 'a ba b.* takes 12 bytes'),
  ],
  ids=range(25),
)
def test_headers_that_cannot_be_meant(raw, words):
  with pytest.raises(UserError, match=f'x.safetensors .*{words}') as e:
    files.read(raw, 'x.safetensors')
  assert '\n' not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize(
  'header', [[], {'__metadata__': []}, {'__metadata__': {'card': {'a': 1}}}]
)
def test_metadata_that_are_no_text(tmp_path, header):
  path = epath.Path(tmp_path / 'x.safetensors')
  path.write_bytes(file_of(header))
  with pytest.raises(UserError, match=r'x\.safetensors '):
    files.metadata(path)


def test_damaged_copies_are_read_or_refused_in_a_line(tmp_path):
  path, taken = epath.Path(tmp_path / 'x.safetensors'), 0
  state = {'a.weight': np.ones((2, 3), np.float32), 'b': np.array(5), 'c': np.ones(2)}
  for damaged in mutations.mutations(safetensors.numpy.save(state, {'k': 'v'}), 800):
    path.write_bytes(damaged)
    for read in (
      lambda: files.tensors(path.read_bytes(), 'x'),
      lambda: files.metadata(path),
    ):
      try:
        found = read()
      except UserError as e:
        assert '\n' not in str(e) and len(str(e)) < 500 and 'x' in str(e)
      else:
        taken += 1
        sizes = [x.nbytes for x in found.values() if isinstance(x, np.ndarray)]
        assert sum(sizes) <= 2 * len(damaged)
  assert 100 < taken < 1200
