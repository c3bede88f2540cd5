"""Haiku and PyTorch compute the same; `.pt` files in, out, and refused.

Needs PyTorch: `.ci/run` installs its CPU build, `pip install '.[torch]'` any.
"""

import io
import itertools
import os
import zipfile

import jax
import numpy as np
import pytest

from jaxrobust import models
from jaxrobust.errors import UserError
from jaxrobust.files import torch_files
from jaxrobust.models import architecture, parameter_files, pytorch
from tests.helpers import mutations
from tests.helpers.random_variables import assert_same, random_variables

torch = pytest.importorskip(
  'torch', reason="PyTorch is not installed (pip install '.[torch]')"
)
from tests.helpers import torch_networks  # noqa: E402

CIFAR10 = {
  'mean': (0.4914, 0.4822, 0.4465),
  'std': (0.2471, 0.2435, 0.2616),
  'padding': 0,
}
CIFAR100 = {
  'mean': (0.5071, 0.4865, 0.4409),
  'std': (0.2673, 0.2564, 0.2762),
  'padding': 0,
}
MNIST = {'mean': (0.5,), 'std': (0.5,), 'padding': 2}


def pair(name, shape, normalisation, dtype=torch.float32, activation='swish', **more):
  """(variables, images) → logits of Haiku; (state dict, images) → those of PyTorch."""
  model = models.build(
    name,
    num_classes=10,
    image_shape=shape,
    activation=activation,
    group_size=None,
    **normalisation,
  )
  network = torch_networks.build(
    name,
    num_classes=10,
    channels=shape[-1],
    activation={'swish': torch.nn.SiLU(), 'relu': torch.nn.ReLU()}[activation],
    **normalisation,
    **more,
  ).to(dtype)

  def theirs(state, images):
    network.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=True)
    with torch.no_grad():
      return network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()

  ours = jax.jit(lambda v, x: model.apply(*v, x, batch_stats=False)[0])
  return ours, theirs


@pytest.mark.parametrize(
  'name, shape, normalisation, activation',
  [
    ('wrn-10-1', (8, 8, 1), {'mean': (0.5,), 'std': (0.5,), 'padding': 0}, 'swish'),
    ('wrn-10-1', (28, 28, 1), MNIST, 'swish'),
    ('wrn-16-2', (32, 32, 3), CIFAR10, 'swish'),
    ('wrn-10-1', (16, 16, 3), CIFAR100, 'relu'),
    ('preact-resnet-18', (16, 16, 3), CIFAR10, 'swish'),
  ],
)
def test_logits_agree(name, shape, normalisation, activation):
  """To rounding: 1e-4 of logits of order 1 in single precision, 1e-10 in double."""
  for dtype, tolerance in ((np.float32, 1e-4), (np.float64, 1e-10)):
    with jax.enable_x64(dtype == np.float64):
      variables = random_variables(name, 10, shape[-1], dtype=dtype)
      images = np.random.default_rng(1).random((4, *shape), np.float32).astype(dtype)
      ours, theirs = pair(
        name, shape, normalisation, getattr(torch, dtype.__name__), activation
      )
      found = np.asarray(ours(variables, images))
      wanted = theirs(pytorch.to_state_dict(*variables), images)
      assert found.dtype == wanted.dtype == dtype
      assert np.abs(wanted).max() > 0.1
      assert np.ptp(wanted, axis=0).max() > 0.01  # Images matter.
      np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
  'name', ['wrn-28-10', 'wrn-70-16', 'wrn-106-16', 'preact-resnet-18']
)
def test_names_and_shapes_of_the_released_sizes(name):
  """The projection rule is the authors', by which no width but 1 is changed."""
  more = {} if name == 'preact-resnet-18' else {'always_project': False}
  with torch.device('meta'):
    network = torch_networks.build(
      name, num_classes=100, channels=3, activation=torch.nn.SiLU(), **CIFAR100, **more
    )
  # Arrays of one number each, seen as whole ones.
  full = lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape)
  variables = jax.tree.map(
    full, architecture.template(architecture.Architecture(name, 100, 3))
  )
  found = pytorch.to_state_dict(*variables)
  wanted = network.state_dict()
  assert {k: x.shape for k, x in found.items()} == {
    k: tuple(x.shape) for k, x in wanted.items()
  }
  kinds = {k: x.dtype.name for k, x in found.items()}
  assert kinds == {k: str(x.dtype).removeprefix('torch.') for k, x in wanted.items()}


