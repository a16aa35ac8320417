"Files are written whole or not at all."
import errno, os, subprocess, sys, time
import pytest
from g2d.files import atomic_path, explain_os_error, read_json, sha256_file, write_json
from g2d.settings import G2DError


def test_kill_in_the_middle_keeps_the_old_content(tmp_path):
    path = tmp_path/'a.bin'
    path.write_bytes(b'old')
    code = f'''
import time
from g2d.files import atomic_path
with atomic_path({str(path)!r}) as t:
    with open(t, "wb") as f:
        f.write(b"new"*100000); f.flush()
        print("writing", flush=True); time.sleep(60)
'''
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'writing\n'
    process.kill(); process.wait()
    assert path.read_bytes() == b'old'


@pytest.mark.parametrize('code, words', [(errno.ENOSPC, 'disk is full'), (errno.EDQUOT, 'disk is full'), (errno.EACCES, 'cannot be written'), (errno.EIO, 'could not be')])
def test_errors_of_the_disk_are_one_sentence(tmp_path, monkeypatch, code, words):
    path = tmp_path/'a.json'
    write_json(path, dict(a=1))
    def fail(*a): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(G2DError, match=words) as caught: write_json(path, dict(a=2))
    assert '\n' not in str(caught.value) and str(path) in str(caught.value)
    assert read_json(path) == dict(a=1) and [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_hash_of_the_first_bytes(tmp_path):
    import hashlib
    path, data = tmp_path/'x', os.urandom(2**23 + 12345)
    path.write_bytes(data)
    for size in (None, 0, 1, 2**23, 2**23 + 1, len(data)):
        assert sha256_file(path, size) == hashlib.sha256(data if size is None else data[:size]).hexdigest()
