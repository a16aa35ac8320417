"The lessons: every one has the parts that it promises, runs from top to bottom, and every picture of it has a caption and a text for those who cannot see it."
import ast, json, re, time
from html.parser import HTMLParser
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
lessons = sorted((root/'nbs'/'lessons').glob('[0-9]*.ipynb'), key=lambda p: int(p.stem.split('_')[0]))
every = pytest.mark.parametrize('path', lessons, ids=lambda p: p.stem)


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']


def source(cell): return ''.join(cell['source'])


def texts(path): return [source(c) for c in cells(path) if c['cell_type'] == 'markdown']


def tags(cell): return cell['metadata'].get('tags', [])


def section(path, title):
    "The cells from a `## title` up to the next `##`."
    found, inside = [], False
    for c in cells(path):
        if c['cell_type'] == 'markdown' and source(c).startswith('## '): inside = source(c).startswith(f'## {title}')
        if inside: found.append(c)
    return found


class Pictures(HTMLParser):
    "Attributes of every img of an HTML text."
    def __init__(self, text): super().__init__(); self.found = []; self.feed(text)
    def handle_starttag(self, tag, attributes):
        if tag == 'img': self.found.append(dict(attributes))


def test_there_are_lessons():
    numbers = [int(p.stem.split('_')[0]) for p in lessons]
    assert set(range(1, 9)) | {10} <= set(numbers) and len(numbers) == len(set(numbers))


@every
def test_opens_with_a_goal(path):
    found = texts(path)
    number = path.stem.split('_')[0]
    assert re.match(rf'# Lesson {number}: \S.*\n\n> \S', found[0]), 'the title is "# Lesson N: ..." with a subtitle'
    goals = re.findall(r'^\*\*Goal\.\*\* ([^\n]+)', '\n'.join(found), re.M)
    assert len(goals) == 1 and goals[0].count('. ') == 0 and goals[0].endswith('.'), 'one goal, in one sentence'
    assert 'What is real here' in '\n'.join(found[:2]), 'says what is trained and what is random or constructed'


@every
def test_five_minutes_of_reading(path):
    words = sum(len(re.findall(r"[\w']+", t)) for t in texts(path))
    assert 350 <= words <= 1500, f'{words} words; 200 to 300 are read in a minute'


@every
def test_equation_beside_code(path): assert path.stem == '10_checklist' or any('$$' in t for t in texts(path)), 'no equation'


@every
def test_two_exercises_with_checked_answers(path):
    found = section(path, 'Exercises')
    words = '\n'.join(source(c) for c in found if c['cell_type'] == 'markdown')
    assert re.findall(r'\*\*Exercise (\d)\.\*\*', words) == ['1', '2']
    assert words.count('<details><summary>Answer</summary>\n\n') == words.count('\n\n</details>') == 2, 'two folded answers; markdown in them needs empty lines around it'
    answers = [c for c in found if 'answer' in tags(c)]
    assert len(answers) == 2
    for c in answers:
        assert c['cell_type'] == 'code' and 'hide-input' in tags(c), 'folded on the site'
        assert c['metadata'].get('jupyter', {}).get('source_hidden') is True, 'folded in JupyterLab'
        assert any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(source(c)))), f'nothing is checked in {source(c)[:60]!r}'


@every
def test_explorer_and_summary(path):
    heads = [t.split('\n')[0] for t in texts(path) if t.startswith('## ')]
    assert heads[-3:] == ['## Exercises', '## Try it in the explorer', '## Summary'], heads
    assert any('`g2d explore' in source(c) for c in section(path, 'Try it in the explorer'))
    last = cells(path)[-1]
    assert last['cell_type'] == 'markdown' and source(last).startswith('## Summary') and len(re.findall('^- ', source(last), re.M)) >= 3


@every
def test_short_cells(path):
    long = {source(c).split('\n')[0]: n for c in cells(path) if c['cell_type'] == 'code' and (n := len(source(c).split('\n'))) > 25}
    assert not long, f'cells of more than 25 lines: {long}'


@every
def test_caption_after_every_picture(path):
    "In the source, so that cells that draw only with real data count too; `test_runs` looks at what was drawn."
    all_cells = cells(path)
    drawing = [i for i, c in enumerate(all_cells) if c['cell_type'] == 'code' and 'show_figure(' in source(c)]
    assert drawing or path.stem == '9_mpma'
    for i in drawing:
        after = all_cells[i + 1]
        assert after['cell_type'] == 'markdown' and re.match(r'\*What to see: .{30,}\*(\n|$)', source(after).split('\n\n')[0] + '\n', re.S), f'no caption after {source(all_cells[i])[:60]!r}'


@every
def test_colours_for_everybody(path):
    code = '\n'.join(source(c) for c in cells(path) if c['cell_type'] == 'code')
    maps = set(re.findall(r"cmap='(\w+)'", code)) | set(re.findall(r"plt\.cm\.(\w+)\(", code))
    assert maps <= {'gray', 'viridis', 'cividis', 'inferno', 'PuOr'}, maps
    assert not re.search(r"""['"](red|green|r|g|jet|rainbow|RdYlGn|tab:red|tab:green)['"]""", code.replace("'g',", ''))


@every
def test_runs(path):
    "In this process, with what it displays; the time is printed, not judged."
    from execnb.shell import CaptureShell
    from fastcore.nbio import read_nb
    started, cpu = time.time(), time.process_time()
    notebook, shell = read_nb(path), CaptureShell(path, mpl_format=None)
    try: shell.run_all(notebook, exc_stop=True)
    finally: shell.close()
    print(f'\n{path.stem}: {time.time() - started:.0f} s, {time.process_time() - cpu:.0f} s of computing')
    pictures = 0
    for i, c in enumerate(notebook.cells):
        if c.cell_type != 'code': continue
        outputs = [o for o in c.get('outputs', []) if 'data' in o]
        assert not any(k.startswith('image/') for o in outputs for k in o['data']), f'a picture without a text in cell {i}; use show_figure'
        found = [a for o in outputs for a in Pictures(''.join(o['data'].get('text/html', ''))).found]
        pictures += len(found)
        for attributes in found:
            assert len(attributes.get('alt', '')) >= 40, f'cell {i}: alternative text {attributes.get("alt")!r}'
            assert len(attributes['src']) < 80_000, f'cell {i}: a picture of {len(attributes["src"])*3//4000} kB'
        if found: assert ''.join(notebook.cells[i + 1].source).startswith('*What to see: ')
    answers = [c for c in notebook.cells if 'answer' in c.metadata.get('tags', [])]
    assert all('checked' in str(c.outputs) for c in answers), 'an answer was not checked'
    assert pictures >= 4
