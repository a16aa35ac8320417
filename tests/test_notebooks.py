"Every notebook runs from top to bottom, and reads as the house style says."
import json, re
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
everything = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(root).parts))
experiments = [p for p in everything if 'experiments' in p.parts]
runnable = [p for p in everything if p not in experiments]       # experiments run through papermill, see test_experiments / test_runs


def name(path): return str(path.relative_to(root/'nbs')) if isinstance(path, Path) else None


def cells(path, kind=None):
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [c for c in found if kind in (None, c['cell_type'])]


def source(cell): return ''.join(cell['source'])


def test_there_are_notebooks():
    assert len(runnable) >= 10 and len(experiments) >= 1


@pytest.mark.parametrize('path', [p for p in runnable if 'lessons' not in p.parts], ids=name)   # lessons run in test_lessons
def test_runs(path, capfd):
    "As `nbdev-test` runs it, but in this process: heavy imports are paid once. Cells marked slow or cuda are skipped."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    config = get_config(root)
    ok, seconds = test_nb(path, skip_flags=config.tst_flags, basepath=config.config_path)
    if not ok:
        trace = capfd.readouterr().err                     # cell number and traceback, as nbdev prints them
        pytest.fail(trace if len(trace) < 5000 else f'{trace[:2500]}\n[...]\n{trace[-2500:]}', pytrace=False)


@pytest.mark.parametrize('path', everything, ids=name)
def test_opens_with_title_and_subtitle(path):
    first = source(cells(path)[0])
    assert cells(path)[0]['cell_type'] == 'markdown' and re.match(r'# \S.*\n\n> \S', first), f'{name(path)} begins with {first[:80]!r}; wanted "# Title", an empty line, "> subtitle"'


@pytest.mark.parametrize('path', everything, ids=name)
def test_no_long_cell(path):
    long = {source(c).split('\n')[0] + ' ...': len(source(c).split('\n')) for c in cells(path, 'code') if len(source(c).split('\n')) > 40}
    assert not long, f'cells of more than 40 lines: {long}'


@pytest.mark.parametrize('path', everything, ids=name)
def test_prose_beside_the_code(path):
    words = sum(len(re.findall(r'\w+', source(c))) for c in cells(path, 'markdown'))
    code = [c for c in cells(path, 'code') if not source(c).startswith('#| default_exp')]
    assert words >= 12 * len(code), f'{words} words for {len(code)} code cells; wanted 12 a cell'


@pytest.mark.parametrize('path', everything, ids=name)
def test_small_and_whole(path):
    assert path.stat().st_size < 2**20, f'{path.stat().st_size/2**20:.1f} MB'
    for cell in cells(path, 'code'):
        assert len(json.dumps(cell['outputs'])) < 2**20, f'the output of {source(cell)[:60]!r} is over 1 MB'
        assert not any(o['output_type'] == 'error' for o in cell['outputs']), f'a stored error after {source(cell)[:60]!r}'
        assert not re.search(r'^\s*from \S+ import \*', source(cell), re.M), 'import *'
        assert 'nbdev_export()' not in source(cell)
    ids = [c['id'] for c in cells(path)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize('path', everything, ids=name)
def test_parameters_cell(path):
    tagged = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == (path in experiments), f'{len(tagged)} cells are tagged "parameters"'


@pytest.mark.parametrize('path', runnable, ids=name)
def test_exports_where_its_name_says(path):
    targets = [m[1] for c in cells(path, 'code') for m in re.finditer(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M)]
    exports = any(re.search(r'^#\|\s*exports?\b', source(c), re.M) for c in cells(path, 'code'))
    if 'lessons' in path.parts or path.stem in ('index', 'explorer_app'): assert not targets and not exports
    else:
        expected = '.'.join([*path.relative_to(root/'nbs').parent.parts, re.sub(r'^\d+_', '', path.stem)])
        assert targets == [expected] and exports
