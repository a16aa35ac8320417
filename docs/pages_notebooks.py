"The notebooks of nbs/ as pages: directives gone, plumbing hidden, alternative text at every picture."
import json, re
from pages import root

GROUPS = (  # heading, what it is for, folder or first digits, and what a notebook of it has
    ('Lessons', 'The method step by step, each readable in five minutes, with exercises.', 'lessons/*.ipynb'),
    ('Settings, profiles and files', 'Where things lie, and every choice of a run with its source.', '0*.ipynb'),
    ('Data', 'Stores, reports, splits, phantoms, loading, preparation and audit.', 'data/*.ipynb'),
    ('Public data sets', 'A reader and a writer of the raw layout of each set; see also the [table of data sets](../data_sets/index.md).', 'data/sets/*.ipynb'),
    ('Models', 'Encoders, attention pooling, decoder, and the whole net in one constructor.', 'models/*.ipynb'),
    ('Pseudo-masks, losses, training', 'The heart of the method, and the loop around it.', '[34]*.ipynb'),
    ('Downstream tasks', 'Protocols and every task, each number beside its baselines.', 'tasks/*.ipynb'),
    ('Batches, results, views', 'Tables of runs, tables of results, pictures, command line.', '[5-8]*.ipynb'),
    ('Experiments', 'Notebooks with parameters that `g2d run` fills in. They are shown as they are committed, without outputs; [batch](../howto/batch.md) runs them.', 'experiments/*.ipynb'))
SKIPPED = re.compile(r'^#\| *(slow|cuda|notest|eval: *false)\b', re.M)


def found(pattern):
    "Notebooks of a group; 10 comes after 9."
    return sorted((root/'nbs').glob(pattern), key=lambda p: [int(x) if x.isdigit() else x for x in re.split(r'(\d+)', p.name)])


def notebooks():
    "Every notebook of the repository that is a page, by its path under nbs/."
    return {path.relative_to(root/'nbs').as_posix(): path for _, _, pattern in GROUPS for path in found(pattern)}


def _text(cell): return ''.join(cell['source'])


def title(cells):
    "Heading and subtitle of a notebook."
    first = next(_text(c) for c in cells if c['cell_type'] == 'markdown')
    head, sub = re.search(r'^# +(.+)', first, re.M), re.search(r'^> *(.+)', first, re.M)
    return head[1].strip(), sub[1].strip() if sub else ''


def _plain(markdown):
    "Markdown as a line of words."
    text = re.sub(r'^#.*$|^\|.*$|^> ', '', re.sub(r'```.*?```|\$\$.*?\$\$', '', markdown, flags=re.S), flags=re.M)
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)
    return ' '.join(re.sub(r'[*`$\\]', '', text).split())


def alternative_text(cells, i):
    "Words for the pictures of cell `i`: the italic caption after it, or the last sentences before it and the titles in its code."
    after = _text(cells[i + 1]).strip() if i + 1 < len(cells) and cells[i + 1]['cell_type'] == 'markdown' else ''
    if re.match(r'\*[^*]|_[^_]|\*\*(Figure|What to see)', after): return _plain(after.split('\n\n')[0])[:400]
    before = next((_plain(_text(c)) for c in reversed(cells[:i]) if c['cell_type'] == 'markdown' and _plain(_text(c))), '')
    last = ' '.join(re.split(r'(?<=[.:!?]) (?=[A-Z"])', before)[-2:]).rstrip(':. ')[-350:]
    titles = [t for t in re.findall(r'''(?:title|label|set_[xy]label)\(?=?\s*\(?f?['"]([^'"{}\[\]\n]{3,})['"]''', _text(cells[i])) if t.strip()]
    return (last or 'Output of the cell') + (f'. Labels: {", ".join(dict.fromkeys(titles))}' if titles else '') + '.'


def _links(text, name, pages):
    "Links between notebooks lead to pages, those into the repository become words."
    import posixpath
    def replaced(match):
        label, target = match[1], match[2]
        if re.match(r'\w+:|#|attachment:', target): return match[0]
        path, _, anchor = target.partition('#')
        full = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        return match[0] if full in pages else f'{label} (`{posixpath.normpath("nbs/" + full)}`)'
    return re.sub(r'(?<!!)\[([^\]]+)\]\(([^)\s]+)\)', replaced, text)


def clean(name, cells, pages, modules):
    "Cells of one page."
    cells, kept = [c for c in cells if not re.match(r'\s*#\| *default_exp', _text(c))], []
    for i, cell in enumerate(cells):
        text, tags = _text(cell), set(cell['metadata'].get('tags', ()))
        cell = dict(cell, metadata={})
        if cell['cell_type'] == 'code':
            if re.search(r'^#\| *hide\b', text, re.M): tags.add('remove-cell')
            if SKIPPED.search(text): tags.add('skip-execution')
            text = re.sub(r'^#\|.*\n?', '', text, flags=re.M).strip('\n')
            if not text: continue
            cell['metadata']['mystnb'] = dict(image=dict(alt=alternative_text(cells, i)))
        else: text = _links(text, name, pages)
        if tags: cell['metadata']['tags'] = sorted(tags)
        kept.append(dict(cell, source=text))
    if name in modules:
        at = next(i for i, c in enumerate(kept) if c['cell_type'] == 'markdown') + 1
        up = '../'*(name.count('/') + 1)
        kept.insert(at, dict(cell_type='markdown', id='reference-link', metadata={}, source=f'Module: [`{modules[name]}`]({up}reference/{modules[name]}.md), exported from this notebook (`nbs/{name}`).'))
    return kept


def pages():
    "Path under docs/ -> content."
    from pages_reference import notebook_modules
    books, modules, made, titles = notebooks(), notebook_modules(), {}, {}
    for name, path in books.items():
        book = json.loads(path.read_text(encoding='utf-8'))
        titles[name] = title(book['cells'])
        book['cells'] = clean(name, book['cells'], books, modules)
        book['metadata'] = dict(book['metadata'], language_info=dict(name='python', pygments_lexer='ipython3'))
        made[f'notebooks/{name}'] = json.dumps(book, indent=1)
    index = ['# Notebooks', 'Every component is a notebook that explains itself; the package is exported from them. They are shown with the pictures they were committed with '
             '(phantoms only), and `make docs EXECUTE=1` runs them again. In a checkout `make lab` opens them.']
    for heading, words, pattern in GROUPS:
        names = [path.relative_to(root/'nbs').as_posix() for path in found(pattern)]
        if not names: continue
        index += [f'## {heading}', words, '\n'.join(f'- [{titles[n][0]}]({n})' + (f': {titles[n][1]}' if titles[n][1] else '') for n in names),
                  f':::{{toctree}}\n:hidden:\n:caption: {heading}\n\n' + '\n'.join(n.removesuffix('.ipynb') for n in names) + '\n:::']
    made['notebooks/index.md'] = '\n\n'.join(index) + '\n'
    return made
