"The fork server: what it starts behaves like a new Python, ends with its client, and gives the same figures; every doubt ends in an ordinary start."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from g2d.fork_server import _differs, _kept, fork, fork_kernel, fork_server, keep_fork_server
from g2d.notebooks import run_notebook
from g2d.runs import _do
from g2d.threads import in_processes

pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='processes are forked on Linux only')


@pytest.fixture(scope='module')
def server():
    "One server for the tests of this file; its imports take five seconds."
    outside = os.environ.pop('G2D_FORK_SERVER', None)
    with fork_server(): yield os.environ['G2D_FORK_SERVER']
    assert 'G2D_FORK_SERVER' not in os.environ
    if outside: os.environ['G2D_FORK_SERVER'] = outside


@pytest.fixture
def module(tmp_path):
    "A module of functions that a copy can import, and the path for it."
    (tmp_path/'asked.py').write_text("""
import atexit, json, os, random, subprocess, sys, threading, time
def tell(path):
    import numpy, torch
    json.dump(dict(pid=os.getpid(), parent=os.getppid(), session=os.getsid(0), folder=os.getcwd(), seen=os.environ.get('SEEN'), gone=os.environ.get('GONE'), path=sys.path[0], torch='torch._dynamo' in sys.modules,
                   stdin=sys.stdin.read(), g2d=sorted(n for n in sys.modules if n.startswith('g2d')), random=[random.random(), float(numpy.random.rand())], threads=torch.get_num_threads()), open(path, 'w'))
def fail(): raise ValueError('no such film')
def late(path):
    atexit.register(lambda: open(path + '/at_exit', 'w').close())
    threading.Thread(target=lambda: (time.sleep(.3), open(path + '/thread', 'w').close())).start()
def stay(path):
    open(path, 'w').write(str(os.getpid())); time.sleep(60)
def compute(path):
    import torch
    x = torch.rand(600, 600, generator=torch.manual_seed(0))
    torch.save((torch.nn.functional.conv2d(x[None, None], x[None, None, :9, :9]), x @ x, torch.get_num_threads()), path)
""")
    return [str(tmp_path), *(x for x in sys.path if x)]


def alive(pid):
    "Whether a process runs: one that has ended and waits for its parent does not."
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
    except OSError: return False

def soon(what, seconds=20):
    "Wait for something that must come."
    end = time.time() + seconds
    while time.time() < end:
        if found := what(): return found
        time.sleep(.05)
    raise AssertionError('it did not come')


def test_a_copy_is_like_a_new_python(server, module, tmp_path):
    "Working folder, variables, path, streams and random numbers are its own; libraries are there, g2d is not; it leads a session where that was asked for."
    (tmp_path/'there').mkdir()
    found = []
    for k in range(2):
        copy = fork('asked:tell', dict(path=str(tmp_path/f'{k}.json')), {k: v for k, v in os.environ.items() if k != 'HOME'} | dict(SEEN='yes'), tmp_path/'there', module, session=bool(k))
        assert copy.wait(60) == 0
        found.append(json.loads((tmp_path/f'{k}.json').read_text()) | dict(known=copy.pid))
    for k, it in enumerate(found):
        assert it['pid'] == it['known'] != os.getpid() and it['folder'] == str(tmp_path/'there') and it['seen'] == 'yes' and it['path'] == str(tmp_path) and it['stdin'] == ''
        assert it['torch'] and not it['g2d'] and (it['session'] == it['pid']) == bool(k)
    assert found[0]['parent'] == found[1]['parent'] and not set(found[0]['random']) & set(found[1]['random'])


def test_how_it_ended_is_told(server, module, tmp_path, capfd):
    "Exit status, an error with its traceback on the client's stream, a signal; what is left for the end is done."
    assert fork('os:_exit', dict(status=5), os.environ).wait(60) == 5
    assert fork('asked:fail', {}, os.environ, path=module).wait(60) == 1 and 'ValueError: no such film' in capfd.readouterr().err
    assert fork('sys:exit', {}, os.environ).wait(60) == 0
    assert fork('asked:late', dict(path=str(tmp_path)), os.environ, path=module).wait(60) == 0 and (tmp_path/'thread').exists() and (tmp_path/'at_exit').exists()
    copy = fork('asked:stay', dict(path=str(tmp_path/'pid')), os.environ, path=module)
    assert copy.poll() is None
    with pytest.raises(subprocess.TimeoutExpired): copy.wait(.1)
    copy.terminate()
    assert copy.wait(20) == -signal.SIGTERM == copy.poll()
    copy.kill()     # of what has ended: nothing happens


