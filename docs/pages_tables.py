"Pages of tables: profiles and protocols with their sources, results with their commands, published numbers, data sets."
import contextlib, io, json, re, sys, tempfile
from html import escape
from pathlib import Path
from pages import docs, root

PROFILES = ('as_paper', 'as_released', 'recommended', 'demo')
TASKS = {'segmentation': 'Segmentation', 'detection': 'Detection', 'linear': 'Linear probe', 'finetune': 'Fine-tuned classification', 'supervised': 'Supervised classification',
         'zero_shot': 'Zero-shot classification', 'grounding': 'Grounding', 'retrieval': 'Retrieval', 'report_generation': 'Report generation', 'vqa': 'Visual question answering'}


def html_table(rows, head, caption=''):
    "A table as HTML: numbers to the right, `(value, small print)` in one cell. Wide ones scroll."
    def cell(value):
        small = ''
        if isinstance(value, tuple): value, small = value
        if value is None or value != value: value = ''
        shown = f'{value:.4g}' if isinstance(value, float) else f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else str(value)
        kind = ' class="n"' if re.fullmatch(r'[-−]?[\d,.]+(e-?\d+)?( ± [\d.]+)?', shown) and not small else ''
        return f'<td{kind}>{escape(shown)}' + (f'<br><small>{escape(small)}</small>' if small else '') + '</td>'
    body = '\n'.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows)
    words = f'<caption>{escape(caption)}</caption>' if caption else ''
    return f'```{{raw}} html\n<div class="wide"><table class="data">{words}<thead><tr>' + ''.join(f'<th scope="col">{escape(str(h))}</th>' for h in head) + f'</tr></thead><tbody>\n{body}\n</tbody></table></div>\n```'


def _long(table, words, rows): return table if rows <= 25 else table.replace('<div class="wide">', f'<details><summary>{escape(words)}</summary><div class="wide">', 1).replace('</div>\n```', '</div></details>\n```')


def linked(markdown):
    "Bare addresses become links; code is left alone."
    parts = re.split(r'(```.*?```|`[^`\n]*`|^    .*$)', markdown, flags=re.S | re.M)
    return ''.join(p if i % 2 else re.sub(r'(?<![<(\["\w])(https?://[^\s<>)\],;]*[^\s<>)\],;.:])', r'<\1>', p) for i, p in enumerate(parts))


def profiles():
    from g2d.profiles import differences, sources
    each, show = {name: sources(name) for name in PROFILES}, lambda v: ', '.join(map(str, v)) if isinstance(v, (tuple, list)) else str(v)
    rows = [[setting, each['as_paper'].meaning[setting], *((show(each[n].value[setting]), each[n].source[setting]) for n in PROFILES)] for setting in each['as_paper'].index]
    parts = ['# Profiles', '`as_paper` is what NeurIPS 2024 prints, `as_released` what the code does with its bugs as named switches, `recommended` what we would run, `demo` what fits two CPU cores. '
             f'Each of the {len(rows)} settings carries the source of its value; "ours" means that neither paper nor code says it. Change any of them with `profile("recommended", heads=8)` or `g2d pretrain --set heads=8`. '
             'Made from {py:obj}`sources <g2d.profiles.sources>` and {py:obj}`differences <g2d.profiles.differences>`.']
    for a, b, words in (('as_paper', 'as_released', 'Where paper and released code differ'), ('as_paper', 'recommended', 'Where we would depart from the paper')):
        t = differences(a, b)
        parts += [f'## {words}', f'{len(t)} settings.', html_table([[s, (show(r[a]), r[f'source {a}']), (show(r[b]), r[f'source {b}'])] for s, r in t.iterrows()], ['setting', a, b])]
    return '\n\n'.join(parts + ['## All settings', html_table(rows, ['setting', 'meaning', *PROFILES])]) + '\n'


