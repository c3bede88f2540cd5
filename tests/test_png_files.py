"""PNG files of others: whose labels they get, and what is refused in one line."""

import io
import json
import os
import shutil
import struct
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest

from jaxrobust.errors import UserError
from jaxrobust.samples import imports, label_files, png_files, shards
from tests.helpers.mutations import mutations

SHAPE = (4, 6, 3)
PER_FOLDER = 3  # EDM and StyleGAN: 1,000


def png_bytes(image):
  buffer = io.BytesIO()
  PIL.Image.fromarray(image).save(buffer, 'png')
  return buffer.getvalue()


def chunk(kind, content):
  return (
    struct.pack('>I', len(content))
    + kind
    + content
    + struct.pack('>I', zlib.crc32(kind + content))
  )


def with_chunk(png, kind, content):
  """A PNG with another chunk after its header."""
  return png[:33] + chunk(kind, content) + png[33:]


IMAGES = np.random.default_rng(0).integers(0, 256, (8, *SHAPE), np.uint8)
PNG = png_bytes(IMAGES[0])
LABELS = [6, 1, 0, 6, 2, 3, 1, 1]
NAMES = [f'{i // PER_FOLDER:05d}/img{i:08d}.png' for i in range(8)]


def edm_files(labels):
  """The files of a data set as EDM and StyleGAN write it."""
  files = {name: png_bytes(x) for name, x in zip(NAMES, IMAGES, strict=True)}
  return {**files, 'dataset.json': json.dumps({'labels': labels}).encode()}


def save(path, files):
  """Writes files to a folder, or to a .zip."""
  if path.suffix == '.zip':
    with zipfile.ZipFile(path, 'w') as archive:
      for name, content in files.items():
        archive.writestr(name, content)
  else:
    for name, content in files.items():
      (path / name).parent.mkdir(parents=True, exist_ok=True)
      (path / name).write_bytes(content)
  return path


def take(path, out, **options):
  return imports.import_samples([path], out, metadata={}, **options)


def refusal(path, out, **options):
  """The line by which an import is refused; nothing is left behind."""
  before = sorted(out.parent.iterdir())
  with pytest.raises(UserError) as caught:
    take(path, out, **options)
  line = str(caught.value)
  assert '\n' not in line and len(line) < 400, line
  assert sorted(out.parent.iterdir()) == before
  return line


def check(found, images, labels):
  everything = np.arange(len(labels))
  np.testing.assert_array_equal(found.gather(everything), images)
  np.testing.assert_array_equal(found.gather_labels(everything), labels)


kinds = pytest.mark.parametrize('kind', ['in', 'in.zip'])


@kinds
def test_labels_of_edm_and_stylegan(tmp_path, kind):
  """Not of their folders, which would make three classes here."""
  pairs = [list(pair) for pair in zip(NAMES, LABELS, strict=True)]
  order = [3, 0, 1, 2, 4, 5, 6, 7]
  path = save(tmp_path / kind, edm_files([pairs[i] for i in order]))
  found = take(path, tmp_path / 'set')
  check(found, IMAGES[order], np.array(LABELS)[order])
  assert found.num_classes == 7 and 'class_names' not in found.metadata


@kinds
def test_a_data_set_without_labels(tmp_path, kind):
  path = save(tmp_path / kind, edm_files(None))
  line = refusal(path, tmp_path / 'set')
  assert f'{path}/dataset.json' in line and '--labels' in line
  (tmp_path / 'mine.txt').write_text(f'{NAMES[1]} 4')
  found = take(path, tmp_path / 'set', labels=tmp_path / 'mine.txt')
  check(found, IMAGES[1:2], [4])


@kinds
@pytest.mark.parametrize('count', [1, 8])
def test_parts_are_no_classes(tmp_path, kind, count):
  """A folder 00000, or 00000 and on, without a list."""
  files = {name: PNG for name in NAMES[:count]}
  path = save(tmp_path / kind, files)
  line = refusal(path, tmp_path / 'set')
  assert '00000' in line and '--labels' in line and '--num_classes' in line
  assert len(take(path, tmp_path / 'set', num_classes=3)) == count


@kinds
@pytest.mark.parametrize(
  'content, message',
  [
    ('{"labels": [["00000/img00000000.png", [1, 2]]]}', 'no pair'),
    ('{"labels": [["00000/img00000000.png", 1.5]]}', 'no pair'),
    ('{"labels": [["00000/img00000000.png", true]]}', 'no pair'),
    ('{"labels": [[6, "00000/img00000000.png"]]}', 'no pair'),
    ('{"labels": {"00000/img00000000.png": 6}}', 'no list'),
    ('{"labels": []}', 'no labels'),
    ('{"labels": [["00000/img00000000.png", -1]]}', 'label -1'),
    ('{"labels": [["00000/img00000000.png", 300000000]]}', 'label 300000000'),
    ('{"labels": [["00000/absent.png", 1]]}', 'absent.png does not exist'),
    ('{"labels": [["dataset.json", 1]]}', 'no readable PNG'),
    ('{"labels": [["a\\u0000\\nb", 1]]}', 'in'),
    ('{"labels": [["a\\nb", 1]]}', 'does not exist'),
    ('{"labels": [["x", 1], ["x", 1]]}', 'names x twice'),
    ('{"labels": [', 'not JSON'),
    ('[]', 'dataset.json is not as expected'),
    ('{}', 'no labels'),
  ],
  ids=range(16),
)
def test_lists_that_are_refused(tmp_path, kind, content, message):
  files = {**edm_files([]), 'dataset.json': content.encode()}
  path = save(tmp_path / kind, files)
  line = refusal(path, tmp_path / 'set')
  assert message in line and str(path) in line


