"""Pickles of arrays, read without running what they name."""

import pickle

# What reading a damaged or foreign file may raise.
ERRORS = (
  ValueError,
  EOFError,
  TypeError,
  AttributeError,
  IndexError,
  KeyError,
  pickle.UnpicklingError,
)


class ArrayUnpickler(pickle.Unpickler):
  """Resolves only the names that numpy arrays in containers are made of."""

  _ALLOWED = {
    ('numpy', 'ndarray'),
    ('numpy', 'dtype'),
    ('numpy.core.multiarray', '_reconstruct'),
    ('numpy.core.multiarray', 'scalar'),
    ('numpy._core.multiarray', '_reconstruct'),
    ('numpy._core.multiarray', 'scalar'),
    ('numpy._core.numeric', '_frombuffer'),
    ('numpy.core.numeric', '_frombuffer'),
    ('_codecs', 'encode'),
    ('collections', 'OrderedDict'),
    ('builtins', 'dict'),
    ('builtins', 'list'),
    ('builtins', 'tuple'),
  }

  def find_class(self, module, name):
    if (module, name) in self._ALLOWED:
      return super().find_class(module, name)
    if name in ('FlatMap', 'FlatMapping'):  # Of early versions of Haiku.
      return dict
    raise pickle.UnpicklingError(f'it wants to run {module}.{name}, which is refused')