def protocols():
    from g2d.tasks.protocols import NAMES, _table, protocol_table
    parts = ['# Protocols', 'How a pre-trained encoder is tested, task by task: `as_paper` after the text of the paper, `as_mgca` and `as_medklip` after the code most papers inherit from, `fixed` what we would trust, '
             '`demo` for two CPU cores. Made from {py:obj}`protocol_table <g2d.tasks.protocols.protocol_table>`; some values hold for one data set or fraction only and are shown by {py:obj}`protocol <g2d.tasks.protocols.protocol>`.']
    for task in _table:
        rows = [[s, r['what'], *(_split_source(r[n]) for n in NAMES)] for s, r in protocol_table(task).iterrows()]
        parts += [f'## {TASKS.get(task, task.replace("_", " ").capitalize())}', html_table(rows, ['setting', 'meaning', *NAMES])]
    return '\n\n'.join(parts) + '\n'


def _split_source(text):
    "`value (source)` -> value, source; the value may itself hold brackets."
    depth, at = 0, len(text)
    if text.endswith(')'):
        for at in range(len(text) - 1, -1, -1):
            depth += (text[at] == ')') - (text[at] == '(')
            if depth == 0: break
    return text[:at].strip(), text[at+1:-1]


def evidence():
    "The table of results/README.md (file, what, command, machine), and what stands before and after it."
    from g2d.evidence import plain
    lines = plain((root/'results'/'README.md').read_text(encoding='utf-8')).splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith('|')]
    end = next(i for i in range(at[0], len(lines) + 1) if i == len(lines) or not lines[i].startswith('|'))
    rows = [[c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]] for line in lines[at[0] + 2:end]]
    speed = [[c.strip() for c in line.split('|')[1:-1]] for line in (root/'results'/'benchmarks.md').read_text(encoding='utf-8').splitlines() if line.startswith('|')]
    measured = {match[1]: [row[1], row[0], ''] for row in speed if (match := re.search(r'--csv results/(\S+\.csv)', row[0]))}
    return measured | {row[0].strip('`'): row[1:] for row in rows}, '\n'.join(lines[1:at[0]]).strip(), '\n'.join(lines[end:]).strip()


MOST = 600   # rows of a file on the page; the file itself lies beside it


def _csv(path):
    import pandas as pd
    frame = pd.read_csv(path)
    return html_table([[_number(v) for v in row] for row in frame.head(MOST).itertuples(index=False)], list(frame.columns)), len(frame)


def _number(v): return v.item() if hasattr(v, 'item') else v


def results():
    "The committed tables with the command beside each, and the page of what they say."
    about, before, after = evidence()
    text = ['# Results', linked(before), 'The claims these tables carry, and those they do not: [what we found](found.md), and table by table: [the evidence](evidence.md). What others printed: [published numbers](published.md). Speed: [benchmarks](benchmarks.md).',
            ':::{toctree}\n:hidden:\n\nfound\nevidence\npublished\nbenchmarks\n:::']
    made = {f'results/{path.name}': path.read_bytes() for path in sorted((root/'results').glob('*.png'))}
    for path in sorted((root/'results').rglob('*.csv')):
        name = path.relative_to(root/'results').as_posix()
        what, command, machine = about.get(name) or about.get(path.parent.relative_to(root/'results').as_posix() + '/') or ['', '', '']
        table, n = _csv(path)
        made[f'results/tables/{name}'] = path.read_bytes()
        text += [f'## {name}', linked(what[:1].upper() + what[1:]) + '.' if what else '', f'**Command:** {linked(command)}' if command else '', f'**Machine:** {machine}' if machine and machine != 'the same' else '',
                 _long(table, f'All {n} rows' if n <= MOST else f'The first {MOST} of {n} rows', n), f'{{download}}`{name} <tables/{name}>`']
    from g2d.evidence import found_page
    found = found_page(root/'results').replace('](README.md)', '](evidence.md)')
    detail = ['# The evidence', 'What the tables say, one after the other: the text of `results/README.md`. In short: [what we found](found.md); the tables themselves are [here](index.md).', linked(after)]
    benchmarks = (root/'results'/'benchmarks.md').read_text(encoding='utf-8')
    return made | {'results/index.md': '\n\n'.join(t for t in text if t) + '\n', 'results/found.md': linked(found), 'results/evidence.md': '\n\n'.join(detail) + '\n', 'results/benchmarks.md': linked(benchmarks)}


