"README.md is what nbs/index.ipynb says, and what it points at exists."
import json, re
from pathlib import Path
import pytest

top = Path(__file__).resolve().parents[1]


def test_readme_is_made_from_the_index_notebook():
    from nbconvert import MarkdownExporter
    body, _ = MarkdownExporter().from_filename(str(top/'nbs'/'index.ipynb'))
    assert body.replace('](images/', '](nbs/images/').strip() == (top/'README.md').read_text(encoding='utf-8').strip(), 'run: make readme'


def test_links_of_the_readme_exist():
    text = (top/'README.md').read_text(encoding='utf-8')
    links = [link for link in re.findall(r'\]\(([^)#]+)\)', text) if '://' not in link]
    assert len(links) > 10
    missing = [link for link in links if not (top/link).exists()]
    assert not missing, missing


@pytest.mark.parametrize('path', ['README.md', 'nbs/index.ipynb', 'results/found.md', 'results/README.md'])
def test_every_figure_is_what_its_table_says(path):
    "A question behind a figure is asked again; g2d results found --update writes those of the page anew."
    from g2d.evidence import checked
    text = (top/path).read_text(encoding='utf-8')
    if path.endswith('.ipynb'): text = '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'])
    table = checked(text, top/'results')
    assert len(table) >= (100 if 'results' in path else 12)
    wrong = table[table['shown'] != table['answer']]
    assert not len(wrong), wrong.to_string()


def test_tables_of_the_results_are_made_of_committed_figures():
    "Each `mean ± half` of a row of the benchmark's tables is a figure of that method in its CSV."
    from g2d.evidence import plain
    from g2d.phantombench import bench_means, read_bench
    known, names = {}, {'G2D': 'g2d', 'global-only': 'global_only', 'global-only (ConVIRT/CLIP)': 'global_only', 'pixel reconstruction': 'reconstruction', 'G2D, masks of other films': 'shuffled', 'GLoRIA-style': 'gloria', 'MGCA-style': 'mgca',
             'MRM-style': 'mrm', 'MPMA-style': 'mpma', 'recommended': 'g2d', 'as paper': 'g2d as_paper', 'as released': 'g2d as_released', 'as paper: percentile over the image, nearest': 'mask as paper', 'bilinear': 'percentile of the image',
             'bilinear, percentile over the body (`recommended` but for its grid)': 'g2d', 'similarity instead of attention': 'similarity', 'similarity, best sentence': 'sentences', 'averaged teacher': 'teacher', 'finer grid, 12 × 12 cells': 'finer grid',
             'decoder at four times the rate': 'faster decoder', 'decoder at four times the rate, masks of other films': 'faster decoder shuffled'}
    for name in ('methods', 'ideas'):
        for r in bench_means(read_bench(top/'results'/'phantombench', name)).to_dict('records'): known.setdefault(r['method'], set()).add(f'{r["mean"]:.3f} ± {r["half"]:.3f}')
    seen, text = 0, plain((top/'results'/'README.md').read_text(encoding='utf-8'))
    part = text[text.index('**All methods by one loop**'):text.index('**Where does attention look?**')]
    for line in part.splitlines():
        first, *cells = [x.strip(' *') for x in line.split('|')[1:-1]] or ['']
        method = names.get(first, first)
        for cell in cells:
            if re.fullmatch(r'[\d.]+ ± [\d.]+', cell) and method in known:
                assert cell in known[method], f'{first}: {cell} is no figure of "{method}"'
                seen += 1
    assert seen > 100