@kinds
def test_folders_are_classes_where_nothing_is_listed(tmp_path, kind):
  files = {f'{x}/{i}.png': png_bytes(IMAGES[i]) for i, x in enumerate(['b', 'a', 'b'])}
  hidden = {
    'a/._0.png': b'x',
    '.c/0.png': b'x',
    '__MACOSX/a/0.png': b'x',
    'a/x.txt': b'',
  }
  found = take(save(tmp_path / kind, {**files, **hidden}), tmp_path / 'set')
  check(found, IMAGES[[1, 0, 2]], [0, 1, 1])
  assert found.metadata['class_names'] == ['a', 'b']


@pytest.mark.parametrize(
  'text',
  [
    'a b.png 3\nc.png 0\n',
    'a b.png\t3\r\n\r\nc.png\t0',
    '\ufeffa b.png,3\nc.png,0\n',
    'filename,label\na b.png,3\nc.png,0\n',
    '"a b.png","3"\n"c.png","0"\n',
    '"name";"class"\n"a b.png";3\n"c.png";0',
    "a b.png '3'\nc.png '0'",
    '"a b.png" 3\n"c.png" 0',
  ],
  ids=range(8),
)
def test_files_of_labels(tmp_path, text):
  (tmp_path / 'labels.csv').write_text(text, newline='')
  assert label_files.read(tmp_path / 'labels.csv') == [('a b.png', 3), ('c.png', 0)]


@pytest.mark.parametrize(
  'content, message',
  [
    (b'', 'no labels'),
    (b'filename,label\n', 'no labels'),
    (b'a.png x4\nb.png 1', "line 1, is 'a.png x4'"),
    (b'a.png 1\nfilename,label\n', 'line 2'),
    (b'a.png 1\nb.png', 'line 2'),
    (b'a.png 1.5', 'line 1'),
    (b'a.png -1', 'label -1'),
    (b'a.png 4294967295', 'label 4294967295'),
    (b'a.png ' + b'9' * 5_000, 'line 1'),
    (b'\xff\xfea\x00', 'no text in UTF-8'),
    (b'a.png 1\na.png 2', 'names a.png twice'),
  ],
  ids=range(11),
)
def test_files_of_labels_that_are_refused(tmp_path, content, message):
  path = tmp_path / 'labels.txt'
  path.write_bytes(content)
  with pytest.raises(UserError) as caught:
    label_files.read(path)
  line = str(caught.value)
  assert message in line and str(path) in line and '\n' not in line and len(line) < 300


EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\nshowpage\n%%EOF\n'


def bomb(side):
  """A PNG that says it is `side` squared, of which little is there."""
  header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
  rows = zlib.compress(bytes(1_000_000))
  return PNG[:8] + chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


@kinds
@pytest.mark.parametrize(
  'content, message',
  [
    (EPS, 'no readable PNG'),
    (b'GIF89a' + bytes(20), 'no readable PNG'),
    (b'', 'no readable PNG'),
    (PNG[:60], 'no readable PNG'),
    (with_chunk(PNG, b'gAMA', b'\1'), 'no readable PNG'),
    (with_chunk(PNG, b'cHRM', b'\1'), 'no readable PNG'),
    (with_chunk(PNG, b'pHYs', b'\1'), 'no readable PNG'),
    (with_chunk(PNG, b'iCCP', b'x\0\1' + zlib.compress(bytes(2**27))), 'x.png'),
    (with_chunk(PNG, b'zTXt', b'x\0\0' + zlib.compress(bytes(2**27))), 'x.png'),
    (bomb(5_000), 'more than 64 MiB'),
    (bomb(2**31 - 1), 'x.png'),
    (bomb(2_000), 'one shape'),
    (png_bytes(IMAGES[0][:, :5]), 'one shape'),
  ],
  ids=range(13),
)
def test_images_that_are_refused(tmp_path, kind, content, message, monkeypatch):
  started = []
  monkeypatch.setattr('subprocess.check_call', lambda *x, **_: started.append(x))
  path = save(tmp_path / kind, {'0/a.png': PNG, '0/x.png': content})
  line = refusal(path, tmp_path / 'set')
  assert message in line and f'{path}/0/' in line and not started


