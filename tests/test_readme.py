"README.md is what nbs/index.ipynb says, and what it points at exists."
import re
from pathlib import Path

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