def _printed(block):
    "Rows method [setting], columns data set, metric and fraction, as a paper prints them."
    column = lambda r: f'{r["dataset"]}{"/" + r["label"] if isinstance(r["label"], str) else ""} {r["metric"]}' + (f' {r["fraction"]:.0%}' if r['fraction'] == r['fraction'] and r['fraction'] is not None else '')
    rows, columns = {}, {}
    for r in block.to_dict('records'):
        value = r['value'] if r['value'] == r['value'] and r['value'] is not None else None
        shown = '-' if value is None else f'{value:.1f}' + (f' ± {r["error"]:.1f}' if isinstance(r['error'], float) and r['error'] == r['error'] else '')
        columns[column(r)] = True
        rows.setdefault((r['method'], r['setting'] if isinstance(r['setting'], str) else ''), {})[column(r)] = shown
    same = len({setting for _, setting in rows}) == 1
    return html_table([[method if same else (method, setting), *(cells.get(c, '') for c in columns)] for (method, setting), cells in rows.items()], ['method', *columns]), next(iter(rows))[1] if same else ''


def published_page():
    from g2d.published import published, trivial_table
    frame = published()
    parts = ['# Published numbers', f'What others printed: {len(frame):,} numbers, each with where it stands and what is odd about it, from {{py:obj}}`published <g2d.published.published>`. '
             'They were made on data and splits that differ from table to table, and nobody here has run them again. `g2d results --published` sets our runs beside them.',
             '## What needs no model', 'Scores by the same rules of a prediction that never looked at a film. A published number below these says nothing about the method.',
             html_table([[r['method'], r['dataset'], r['metric'], float(r['value']), r['source'], r['note']] for r in trivial_table().to_dict('records')], ['prediction', 'data set', 'metric', 'value', 'split', 'note'])]
    for task, rows in frame.groupby('task', sort=False):
        parts.append(f'## {TASKS.get(task, task)}')
        for (source, protocol), block in rows.groupby(['source', 'protocol'], sort=False):
            table, setting = _printed(block)
            copied = {f'{r["method"]}: {r["copied_from"]}' for r in block.to_dict('records') if r['copied_from']}
            notes = list(dict.fromkeys(n for n in block['note'] if isinstance(n, str) and n))
            parts += [f'### {source}', f'Protocol `{protocol}`' + (f'; {_words(setting)}' if setting else '') + '.', table]
            if notes: parts.append('Notes: ' + '; '.join(_words(n) for n in notes) + '.')
            if copied: parts.append('Copied from elsewhere: ' + '; '.join(_words(c) for c in sorted(copied)) + '.')
    return '\n\n'.join(parts) + '\n'


def _words(text): return re.sub(r'([*_<$`])', r'\\\1', str(text))


def _paragraph(text, start):
    "The words behind a bold beginning."
    match = re.search(rf'^\*\*{start}[^*]*\*\*\s*(.+?)(?:\n\n|\n\*\*|\Z)', text, re.S | re.M)
    return ' '.join(match[1].split()) if match else ''


ANNOTATION = dict(text='reports', labels='labels', boxes='boxes', masks='masks')


def _annotation(name):
    "What the reader of a set finds in a phantom copy of its raw layout: fields that at least one film has."
    from g2d.data.layouts import LAYOUTS, write_layout
    from g2d.data.prepare import list_items
    if name not in LAYOUTS: return None
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        items = list_items(name, write_layout(name, Path(folder)/'raw', 24, 0)).items
    return [words for field, words in ANNOTATION.items() if any(getattr(i, field) not in (None, '', {}) and (field == 'labels' or bool(getattr(i, field))) for i in items)]


def _access(where, licence):
    text = f'{where} {licence}'.lower()
    for word, said in (('credential', 'credentials'), ('no registration', 'open'), ('kaggle', 'Kaggle account'), ('registration', 'registration'), ('form;', 'form'), ('gone', 'copies only'), ('your data', 'yours'), ('http', 'open')):
        if word in text: return said
    return ''