def test_a_bomb_in_a_zip(tmp_path):
  with zipfile.ZipFile(
    tmp_path / 'in.zip', 'w', zipfile.ZIP_DEFLATED, True, 1
  ) as archive:
    archive.writestr('0/a.png', PNG)
    archive.writestr('0/b.png', bytes(2 * shards.MAX_IMAGE_BYTES + 1))
  assert 'b.png has more than 128 MiB' in refusal(tmp_path / 'in.zip', tmp_path / 'set')


@pytest.mark.parametrize('name', ['0/x.png', 'dataset.json', '1'])
def test_nothing_is_read_outside_the_folder(tmp_path, name):
  """Links that lead out of it."""
  save(tmp_path / 'in', {'0/a.png': PNG})
  save(tmp_path / 'out', {'x.png': PNG, 'list.json': b'{"labels": [["0/a.png", 1]]}'})
  target = {'0/x.png': 'out/x.png', 'dataset.json': 'out/list.json', '1': 'out'}[name]
  (tmp_path / 'in' / name).symlink_to(tmp_path / target)
  assert 'leads out of' in refusal(tmp_path / 'in', tmp_path / 'set')


def test_links_inside_the_folder_are_read(tmp_path):
  save(tmp_path / 'in', {'0/a.png': PNG})
  (tmp_path / 'in/0/b.png').symlink_to('a.png')
  (tmp_path / 'link').symlink_to('in')
  check(take(tmp_path / 'link', tmp_path / 'set'), IMAGES[[0, 0]], [0, 0])


@pytest.mark.parametrize('where', ['../out/x.png', '{}/out/x.png'])
def test_labels_name_nothing_outside_the_folder(tmp_path, where):
  save(tmp_path / 'in', {'0/a.png': PNG})
  save(tmp_path / 'out', {'x.png': PNG})
  (tmp_path / 'labels.txt').write_text(f'{where.format(tmp_path)} 1')
  options = {'labels': tmp_path / 'labels.txt'}
  assert 'leads out of' in refusal(tmp_path / 'in', tmp_path / 'set', **options)


@pytest.mark.parametrize('name', ['0/x.png', 'dataset.json'])
def test_pipes_and_folders_are_no_files(tmp_path, name):
  save(tmp_path / 'in', {'0/a.png': PNG})
  for make in (os.mkfifo, os.mkdir):
    make(tmp_path / 'in' / name)
    assert f'{name} is no file' in refusal(tmp_path / 'in', tmp_path / 'set')
    remove = os.rmdir if make is os.mkdir else os.unlink
    remove(tmp_path / 'in' / name)


def test_a_picture_that_is_not_there():
  with pytest.raises(UserError, match='^x.png is no readable PNG'):
    png_files.decode(bomb(2_000), 'x.png')


def test_damaged_png():
  """Each is decoded to the shape that it has, or refused in a line."""
  image = PIL.Image.fromarray(IMAGES[0])
  buffer = io.BytesIO()
  image.quantize(8).save(buffer, 'png', transparency=0, gamma=0.5, dpi=(72, 72))
  for content in (PNG, buffer.getvalue()):
    for damaged in mutations(content, 300, seed=4):
      try:
        found = png_files.decode(damaged, 'a/x.png')
      except UserError as error:
        line = str(error)
        assert line.startswith('a/x.png ') and '\n' not in line and len(line) < 250
      else:
        assert found.dtype == np.uint8 and shards.is_image_shape(found.shape)


@kinds
def test_damaged_data_sets(tmp_path, kind):
  """A list, or a whole .zip, with damages: a set, or a line and nothing beside."""
  pairs = [list(pair) for pair in zip(NAMES, LABELS, strict=True)]
  files = edm_files(pairs)
  path = save(tmp_path / kind, files)
  target = path if path.suffix else path / 'dataset.json'
  taken = 0
  for damaged in mutations(target.read_bytes(), 200, seed=5):
    target.write_bytes(damaged)
    try:
      found = take(path, tmp_path / 'set')
    except UserError as error:
      line = str(error)
      assert str(path) in line and '\n' not in line and len(line) < len(str(path)) + 300
      assert not [x for x in tmp_path.iterdir() if x != path]
    else:
      taken += 1
      assert len(found) <= 8 and max(found.gather_labels(slice(None))) < 2**16
      shutil.rmtree(tmp_path / 'set')
  assert taken < 100


def test_damaged_files_of_labels(tmp_path):
  path = tmp_path / 'labels.csv'
  good = ''.join(
    f'"{name}",{label}\n' for name, label in zip(NAMES, LABELS, strict=True)
  )
  for damaged in mutations(f'\ufefffile,label\n{good}'.encode(), 300, seed=6):
    path.write_bytes(damaged)
    try:
      found = label_files.read(path)
    except UserError as error:
      line = str(error)
      assert str(path) in line and '\n' not in line and len(line) < len(str(path)) + 300
    else:
      assert all(type(x) is str and 0 <= y < 2**16 for x, y in found)