def test_it_ends_with_its_client(server, module, tmp_path):
    "A client that hangs up, or that is killed, leaves no process behind; nor is it left as a zombie."
    copy = fork('asked:stay', dict(path=str(tmp_path/'pid')), os.environ, path=module)
    pid = copy.pid
    assert alive(pid)
    del copy
    soon(lambda: not Path(f'/proc/{pid}').exists())
    code = f"import os, sys; from g2d.fork_server import fork; c = fork('asked:stay', dict(path={str(tmp_path/'other')!r}), os.environ, path={module!r}); print(c.pid, flush=True); sys.stdin.read()"
    client = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | dict(PYTHONPATH=os.pathsep.join(module)))
    pid = int(client.stdout.readline())
    assert alive(pid)
    client.kill(); client.wait()
    soon(lambda: not Path(f'/proc/{pid}').exists())


def test_all_end_with_who_started_the_server(tmp_path, module):
    "After `kill -9` of the starter the server goes, and its copies, and its folder."
    code = f"import os, time; from g2d.fork_server import *\nwith fork_server():\n c = fork('asked:stay', dict(path={str(tmp_path/'pid')!r}), os.environ, path={module!r}); print(os.environ['G2D_FORK_SERVER'], c.pid, flush=True); time.sleep(60)"
    environment = {k: v for k, v in os.environ.items() if k != 'G2D_FORK_SERVER'} | dict(PYTHONPATH=os.pathsep.join(module))
    starter = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=environment)
    address, pid = starter.stdout.readline().split()
    assert Path(address).exists() and Path(address).parent.stat().st_mode & 0o77 == 0 and alive(int(pid))
    starter.kill(); starter.wait()
    soon(lambda: not alive(int(pid)) and not Path(address).parent.exists())


def test_a_doubt_ends_in_an_ordinary_start(server, monkeypatch, tmp_path):
    "Variables that libraries have read, no server, a server that is gone, another kernel."
    assert _differs(dict(OMP_NUM_THREADS='1'), dict(OMP_NUM_THREADS='2'), ['OMP_NUM_THREADS']) == [] and _differs({}, dict(LD_PRELOAD='x', HOME='y'), []) == ['LD_PRELOAD']
    assert fork('sys:exit', {}, os.environ | dict(OMP_NUM_THREADS='77')) is None
    assert fork('sys:exit', {}, os.environ | dict(OMP_NUM_THREADS='77'), late=['OMP_NUM_THREADS']).wait(60) == 0
    assert fork_kernel(['R', '--slave'], os.environ) is None and fork_kernel([sys.executable, '-m', 'xeus'], os.environ) is None
    for address in ('off', str(tmp_path/'nobody')):
        monkeypatch.setenv('G2D_FORK_SERVER', address)
        assert fork('sys:exit', {}, os.environ) is None
        with fork_server(): assert os.environ['G2D_FORK_SERVER'] == address     # what is set is left alone
        in_processes('os:mkdir', [dict(path=str(tmp_path/Path(address).name))], 1)
        assert (tmp_path/Path(address).name).is_dir()


def test_a_system_without_room_ends_nothing(tmp_path, monkeypatch):
    "Where no process can be started the client is told so, and the server and what it started go on."
    code = f"""
import os
from g2d import fork_server as f
real, asked = os.fork, []
def fork():
    asked.append(1)
    if len(asked) == 2: raise OSError(11, 'no process left')
    return real()
os.fork, f._load = fork, lambda: None
f._main({str(tmp_path/'s')!r})"""
    server = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE)
    monkeypatch.setenv('G2D_FORK_SERVER', str(tmp_path/'s'))
    soon((tmp_path/'s').exists)
    first = fork('subprocess:call', dict(args=['sleep', '30']), os.environ)
    assert fork('sys:exit', {}, os.environ) is None
    assert fork('sys:exit', {}, os.environ).wait(60) == 0 and first.poll() is None
    server.stdin.close()
    assert server.wait(20) == 0 and first.wait(20) == -signal.SIGKILL