def data_sets():
    "Overview and a page a set, from data_prep/*/README.md, the registry of sets and their readers."
    from g2d.data.prepare import PUBLISHED, load_sets
    from pages_reference import notebook_modules
    sets, made, rows = load_sets(), {}, []
    notebooks = {m.rpartition('.')[2]: (n, m) for n, m in notebook_modules().items() if m.startswith('g2d.data.sets.')}
    known = _kept(lambda: {name: _annotation(name) for name in sets})
    for path in sorted((root/'data_prep').glob('*/README.md')):
        name, text = path.parent.name, path.read_text(encoding='utf-8')
        head = re.match(r'# (\w+): (.+)', text)[2]
        head = head[0].upper() + head[1:]
        where, licence, counts = _paragraph(text, 'Where to get it'), _paragraph(text, 'Licence'), PUBLISHED.get(name, {})
        key = next((k for wanted in (r'images|films', r'.*\b(images|films)', r'.*(rows|reports|pairs)') for k in counts if re.fullmatch(wanted, k)), None)
        short = re.split(r'[:;(]|\. ', licence or where)[0].strip().rstrip('.')
        rows.append([name, head, f'{counts[key][0]:,} {key}' if key else '', ', '.join(known.get(name) or ('as your table has them',) if name == 'tidy' else known.get(name) or ('see its page',)), short, _access(where, licence)])
        body = linked(text.partition('\n')[2])
        extra = []
        if counts: extra += ['## Counts that `--check` compares', f'`g2d prepare {name} --source FOLDER --check` opens no film and says which of these differ.', html_table([[k, str(v) if isinstance(v, str) else v, source] for k, (v, source) in counts.items()], ['count', 'value', 'from'])]
        if name in notebooks: extra += ['## Code', f'Notebook [{notebooks[name][0]}](../notebooks/{notebooks[name][0]}), module [{notebooks[name][1]}](../reference/{notebooks[name][1]}.md).']
        made[f'data_sets/{name}.md'] = f'# {head}\n\n```sh\ng2d prepare {name} --source FOLDER --out outputs/stores/{name}\n```\n' + body + '\n\n' + '\n\n'.join(extra) + '\n'
    lines = ['| set | what | counted | annotation | licence | access |', '|---|---|---|---|---|---|'] + [f'| [{r[0]}]({r[0]}.md) | ' + ' | '.join(c.replace('|', r'\|') for c in r[1:]) + ' |' for r in rows]
    index = ['# Data sets', f'{len(rows)} roads from raw data to a verified store. Nothing here is redistributed: each page says where to get the films, under which licence, what was published to be in them, '
             'who used which split, and where the traps are. One command prepares a set, and one checks a copy without opening a film:',
             '```sh\ng2d prepare list\ng2d prepare rsna --source rsna-pneumonia --check\ng2d prepare rsna --source rsna-pneumonia --out outputs/stores/rsna --split fixed\n```', '\n'.join(lines),
             '*Counted* is the main published count, the rest is on the page of the set. *Annotation* is what our reader finds in a phantom copy of the set (`layout:rsna` in place of a store makes one; no credentials are needed). '
             '*Licence* and *access* are the first words of the page, which has the conditions; "recalled, not checked" is said there where it holds. How to add your own films: [own data](../howto/own_data.md).',
             ':::{toctree}\n:hidden:\n\n' + '\n'.join(r[0] for r in rows) + '\n:::']
    return made | {'data_sets/index.md': '\n\n'.join(index) + '\n'}


def _kept(make):
    "A result that takes seconds, kept in _build until a reader changes."
    import hashlib
    from g2d.files import atomic_path
    code = hashlib.sha256(b''.join(p.read_bytes() for p in sorted((root/'g2d'/'data').rglob('*.py')))).hexdigest()
    path = docs/'_build'/'annotation.json'
    if path.is_file() and (found := json.loads(path.read_text())).pop('code', None) == code: return found
    found = make()
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary: temporary.write_text(json.dumps(found | dict(code=code)))
    return found


def pages():
    "Path under docs/ -> content."
    return {'reference/profiles.md': profiles(), 'reference/protocols.md': protocols(), 'results/published.md': published_page()} | results() | data_sets()
