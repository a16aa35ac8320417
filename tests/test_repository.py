"What must never be committed: paths of one machine, private registries, data, weights, text of real reports."
import re, subprocess
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def tracked():
    "Files git tracks; before the first commit, those it would add."
    for others in ([], ['--cached', '--others', '--exclude-standard']):
        try: done = subprocess.run(['git', 'ls-files', '-z', *others], cwd=root, capture_output=True, text=True)
        except FileNotFoundError: pytest.skip('git is not installed')
        if done.returncode: pytest.skip('this is no git checkout')
        files = [root/name for name in done.stdout.split('\0') if name and (root/name).is_file()]
        if len(files) > 20: return files
    pytest.fail(f'git lists only {len(files)} files')


def lines(paths):
    for path in paths:
        if path.suffix in ('.png', '.ico', '.svg', '.pdf', '.woff2'): continue
        for number, line in enumerate(path.read_text(encoding='utf-8', errors='replace').splitlines(), 1): yield f'{path.relative_to(root)}:{number}', line


slash = '/'     # so that these patterns do not find themselves
machine = re.compile(rf'(?<![\w.~*}}-]){slash}(?:work|root|home{slash}[a-z_][\w.-]*|Users{slash}\w+|mnt{slash}[a-z]\w*|workspace){slash}')
registry = re.compile(r'(?i)\b(?:arti' r'factory|jfr' r'og|dev' r'pi|nex' r'us)\b|(?:extra-)?index-' r'url[= ]+https?://(?!pypi\.org|download\.pytorch\.org)|(?:10|127|192\.168)(?:\.\d{1,3}){2,3}:\d{2,5}')
allowed = re.compile('127' r'\.0\.0\.1')      # a server on one's own machine is no registry


def test_no_path_of_one_machine(tracked):
    found = [f'{where}: {machine.search(line)[0]}' for where, line in lines(tracked) if machine.search(line)]
    assert not found, found[:10]


def test_no_private_registry(tracked):
    found = [f'{where}: {registry.search(line)[0]}' for where, line in lines(tracked) if registry.search(line) and not allowed.search(line)]
    assert not found, found[:10]


def test_the_patterns_can_find_something():
    for bad in ('/' + 'work/shared', 'open("/' + 'root/x")', '=/' + 'home/ann/data'): assert machine.search(bad)
    for good in ('https://example.org/' + 'work/x', '../' + 'work/x', 'tmp_path/' + 'root/x', '~/' + 'work/'): assert not machine.search(good)
    for bad in ('https://arti' + 'factory.example.org', '--index-' + 'url https://example.org/simple'): assert registry.search(bad)
    for good in ('--index-' + 'url https://download.pytorch.org/whl/cpu', 'version 10.2.1'): assert not registry.search(good)


def test_no_data_and_no_weights(tracked):
    kinds = set('.npy .npz .parquet .safetensors .pth .pt .ckpt .bin .onnx .pkl .pickle .h5 .hdf5 .dcm .nii .gz .zip .tgz .tar .whl .jpg .jpeg .tif .tiff .mp4'.split())
    assert not [str(p.relative_to(root)) for p in tracked if p.suffix.lower() in kinds]
    large = {str(p.relative_to(root)): f'{p.stat().st_size/2**20:.1f} MB' for p in tracked if p.stat().st_size > 2**20}
    assert not large, large
    outputs = [p for p in tracked if p.relative_to(root).parts[0] == 'outputs']
    assert [p.name for p in outputs] in ([], ['README.md'])


def test_no_secret(tracked):
    keys = re.compile('-----BEGIN ' r'[A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b|\bghp_[A-Za-z0-9]{36}\b|\bhf_[A-Za-z]{30,}\b')
    assert not [where for where, line in lines(tracked) if keys.search(line)]


def shingles(text, n=12):
    words = re.findall(r'[a-z]+', text.lower())
    return [' '.join(words[i:i+n]) for i in range(len(words) - n + 1)]


def test_no_text_of_real_reports(tracked, data_root):
    "No twelve words in a row of a real report, note or caption, unless many reports use them (set phrases)."
    import pandas as pd
    from collections import Counter
    from g2d.data.reports import read_open_i
    texts = []
    for path in data_root.glob('*/*/*.csv'):
        if 'text' in pd.read_csv(path, nrows=0): texts += pd.read_csv(path, usecols=['text']).text.dropna().tolist()
    archive = data_root/'noncommercial/iu_reports_verbatim_ccbyncnd/NLMCXR_reports.tgz'
    if archive.is_file():
        table = read_open_i(archive)
        texts += table.findings.dropna().tolist() + table.impression.dropna().tolist()
    if not texts: pytest.skip('no texts in the data root')
    real = Counter(s for text in set(texts) for s in set(shingles(text)))
    rare = {s for s, n in real.items() if n <= 3}
    assert len(rare) > 10_000
    for path in tracked:
        if path.suffix in ('.png', '.svg', '.pdf'): continue
        copied = [s for s in shingles(path.read_text(encoding='utf-8', errors='replace')) if s in rare]
        assert not copied, f'{path.relative_to(root)} holds the words of a real text ({len(copied)} runs of twelve words)'
