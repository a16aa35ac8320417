"Settings: environment over file over defaults; mistakes are named. Files: whole or not at all."
import errno, os
from pathlib import Path
import pytest
from g2d.settings import G2DError, find_settings, load_settings
import g2d.files as files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty folder to work in, without any of our variables."
    for name in ('G2D_DATA', 'G2D_OUTPUTS', 'G2D_DEVICE', 'G2D_WORKERS', 'G2D_SETTINGS'): monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ini(folder, text, name='settings.ini'):
    (folder/name).write_text(text, encoding='utf-8')
    return folder/name


def test_defaults(folder):
    s = load_settings(folder)
    assert s.data_root is None and s.output_root == folder/'outputs'
    assert set(s.came_from.values()) == {'default'} and set(s.came_from) == {'data_root', 'output_root', 'device', 'workers'}


def test_environment_over_file_over_default(folder, monkeypatch):
    path = ini(folder, '[g2d]\ndata_root = raw\nworkers = 3\ndevice = cuda:1\n')
    s = load_settings(folder)
    assert (s.data_root, s.workers, s.device, s.output_root) == (folder/'raw', 3, 'cuda:1', folder/'outputs')
    assert s.came_from == dict(data_root=str(path), workers=str(path), device=str(path), output_root='default')
    monkeypatch.setenv('G2D_DATA', '/elsewhere'); monkeypatch.setenv('G2D_WORKERS', '0'); monkeypatch.setenv('G2D_DEVICE', 'cpu'); monkeypatch.setenv('G2D_OUTPUTS', 'here')
    s = load_settings(folder)
    assert (s.data_root, s.workers, s.device, s.output_root) == (Path('/elsewhere'), 0, 'cpu', folder/'here')
    assert s.came_from['data_root'] == 'environment G2D_DATA'
    monkeypatch.setenv('G2D_DATA', '')                                    # an empty variable is none
    assert load_settings(folder).data_root == folder/'raw'


def test_relative_paths(folder, monkeypatch):
    "In the file: relative to the file. In the environment: relative to the working folder."
    ini(folder, '[g2d]\ndata_root = ../raw\noutput_root = ~/runs\n')
    work = folder/'nbs'/'data'; work.mkdir(parents=True)
    monkeypatch.chdir(work); monkeypatch.setenv('HOME', str(folder/'home'))
    s = load_settings()
    assert s.data_root == folder.parent/'raw' and s.output_root == folder/'home'/'runs'
    monkeypatch.setenv('G2D_OUTPUTS', 'runs')
    assert load_settings().output_root == work/'runs'


def test_which_file(folder, monkeypatch):
    outer = ini(folder, '[g2d]\nworkers = 1\n')
    inner = folder/'a'; inner.mkdir()
    assert find_settings(inner) == outer
    ini(inner, '[other]\nworkers = 9\n')                                  # someone else's settings.ini
    assert find_settings(inner) == outer and load_settings(inner).workers == 1
    named = ini(folder, '[g2d]\nworkers = 2\n', 'mine.ini')
    monkeypatch.setenv('G2D_SETTINGS', str(named))
    assert load_settings(inner).workers == 2
    monkeypatch.setenv('G2D_SETTINGS', str(folder/'none.ini'))
    with pytest.raises(G2DError, match='G2D_SETTINGS names .*none.ini, which is not a file'): load_settings(inner)


@pytest.mark.parametrize('text,message', [
    ('[g2d]\noutputs_root = x\n', 'unknown key "outputs_root".*known keys are data_root, output_root, device, workers'),
    ('[g2d]\nworkers = many\n', 'workers in .*settings.ini is "many"'), ('[g2d]\nworkers = -1\n', 'workers'), ('[g2d]\nworkers = 1.5\n', 'workers'),
    ('[g2d]\nnonsense\n', 'not a valid settings file'), ('[g2d]\ndevice = cpu\ndevice = cuda\n', 'not a valid settings file'),
    ('[g2d]\n[g2d]\n', 'not a valid settings file'), ('device = cpu\n[g2d]\n', 'not a valid settings file')])
def test_mistakes_in_the_file(folder, text, message):
    path = ini(folder, text)
    with pytest.raises(G2DError, match=message) as error: load_settings(folder)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_mistake_in_the_environment(folder, monkeypatch):
    monkeypatch.setenv('G2D_WORKERS', 'two')
    with pytest.raises(G2DError, match='workers in environment G2D_WORKERS is "two"'): load_settings(folder)


def test_percent_and_empty_values(folder):
    ini(folder, '[g2d]\ndata_root = 50%_sample\noutput_root =\n')
    s = load_settings(folder)
    assert s.data_root == folder/'50%_sample' and s.came_from['output_root'] == 'default'


def test_auto_is_resolved_when_read(folder, monkeypatch):
    s = load_settings(folder)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(12)), raising=False)
    assert s.workers == 6 and s.device in ('cpu', 'cuda')
    for cores, workers in ((1, 0), (2, 0), (3, 1), (64, 8)):
        monkeypatch.setattr(os, 'sched_getaffinity', lambda pid, n=cores: set(range(n)), raising=False)
        assert load_settings(folder).workers == workers


def test_the_repository_file_is_valid(monkeypatch):
    for name in ('G2D_DATA', 'G2D_OUTPUTS', 'G2D_DEVICE', 'G2D_WORKERS', 'G2D_SETTINGS'): monkeypatch.delenv(name, raising=False)
    top = Path(__file__).resolve().parents[1]
    assert load_settings(top/'tests').output_root == top/'outputs'


# --------------------------------------------------------------------------------------------------------------- files
def test_atomic_path(tmp_path):
    path = tmp_path/'a.txt'
    with files.atomic_path(path) as t: t.write_text('old')
    for error, raised in ((RuntimeError('x'), RuntimeError), (KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, 'No space left on device'), G2DError)):
        with pytest.raises(raised):
            with files.atomic_path(path) as t:
                t.write_text('half')
                raise error
        assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a.txt']


def test_full_disk_is_one_sentence():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): assert 'disk is full' in str(files.explain_os_error(OSError(number, 'x'), 'a.txt'))
    assert 'cannot be written' in str(files.explain_os_error(PermissionError(errno.EACCES, 'Permission denied'), 'a.txt'))


def test_json(tmp_path):
    files.write_json(tmp_path/'a.json', dict(b=1, a=Path('x')))
    assert files.read_json(tmp_path/'a.json') == dict(a='x', b=1)
    with pytest.raises(ValueError): files.write_json(tmp_path/'a.json', float('inf'))
    assert files.read_json(tmp_path/'a.json') == dict(a='x', b=1)
    (tmp_path/'b.json').write_bytes(b'\xff')
    with pytest.raises(G2DError, match='b.json is not valid JSON'): files.read_json(tmp_path/'b.json')
    with pytest.raises(G2DError, match='c.json does not exist'): files.read_json(tmp_path/'c.json')