def test_a_helper_computes_the_same(server, module, tmp_path, monkeypatch):
    "A copy and a new Python give the same bits, on the same number of threads."
    import torch
    monkeypatch.syspath_prepend(module[0])
    results = []
    for name, address in (('copy', server), ('new', 'off')):
        monkeypatch.setenv('G2D_FORK_SERVER', address)
        in_processes('asked:compute', [dict(path=str(tmp_path/f'{name}{k}.pt')) for k in range(2)], 2)
        results += [torch.load(tmp_path/f'{name}{k}.pt', weights_only=True) for k in range(2)]
    for other in results[1:]: assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1]) and results[0][2] == other[2]


def notebook(path, *cells):
    import nbformat as nbf
    nb = nbf.v4.new_notebook(cells=[nbf.v4.new_code_cell(c) for c in cells], metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    nb.cells[0].metadata.tags = ['parameters']
    nbf.write(nb, path)


def test_a_kernel_comes_from_the_server(server, tmp_path):
    "A run is a copy of the server, in the folder of its notebook; a failing cell and a kernel that dies are told as ever."
    for name, last in (('good', "print('fine')"), ('bad', "1/0"), ('dead', "os._exit(9)")):
        notebook(tmp_path/f'{name}.ipynb', 'folder: str = ""', "import json, os, sys\nfrom g2d.notebooks import write_metrics\nwrite_metrics(folder, parent=os.getppid(), there=os.getcwd(), torch=str('torch._dynamo' in sys.modules), session=str(os.getsid(0) == os.getpid()))", last)
    folder = run_notebook(tmp_path/'good.ipynb', {}, output_root=tmp_path/'out', progress=False)
    found = json.loads((folder/'metrics.json').read_text())
    assert found['parent'] != os.getpid() and found['there'] == str(tmp_path) and found['torch'] == 'True' and found['session'] == 'True'
    assert 'fine' in (folder/'log.txt').read_text() and not (folder/'kernel.json').exists()
    for name, word in (('bad', 'ZeroDivisionError'), ('dead', 'kernel died')):
        with pytest.raises(Exception, match=word): run_notebook(tmp_path/f'{name}.ipynb', {}, output_root=tmp_path/'out', progress=False)


def test_the_worker_of_a_batch_keeps_one(tmp_path, monkeypatch):
    "It is started for a run that has others before it, with the threads of the row; another number of threads gets another server."
    monkeypatch.delenv('G2D_FORK_SERVER', raising=False)
    notebook(tmp_path/'n.ipynb', 'k: int = 0\nfolder: str = ""', "import os, sys\nfrom g2d.notebooks import write_metrics\nwrite_metrics(folder, parent=os.getppid(), threads=os.environ.get('OMP_NUM_THREADS'), torch=str('torch._dynamo' in sys.modules))")
    found, servers = [], []
    try:
        for k, (threads, copy) in enumerate(((1, False), (1, True), (1, True), (2, True))):
            job = dict(id=str(k), notebook=str(tmp_path/'n.ipynb'), parameters=dict(k=k), folder=str(tmp_path/f'r{k}'), again=False, parts=dict(cells=[], parameters={}, version='', store=None), since=None, threads=threads)
            assert _do(job, copy)['state'] == 'done'
            found.append(json.loads((tmp_path/f'r{k}'/'metrics.json').read_text()))
            servers.append(os.environ.get('G2D_FORK_SERVER'))
    finally:
        if 'server' in _kept: _kept.pop('server').__exit__(None, None, None); _kept.clear()
    assert [f['torch'] for f in found] == ['False', 'True', 'True', 'True'] and [f['threads'] for f in found] == ['1', '1', '1', '2']
    assert found[0]['parent'] == os.getpid() and found[1]['parent'] == found[2]['parent'] != found[3]['parent']
    assert servers[0] is None and servers[1] == servers[2] != servers[3] and 'G2D_FORK_SERVER' not in os.environ