def saved(content) -> bytes:
  buffer = io.BytesIO()
  torch.save(content, buffer)
  return buffer.getvalue()


def state_dict(name='wrn-16-2'):
  """As PyTorch makes it, with statistics that are not its first ones."""
  state = pytorch.to_state_dict(*random_variables(name, 10, 3))
  return {key: torch.tensor(x) for key, x in state.items()}


@pytest.mark.parametrize('name', ['wrn-10-1', 'wrn-16-2', 'preact-resnet-18'])
def test_round_trips_are_exact(name):
  variables = random_variables(name, 10, 3)
  raw = pytorch.write(*variables)
  assert_same(pytorch.read(raw, 'x.pt'), variables)
  once = torch.load(io.BytesIO(raw), weights_only=True)
  twice = torch.load(io.BytesIO(pytorch.write(*pytorch.read(raw, 'x.pt'))))
  assert list(once) == list(twice)
  assert all(torch.equal(once[k], twice[k]) for k in once)
  assert all(once[k].dtype == twice[k].dtype for k in once)


def test_a_short_run_keeps_all_but_the_last_bit_of_its_running_sums():
  """Haiku's average is the sum / (1 - 0.99^count), which rounds."""
  params, net_state = random_variables('wrn-10-1', 10, 3, counter=12)
  for leaves in net_state.values():
    leaves['hidden'] = leaves['average'] * np.float32(1 - 0.99**12)
  read, state = pytorch.read(pytorch.write(params, net_state), 'x.pt')
  assert_same((read,), (params,))
  for module, leaves in state.items():
    np.testing.assert_array_equal(leaves['average'], net_state[module]['average'])
    assert leaves['counter'] == 12
    # 1 - 0.99^12 = 0.11 has lost 3 of 24 bits.
    np.testing.assert_allclose(
      leaves['hidden'], net_state[module]['hidden'], rtol=2**-19
    )


@pytest.mark.parametrize(
  'nest', [None, 'state_dict', 'model_state_dict', 'net', 'model', 'model_ema', 'ema']
)
@pytest.mark.parametrize(
  'prefix',
  ['', 'module.', 'module.model.', '_orig_mod.', 'module._orig_mod.', 'model.module.']
  + ['net.', '1.'],
)
def test_other_wrappings_are_read(nest, prefix):
  state = {f'{prefix}{key}': x for key, x in state_dict('wrn-10-1').items()}
  beside = {'epoch': 3, 'accuracy': np.float64(0.5), 'optimizer': {'state': {0: {}}}}
  content = {nest: state, **beside} if nest else state
  assert_same(pytorch.read(saved(content), 'x.pt'), random_variables('wrn-10-1', 10, 3))


def test_numbers_beside_the_names_are_left_out():
  beside = {'accuracy': np.float64(0.5), 'epoch': 3, 'n_averaged': torch.tensor(7)}
  found = pytorch.read(saved(state_dict('wrn-10-1') | beside), 'x.pt')
  assert_same(found, random_variables('wrn-10-1', 10, 3))


def test_of_two_state_dicts_the_averaged_one_is_read(caplog):
  other = {key: 0 * x for key, x in state_dict('wrn-10-1').items()}
  content = {'model': other, 'ema': state_dict('wrn-10-1')}
  found = pytorch.read(saved(content), 'x.pt')
  assert_same(found, random_variables('wrn-10-1', 10, 3))
  assert 'x.pt holds ema, model: ema is read' in caplog.text


