"The package is what the notebooks export, the notebooks are clean, and the two configuration files agree."
import configparser, os, shutil, subprocess, sys
from pathlib import Path
import pytest

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib

root = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A copy of the repository in which the package was exported anew and the notebooks were cleaned."
    pytest.importorskip('nbdev', reason='nbdev is in the extra [dev]')
    copy = tmp_path_factory.mktemp('copy')
    shutil.copytree(root/'nbs', copy/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__'))
    (copy/'g2d').mkdir()
    shutil.copy(root/'g2d/__init__.py', copy/'g2d/__init__.py')          # modules start from nothing: one without notebook shows up
    for name in ('pyproject.toml', 'settings.ini'): shutil.copy(root/name, copy/name)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}        # nbdev exports nothing while IN_TEST is set
    for call in ('from nbdev.doclinks import nbdev_export as run', 'from nbdev.clean import nbdev_clean as run'):
        done = subprocess.run([sys.executable, '-c', f'{call}\nrun()'], cwd=copy, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return copy


def tree(folder, pattern):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob(pattern))
            if not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)}


def test_package_is_what_the_notebooks_export(exported):
    ours, fresh = tree(root/'g2d', '*.py'), tree(exported/'g2d', '*.py')
    assert set(ours) == set(fresh), f'only in g2d: {sorted(set(ours) - set(fresh))}; not exported yet: {sorted(set(fresh) - set(ours))}'
    changed = [name for name in ours if ours[name] != fresh[name]]
    assert not changed, f'run nbdev-export: {changed} differ from their notebooks'


def test_notebooks_are_clean(exported):
    ours, fresh = tree(root/'nbs', '*.ipynb'), tree(exported/'nbs', '*.ipynb')
    dirty = [name for name in ours if ours[name] != fresh[name]]
    assert not dirty, f'run nbdev-clean: {dirty}'


def test_cleaning_keeps_the_parameters_tag(exported):
    found = [name for name, text in tree(exported/'nbs/experiments', '*.ipynb').items() if b'"parameters"' in text]
    assert len(found) == len(list((root/'nbs/experiments').glob('*.ipynb'))) > 0


def test_settings_ini_and_pyproject_agree():
    project = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(root/'settings.ini', encoding='utf-8')
    ours, nbdev = ini['project'], project['tool']['nbdev']
    assert ours['lib_name'] == project['project']['name'] == 'g2d'
    assert ours['version'] == project['project']['version']
    assert (ours['lib_path'], ours['nbs_path']) == (nbdev['lib_path'], nbdev['nbs_path'])
    import g2d
    assert g2d.__version__ == ours['version']
    assert set(ours) == {'lib_name', 'version', 'lib_path', 'nbs_path'}, 'a shared key without a check'


def test_subpackages_reach_the_wheel():
    "nbdev's own template leaves them out (toolchain sheet 1.5.2)."
    project = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))
    assert 'g2d*' in project['tool']['setuptools']['packages']['find']['include']
    for folder in {p.parent for p in (root/'g2d').rglob('*.py')}: assert (folder/'__init__.py').is_file(), f'{folder.relative_to(root)} has no __init__.py'
