"""Downloads from a server of this process: whole, resumed, and refused."""

import hashlib
import http.server
import threading

import pytest

from jaxrobust.errors import UserError
from jaxrobust.models import download

CONTENT = b'\x93NUMPY' + bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
  """Serves what the server's `plan` says, with ranges; notes each status and start."""

  def do_GET(self):
    plan = self.server.plan
    content, etag = plan.get('content', CONTENT), plan.get('etag', '"one"')
    status, start = plan.get('status', 200), 0
    asked = self.headers.get('Range')
    if status == 200 and asked and self.headers.get('If-Range') == etag:
      start = int(asked.removeprefix('bytes=').removesuffix('-'))
      status = 206 if start < len(content) else 416
    self.server.requests.append((status, start))
    self.send_response(status)
    self.send_header('Content-Type', plan.get('type', 'application/octet-stream'))
    self.send_header('Content-Length', str(len(content) - start))
    if etag:
      self.send_header('ETag', etag)
    self.end_headers()
    self.wfile.write(content[start : plan.get('break', None)])

  def log_message(self, *args):
    pass


@pytest.fixture
def server():
  with http.server.ThreadingHTTPServer(('localhost', 0), Handler) as server:
    server.plan, server.requests = {}, []
    server.url = f'http://localhost:{server.server_port}/x.npy'
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def names(folder):
  return sorted(p.name for p in folder.iterdir())


def test_a_file_comes_once_with_a_note_of_its_checksum(server, tmp_path):
  path = download.download(server.url, tmp_path / 'new' / 'x.npy')
  assert path.read_bytes() == CONTENT
  assert names(tmp_path / 'new') == ['x.npy', 'x.npy.sha256']
  note = (tmp_path / 'new' / 'x.npy.sha256').read_text()
  assert note == f'{hashlib.sha256(CONTENT).hexdigest()}  x.npy\n'
  download.download(server.url, path)
  assert len(server.requests) == 1
  path.write_bytes(b'other')
  with pytest.raises(UserError, match='x.npy is not the file of its first use'):
    download.download(server.url, path)


def broken_off(server, path):
  server.plan['break'] = 5000
  with pytest.raises(UserError, match='run the same command again, it goes on') as e:
    download.download(server.url, path)
  assert '\n' not in str(e.value)
  assert not path.exists()
  del server.plan['break']


def test_an_interrupted_download_goes_on(server, tmp_path):
  broken_off(server, tmp_path / 'x.npy')
  path = download.download(server.url, tmp_path / 'x.npy')
  assert server.requests == [(200, 0), (206, 5000)]
  assert path.read_bytes() == CONTENT
  assert names(tmp_path) == ['x.npy', 'x.npy.sha256']


@pytest.mark.parametrize('etag', ['"two"', None])
def test_another_version_is_not_mixed_in(server, tmp_path, etag):
  if etag is None:  # A server that cannot say which version it has.
    server.plan['etag'] = None
  broken_off(server, tmp_path / 'x.npy')
  server.plan |= {'content': CONTENT[::-1], 'etag': etag}
  path = download.download(server.url, tmp_path / 'x.npy')
  assert path.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize('tag', [b'\xff\xfe', b'one\r\nHost: elsewhere', b'"' * 9999])
def test_a_damaged_note_of_the_version_starts_anew(server, tmp_path, tag):
  (tmp_path / 'x.npy.part').write_bytes(b'other')
  (tmp_path / 'x.npy.part.etag').write_bytes(tag)
  assert download.download(server.url, tmp_path / 'x.npy').read_bytes() == CONTENT


@pytest.mark.parametrize('note', [b'', b'\xff\xfe\n', b'0' * 9999])
def test_a_damaged_note_of_the_checksum_is_told(tmp_path, note):
  (tmp_path / 'x.npy').write_bytes(CONTENT)
  (tmp_path / 'x.npy.sha256').write_bytes(note)
  with pytest.raises(UserError, match='x.npy is not the file of its first use') as e:
    download.compare_checksum(download.epath.Path(tmp_path / 'x.npy'))
  assert '\n' not in str(e.value) and len(str(e.value)) < 1000


def test_a_part_that_is_whole_or_too_long_is_fetched_anew(server, tmp_path):
  (tmp_path / 'x.npy.part').write_bytes(CONTENT + b'more')
  (tmp_path / 'x.npy.part.etag').write_text('"one"')
  assert download.download(server.url, tmp_path / 'x.npy').read_bytes() == CONTENT


@pytest.mark.parametrize(
  'plan, words',
  [
    ({'content': b'<html>404', 'type': 'text/html'}, r'a page \(text/html\)'),
    ({'content': b'<?xml version', 'type': 'application/xml'}, r'a page \(app'),
    ({'content': b'<!doctype html>'}, 'a page or nothing'),
    ({'content': b''}, 'a page or nothing'),
    ({'status': 404, 'type': 'text/html'}, 'the server says 404 Not Found; put the'),
    ({'status': 503}, 'the server says 503'),
  ],
)
def test_what_is_no_checkpoint_is_refused(server, tmp_path, plan, words):
  server.plan = plan
  path = tmp_path / 'x.npy'
  with pytest.raises(UserError, match=words) as e:
    download.download(server.url, path)
  assert '\n' not in str(e.value)
  assert not path.exists()
  server.plan = {}
  assert download.download(server.url, path).read_bytes() == CONTENT


def test_no_server(server, tmp_path):
  url = server.url.replace(str(server.server_port), '1')
  with pytest.raises(UserError, match='http://localhost:1/x.npy: .*efused') as e:
    download.download(url, tmp_path / 'x.npy')
  assert '\n' not in str(e.value)


def test_a_folder_of_somebody_else_gets_no_note(tmp_path, monkeypatch):
  path = download.epath.Path(tmp_path / 'x.npy')
  path.write_bytes(CONTENT)

  def read_only(self, text):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(type(path), 'write_text', read_only)
  download.compare_checksum(path)
  assert names(tmp_path) == ['x.npy']


def test_the_command(server, tmp_path, capsys):
  assert download.main([]) == 0
  listed = capsys.readouterr().out
  assert len(listed.splitlines()) == 33
  assert (
    'cifar10_linf_wrn28-10_ddpm_v2            clean 85.97%, AutoAttack 60.73%' in listed
  )
  assert download.main(['cifar10_linf_wrn28-10']) == 1
  assert '; did you mean cifar10_linf_wrn28-10_' in capsys.readouterr().err
  url = server.url.removesuffix('x.npy')
  name = 'cifar10_linf_resnet18_ddpm'
  assert download.main([name, f'--url={url}', f'--folder={tmp_path}']) == 0
  assert capsys.readouterr().out == f'{tmp_path}/{name}.pt\n'
  assert download.main(['cifar11', f'--url={url}', f'--folder={tmp_path}']) == 1
  err = capsys.readouterr().err
  assert err.startswith("error: 'cifar11' is no released checkpoint")
  assert err.count('\n') == 1
  assert len(server.requests) == 1