def test_half_precision_and_absent_counts_are_read():
  state = {k: x for k, x in state_dict().items() if 'num_batches' not in k}
  half = {k: x.to(torch.bfloat16) for k, x in state.items()}
  params, net_state = pytorch.read(saved(half), 'x.pt')
  kernel = params['wide_res_net/~/init_conv']['w']
  assert kernel.dtype == np.float32
  wanted = random_variables('wrn-16-2', 10, 3)[0]['wide_res_net/~/init_conv']['w']
  np.testing.assert_allclose(kernel, wanted, rtol=2**-8)
  assert net_state['wide_res_net/~/batchnorm/~/mean_ema']['counter'] == 0


@pytest.mark.parametrize(
  'name, prefix, field',
  [
    ('mean', '', 'mean'),
    ('mu', '', 'mean'),
    ('sigma', 'model.', 'std'),
    ('normalize.std', 'module.', 'std'),
    ('0.mean', '1.', 'mean'),
  ],
)
def test_buffers_of_the_normalisation_are_told(caplog, name, prefix, field):
  state = {f'{prefix}{key}': x for key, x in state_dict('wrn-10-1').items()}
  state[name] = torch.full((1, 3, 1, 1), 0.5)
  found = pytorch.read(saved(state), 'x.pt')
  assert_same(found, random_variables('wrn-10-1', 10, 3))
  assert f'x.pt says {name} = [0.5, 0.5, 0.5]: compare it with model.{field}' in (
    caplog.text
  )


def test_where_channels_do_not_change_the_two_conventions_differ():
  """The authors' PyTorch network of width 1 adds the raw input: another function."""
  variables = random_variables('wrn-10-1', 10, 3)
  state = pytorch.to_state_dict(*variables)
  shortcut = 'layer.0.block.0.shortcut.weight'
  _, theirs = pair('wrn-10-1', (8, 8, 3), CIFAR10, always_project=False)
  images = np.random.default_rng(1).random((2, 8, 8, 3), np.float32)
  with pytest.raises(RuntimeError, match=f'Unexpected key.*{shortcut}'):
    theirs(state, images)
  del state[shortcut]
  assert np.isfinite(theirs(state, images)).all()
  with pytest.raises(UserError, match=f'x.pt has no {shortcut}: with width 1 .*equal'):
    pytorch.from_state_dict(state, 'x.pt')
  # An identity for a projection would not be it.
  variables[0]['wide_res_net/~/resnet_lay_0_block_0/~/shortcut']['w'] = np.eye(
    16, dtype=np.float32
  )[None, None]
  ours, _ = pair('wrn-10-1', (8, 8, 3), CIFAR10)
  assert np.abs(ours(variables, images) - theirs(state, images)).max() > 0.01


class Bomb:
  """Creates a folder when it is unpickled."""

  def __init__(self, path):
    self._path = str(path)

  def __reduce__(self):
    return os.mkdir, (self._path,)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_malicious_file_runs_nothing(tmp_path, zipped):
  path, proof = tmp_path / 'bad.pt', tmp_path / 'it-ran'
  content = state_dict() | {'x': Bomb(proof)}
  torch.save(content, path, _use_new_zipfile_serialization=zipped)
  with pytest.raises(
    UserError, match=r'bad.pt wants to run \w+.mkdir, which is re'
  ) as e:
    parameter_files.read(path)
  assert '\n' not in str(e.value)
  assert not proof.exists()
  torch.load(path, weights_only=False)
  assert proof.exists()


def renamed(state):
  state['layer.1.block.0.a_conv.weight'] = state.pop('layer.1.block.0.conv_0.weight')


