"""Sphinx extension: before each build it writes the pages that follow from the package, the notebooks and the results.

Written folders (git ignores them): notebooks/, reference/, results/, data_sets/. A file is touched only when its text changed,
so that a second build does little. Everything else in docs/ is written by hand.
"""
from pathlib import Path

docs = Path(__file__).resolve().parent
root = docs.parent
MADE = ('notebooks', 'reference', 'results', 'data_sets')


def write_all():
    "Write every generated page and remove those that are no longer asked for; returns their paths."
    import pages_notebooks, pages_reference, pages_tables
    made = {}
    for part in (pages_notebooks, pages_reference, pages_tables): made |= part.pages()
    for name, content in made.items():
        path, content = docs/name, content if isinstance(content, bytes) else content.encode()
        if path.is_file() and path.read_bytes() == content: continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for folder in MADE:
        for path in (docs/folder).rglob('*'):
            if path.is_file() and path.relative_to(docs).as_posix() not in made: path.unlink()
    return sorted(made)


def setup(app):
    app.connect('config-inited', lambda app, config: write_all())
    return dict(parallel_read_safe=True, parallel_write_safe=True)
