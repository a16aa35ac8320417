"The site: every module has a page, every command on a page exists, no path of one machine, and (slow) a build without warnings, links that lead somewhere, alternative text."
import importlib.util, re, shlex, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse
import pytest

root = Path(__file__).resolve().parents[1]
docs = root/'docs'
WRITTEN = [p for p in sorted(docs.rglob('*.md')) if p.relative_to(docs).parts[0] not in ('_build', 'notebooks', 'reference', 'results', 'data_sets')]


@pytest.fixture(scope='module')
def site():
    "The writers of the pages, imported as Sphinx does."
    sys.path.insert(0, str(docs))
    try:
        import pages, pages_notebooks, pages_reference, pages_tables
        yield pages, pages_notebooks, pages_reference, pages_tables
    finally: sys.path.remove(str(docs))


def commands():
    "Lines of the shell blocks, with continued ones joined: (page, words)."
    for page in WRITTEN:
        for block in re.findall(r'^```sh\n(.*?)^```', page.read_text(encoding='utf-8'), re.S | re.M):
            for line in block.replace('\\\n', ' ').splitlines():
                words = shlex.split(line, comments=True)
                if 'g2d' in words: yield page.relative_to(docs).as_posix(), words[words.index('g2d') + 1:]


def test_every_command_on_a_page_exists():
    import typer
    from g2d.cli import app
    known, seen = typer.main.get_command(app).commands, 0
    for page, (name, *words) in commands():
        assert name in known, f'{page}: there is no command g2d {name}'
        options = {o for p in known[name].params for o in (*p.opts, *p.secondary_opts)}
        unknown = [w for w in words if w.startswith('--') and w.partition('=')[0] not in options]
        assert not unknown, f'{page}: g2d {name} has no option {unknown[0]}'
        seen += 1
    assert seen > 15


def test_every_public_module_has_a_page(site):
    reference = site[2]
    files = {'g2d.' + '.'.join(p.relative_to(root/'g2d').with_suffix('').parts) for p in (root/'g2d').rglob('*.py') if not p.name.startswith('_')}
    assert set(reference.modules()) == files
    assert set(reference.notebook_modules().values()) <= files and len(reference.notebook_modules()) >= len(files) - 2


def test_a_reference_page_shows_the_comments_beside_parameters(site):
    page = site[2].module_page('g2d.pseudo_mask')
    assert '| `percentile` | `float` | `0.85` | q; a score is kept if it reaches this quantile (paper) |' in page
    page = site[2].module_page('g2d.data.prepare')
    assert '`Listing`' in page and 'its row as a spreadsheet counts: the header is row 1' in page


def test_every_notebook_is_a_page(site):
    wanted = {p.relative_to(root/'nbs').as_posix() for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts} - {'index.ipynb', 'explorer_app.ipynb'}   # the README, and the app itself
    assert set(site[1].notebooks()) == wanted


def test_pictures_of_notebooks_get_words_and_plumbing_is_hidden(site):
    notebooks = site[1]
    cells = [dict(cell_type='markdown', metadata={}, source='# A title\n\n> below'), dict(cell_type='code', metadata={}, source='#| default_exp x', outputs=[]),
             dict(cell_type='code', metadata={}, source='#| hide\nimport os', outputs=[]), dict(cell_type='markdown', metadata={}, source='## A heading\n\nFirst words. The mask covers **nine** cells:'),
             dict(cell_type='code', metadata={}, source='#| slow\nax.set_title("kept cells")', outputs=[]), dict(cell_type='markdown', metadata={}, source='See [a](../data/x.ipynb) and [b](gone/y.py).')]
    made = notebooks.clean('models/m.ipynb', cells, {'data/x.ipynb': 0}, {})
    assert [c.get('metadata', {}).get('tags') for c in made] == [None, ['remove-cell'], None, ['skip-execution'], None]
    assert made[3]['metadata']['mystnb']['image']['alt'] == 'First words. The mask covers nine cells. Labels: kept cells.' and made[3]['source'] == 'ax.set_title("kept cells")'
    assert made[4]['source'] == 'See [a](../data/x.ipynb) and b (`nbs/models/gone/y.py`).'