@pytest.mark.parametrize(
  'change, words',
  [
    (renamed, r'layer.1.block.0.conv_0 w is absent, the network has \(3, 3, 32, 64\)'),
    (
      lambda s: s.update({'logits.bias': torch.zeros(11)}),
      r'logits b is \(11,\), the network has \(10,\)',
    ),
    (lambda s: s.pop('logits.weight'), 'logits.weight is absent'),
    (lambda s: s.pop('batchnorm.bias'), 'batchnorm.bias is absent'),
    (lambda s: s.pop('batchnorm.running_var'), 'batchnorm.running_var is absent'),
    (
      lambda s: s.update({'fc.weight': torch.zeros(3, 2)}),
      r'fc w is \(2, 3\), the network has none',
    ),
    (
      lambda s: s.update({'logits.weight_g': torch.zeros(3)}),
      'has logits.weight_g, which',
    ),
    (lambda s: s.update({'logits.weight': 'text'}), 'something else than a state dict'),
    (lambda s: s.clear(), 'it has no arrays'),
    (
      lambda s: s.update({f'odd{i}.weight': torch.zeros(2) for i in range(5000)}),
      r'odd\d+ w is \(2,\), the network has none',
    ),
    (
      lambda s: [s.update({f'ema.{k}': s[k] for k in [*s]}), s.pop('init_conv.weight')],
      'is not a state dict of .* it has batchnorm.weight, .*, 157 more',
    ),
    (
      lambda s: s.update({'batchnorm.num_batches_tracked': torch.zeros(3).long()}),
      r'batchnorm.num_batches_tracked of int64 \[3\], and one count',
    ),
    (
      lambda s: s.update({'batchnorm.num_batches_tracked': torch.tensor(-1)}),
      'batchnorm.num_batches_tracked of int64',
    ),
    (
      lambda s: s.update({'logits.bias': torch.zeros(10).long()}),
      'logits.bias of int64; floats',
    ),
    (lambda s: s.update({'a\nb': torch.zeros(3)}), r'names that no network has: a b'),
  ],
)
def test_what_is_not_whole_is_told_in_one_line(change, words):
  state = state_dict()
  change(state)
  with pytest.raises(UserError, match=f'^theirs.pt.*{words}') as e:
    pytorch.read(saved(state), 'theirs.pt')
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'tensor, words',
  [
    (lambda: torch.eye(2).to_sparse(), 'a sparse tensor'),
    (lambda: torch.eye(2).to_sparse_csr(), 'a sparse tensor'),
    (lambda: torch.zeros(2, device='meta'), 'a tensor without values'),
    (lambda: torch.zeros(2).to(torch.float8_e4m3fn), 'such as float8'),
    (lambda: torch.zeros(2, dtype=torch.complex64), 'complex numbers'),
    (lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, 'a view of another'),
    (
      lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
      'a nested tensor',
    ),
    (lambda: torch.nn.Linear(2, 2), 'wants to run torch.nn.modules.linear.Linear'),
  ],
)
@pytest.mark.filterwarnings('ignore')  # These kinds are young, or old.
def test_tensors_that_are_no_plain_arrays(tensor, words):
  state = state_dict('wrn-10-1') | {'logits.bias': tensor()}
  with pytest.raises(UserError, match=f'^theirs.pt .*{words}') as e:
    pytorch.read(saved(state), 'theirs.pt')
  assert '\n' not in str(e.value)


def test_tensors_are_those_that_pytorch_reads():
  """Views, other orders, types and both formats."""
  base = torch.arange(24.0).reshape(4, 6)
  content = {
    'row': base[1],
    'columns': base[:, ::2],
    'turned': base.T,
    'half': base.half(),
    'brain': base.bfloat16() / 3,
    'long': torch.tensor(5),
    'bool': torch.tensor([True, False]),
    'empty': torch.zeros(0, 3),
    'trained': torch.nn.Parameter(base[2:]),
  }
  for zipped, protocol in itertools.product((True, False), (2, 4, 5)):
    buffer = io.BytesIO()
    torch.save(
      content,
      buffer,
      _use_new_zipfile_serialization=zipped,
      pickle_protocol=protocol,
    )
    file = torch_files.TorchFile(buffer)
    assert file.content.keys() == content.keys()
    for key, x in content.items():
      x = x.detach()
      wanted = (x.float() if key in ('half', 'brain') else x).numpy()
      found = file.array(file.content[key])
      assert found.dtype == wanted.dtype
      np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('change', ['shape', 'strides', 'offset', 'count', 'expanded'])
def test_a_tensor_beyond_its_numbers_is_refused(change):
  file = torch_files.TorchFile(io.BytesIO(saved({'x': torch.zeros(4, 6)})))
  tensor = file.content['x']
  wrong = {
    'shape': {'shape': (4, 7), 'strides': (7, 1)},
    'strides': {'strides': (7, 1)},
    'offset': {'offset': 1},
    'count': {'storage': tensor.storage._replace(count=2**40)},
    'expanded': {'shape': (2**30, 2**30), 'strides': (0, 0)},
  }
  with pytest.raises(ValueError, match='its numbers|another length'):
    file.array(tensor._replace(**wrong[change]))


def test_a_compressed_archive_is_refused():
  """A few bytes of it could be gigabytes."""
  buffer = io.BytesIO()
  whole = zipfile.ZipFile(io.BytesIO(saved({'x': torch.zeros(100)})))
  with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name in whole.namelist():
      archive.writestr(name, whole.read(name))
  with pytest.raises(UserError, match=r'^x.pt is not .*: .*compressed members'):
    pytorch.read(buffer.getvalue(), 'x.pt')


def test_damaged_copies_are_read_or_refused_in_a_line():
  """Of both formats whole, and of the pickle alone, which the archive protects."""
  content = {'logits.weight': torch.ones(2, 3), 'n': torch.tensor(5), 'best': 0.5}
  content = {'state_dict': content, 'epoch': 3}
  old = io.BytesIO()
  torch.save(content, old, _use_new_zipfile_serialization=False)
  new = saved(content)
  members = zipfile.ZipFile(io.BytesIO(new))

  def archive(pickled):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as whole:
      for name in members.namelist():
        is_pickle = name.endswith('data.pkl')
        whole.writestr(name, pickled if is_pickle else members.read(name))
    return buffer.getvalue()

  copies = itertools.chain(
    mutations.mutations(old.getvalue(), 300),
    mutations.mutations(new, 300),
    map(archive, mutations.mutations(members.read('archive/data.pkl'), 300)),
  )
  for damaged in copies:
    with pytest.raises(UserError, match=r'^x\.pt [^\n]{1,600}$'):
      pytorch.read(damaged, 'x.pt')  # Whole, it is of no network, either.
    try:
      file = torch_files.TorchFile(io.BytesIO(damaged))
      tensors = file.content['state_dict'].values()
      found = [file.array(x) for x in tensors if isinstance(x, torch_files.Tensor)]
      assert sum(x.nbytes for x in found) <= 2 * len(damaged)
    except ValueError as e:
      assert '\n' not in str(e)
    except (KeyError, AttributeError, TypeError):
      pass  # Of this test, where no state dict is left.


@pytest.mark.parametrize('length', [0, 10, 5000, -1])
def test_a_truncated_file_is_named(tmp_path, length):
  path = tmp_path / 'cut.pt'
  path.write_bytes(saved(state_dict('wrn-10-1'))[:length])
  with pytest.raises(UserError, match='cut.pt is not a whole PyTorch file') as e:
    parameter_files.read(path)
  assert '\n' not in str(e.value)


def test_another_number_of_classes_shows_both(tmp_path):
  path = tmp_path / 'x.pt'
  path.write_bytes(saved(state_dict()))
  model = models.build(
    'wrn-16-2',
    num_classes=100,
    image_shape=(32, 32, 3),
    activation='swish',
    group_size=None,
    **CIFAR100,
  )
  with pytest.raises(UserError, match='wrn-16-2, 10 classes.* wrn-16-2, 100 classes'):
    parameter_files.load(path, model)


def test_training_may_go_on_from_an_imported_network():
  """Its BatchNorm moves from the imported statistics as from the exported ones."""
  variables = random_variables('wrn-10-1', 10, 3, counter=50)
  for leaves in variables[1].values():
    leaves['hidden'] = leaves['average'] * np.float32(1 - 0.99**50)
  read = pytorch.read(pytorch.write(*variables), 'x.pt')
  model = models.build(
    'wrn-10-1',
    num_classes=10,
    image_shape=(8, 8, 3),
    activation='swish',
    group_size=4,
    **CIFAR10,
  )
  images = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
  move = jax.jit(lambda v: model.apply(*v, images, batch_stats=True)[1])
  moved = [jax.tree.leaves(move(v)) for v in (variables, read)]
  for a, b in itertools.zip_longest(*moved):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