def test_every_committed_table_has_its_command(site):
    about = site[3].evidence()[0]
    tables = [p.relative_to(root/'results').as_posix() for p in (root/'results').rglob('*.csv')]
    missing = [t for t in tables if t not in about and str(Path(t).parent) + '/' not in about]
    assert tables and not missing, f'results/README.md and benchmarks.md say nothing about {missing}'


def test_the_glossary_is_sorted_and_has_no_twins():
    terms = re.findall(r'^(.+)\n: ', (docs/'concepts'/'glossary.md').read_text(encoding='utf-8'), re.M)
    assert len(terms) >= 30 and terms == sorted(set(terms), key=str.casefold)


def test_written_pages_hold_no_path_of_one_machine():
    slash = '/'
    machine = re.compile(rf'(?<![\w.~*}}-]){slash}(?:work|root|tmp|home{slash}[a-z_]|Users{slash}\w|workspace)(?:{slash}|\b)')
    assert machine.search(f'in {slash}tmp{slash}x')
    assert not [f'{p.name}: {m[0]}' for p in WRITTEN for m in [machine.search(p.read_text(encoding='utf-8'))] if m]


class Page(HTMLParser):
    "Links, anchors and pictures of one page."
    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.wordless = [], set(), []
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, pairs):
        given = dict(pairs)
        self.anchors.update(v for k, v in pairs if k in ('id', 'name') and v)
        if tag in ('a', 'link') and given.get('href'): self.links.append(given['href'])
        if tag in ('img', 'script', 'source', 'iframe') and given.get('src'): self.links.append(given['src'])
        if tag == 'img' and not (given.get('alt') or '').strip(): self.wordless.append(given.get('src', '')[-60:])


def build(out):
    "The site, built without a warning: path -> page."
    done = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', '-d', str(out/'doctrees'), str(docs), str(out/'html')], capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    return {p.resolve(): Page(p) for p in (out/'html').rglob('*.html') if '_static' not in p.parts}   # the theme's templates lie there


def broken_links(top, pages):
    "Links inside the site whose file or anchor does not exist."
    for path, page in pages.items():
        for link in page.links:
            url = urlparse(link)
            if url.scheme or url.netloc: continue
            target = (path if not url.path else path.parent/unquote(url.path)).resolve()
            if target.is_dir(): target = target/'index.html'
            if not target.is_file(): yield f'{path.relative_to(top)}: {link}'
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors: yield f'{path.relative_to(top)}: no anchor {link}'


FOREIGN = re.compile(r'<(?:script|img|source)[^>]+src="(https?:[^"]+)|<link[^>]+rel="stylesheet"[^>]+href="(https?:[^"]+)')


def test_the_checks_of_a_page_can_fail(tmp_path):
    (tmp_path/'a.html').write_text('<h1 id="here">A</h1><a href="#here">x</a><a href="#gone">x</a><a href="b.html">x</a><img src="c.png" alt=" "><img src="https://example.org/d.png" alt="d">')
    (tmp_path/'c.png').write_bytes(b'')
    page = {(tmp_path/'a.html').resolve(): Page(tmp_path/'a.html')}
    assert list(broken_links(tmp_path.resolve(), page)) == ['a.html: no anchor #gone', 'a.html: b.html']
    assert next(iter(page.values())).wordless == ['c.png'] and FOREIGN.search((tmp_path/'a.html').read_text())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_site_builds_without_a_warning_and_every_link_and_picture_is_right(tmp_path):
    "One test, so that several processes do not build at the same time."
    for name in ('myst_nb', 'pydata_sphinx_theme', 'latex2mathml'):
        if importlib.util.find_spec(name) is None: pytest.skip('the extra docs is not installed: make docs-test')
    pages, top = build(tmp_path), (tmp_path/'html').resolve()
    assert len(pages) > 100
    broken = list(broken_links(top, pages))
    assert not broken, f'{len(broken)} links: {broken[:20]}'
    wordless = [f'{p.relative_to(top)}: {src}' for p, page in pages.items() for src in page.wordless]
    assert not wordless, f'{len(wordless)} pictures without alternative text: {wordless[:20]}'
    texts = {p.relative_to(top).as_posix(): p.read_text(encoding='utf-8') for p in pages}
    assert not {name: found[0] for name, text in texts.items() if (found := FOREIGN.search(text))}, 'a page loads something from a network'
    assert not [name for name, text in texts.items() if str(root) in text], 'a page holds the path of this checkout'
