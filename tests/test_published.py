"Published numbers: counts, spot values, sources; and every number of the reference tables, read again by other code and compared."
import re
import numpy as np
import pandas as pd
import pytest
from g2d.published import COLUMNS, dataset_name, published, trivial, trivial_table, _column, _rows
from g2d.settings import G2DError

table = published()


def one(task, dataset, metric, method, fraction=None, protocol='as_paper', label=None, setting=None):
    rows = published(task, dataset, metric, method, fraction, protocol)
    if fraction is None: rows = rows[rows.fraction.isna()]
    if label: rows = rows[rows.label == label]
    rows = rows[~rows.note.str.startswith('ablation')] if setting is None else rows[rows.setting == setting]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def test_every_row_says_what_it_is():
    assert tuple(table.columns) == COLUMNS and len(table) == 778
    for column in ('method', 'task', 'dataset', 'metric', 'protocol', 'source'): assert table[column].notna().all() and (table[column].str.len() > 0).all(), column
    missing = table[table.value.isna()]
    assert len(missing) == 8 and set(missing.dataset) == {'Object-CXR'} and missing.note.str.contains('below 1 %').all()
    assert table.value.dropna().between(.5, 100).all() and table.fraction.dropna().isin([.01, .1, 1.]).all()
    assert not table.duplicated(['method', 'task', 'dataset', 'label', 'fraction', 'metric', 'setting', 'source']).any()


def test_spot_values():
    assert one('segmentation', 'SIIM', 'Dice', 'G2D encoder + decoder', 1.).value == 68.4
    assert one('detection', 'Object-CXR', 'mAP', 'M-FLAG', .1).value == 12.4
    assert one('grounding', 'SIIM', 'IoU', 'BioViL').value == 1.7
    assert one('zero_shot', 'CheXpert', 'F1', 'KAD').value == 64.6
    assert one('linear', 'COVIDx', 'ACC', 'G2D', .1).value == 88.2
    assert one('finetune', 'CXR14', 'AUC', 'G2D', 1., label='Hernia').value == 96.5
    assert one('retrieval', 'MIMIC 5x200', 'H@1', 'PTUnifier', protocol='benchx').value == 78.7
    row = one('detection', 'RSNA', 'mAP', 'G2D', .01, setting='mask content: shuffled across samples')
    assert (row.value, row.error) == (7.6, 1.2)
    assert published(protocol='as_medklip', dataset='siim', method='G2D').value.tolist() == [70.6, 74.5, 82.3]
    assert published(protocol='xrv').value.tolist() == [86, 79, 87, 91]


def test_what_is_odd_is_said():
    sic = one('zero_shot', 'CXR14', 'F1', 'BioViL')
    assert sic.value == 66.2 and 'sic' in sic.note and '15.6' in sic.note
    mrm = published('linear', ['CheXpert', 'RSNA'], method='MRM')
    assert len(mrm) == 6 and mrm.note.str.contains('FINE-TUNED').all() and mrm.copied_from.str.startswith('MRM paper').all()
    assert published('linear', 'COVIDx', method='MRM').copied_from.eq('').all()
    assert published('finetune', method='KAD').copied_from.eq('KAD paper').all()
    assert set(published('segmentation', 'SIIM', protocol='as_paper').query('copied_from != ""').method) == {'ImageNet', 'ConVIRT', 'GLoRIA', 'MGCA'}
    assert 'MPMA' not in set(table.method)
    stars = set(table[table.note.str.contains('disease-level')].method)
    assert stars == {'MedKLIP', 'KAD', 'CheXzero'}


def test_filters():
    assert set(published(dataset='nih').dataset) == {'CXR14'} == set(published(dataset='NIH_CXR14').dataset)
    assert dataset_name('object cxr') == 'Object-CXR' and dataset_name('chexpert-5x200') == 'CheXpert 5x200' and dataset_name('mine') == 'mine'
    assert len(published('zero_shot', metric=['auc', 'F1'])) == len(published('zero_shot', metric='AUC')) + len(published('zero_shot', metric='F1'))
    for bad in (dict(task='zeroshot'), dict(dataset='VQA'), dict(metric='BLEU'), dict(method='MPMA'), dict(fraction=.5), dict(protocol='fixed')):
        with pytest.raises(G2DError, match=f'Nothing is published for {next(iter(bad))}'): published(**bad)
    frame = published(); frame['value'] = 0.     # a caller's change stays his
    assert published().value.max() > 90


def test_a_wrong_cell_is_an_error():
    with pytest.raises(ValueError): list(_rows('s', 'p', ['segmentation SIIM: Dice @ 1 10 100'], 'X | 1 2', {}))
    with pytest.raises(ValueError): list(_rows('s', 'p', ['segmentation SIIM: Dice @ 1'], 'X | 1 | 2', {}))
    with pytest.raises(AttributeError): _column('segmentation')


def test_trivial_baselines():
    rows = trivial_table().set_index(['method', 'source']).value
    assert rows.loc['all-empty prediction'].round(1).tolist() == [75.0, 76.9, 76.6]
    found = trivial(1000, 250).set_index('metric').value
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
    truth = np.arange(1000) < 250
    assert found['F1'] == pytest.approx(100*f1_score(truth, np.ones(1000))) and found['AUC'] == 100*roc_auc_score(truth, np.zeros(1000))
    assert found['ACC'] == pytest.approx(100*accuracy_score(truth, np.zeros(1000))) and found['Dice'] == 75
    with pytest.raises(G2DError, match='3 of 2 films'): trivial(2, 3)


# ---------------------------------------------------------------------------------------------- the reference, read again
@pytest.fixture(scope='module')
def reference(data_root):
    folder = data_root.parent/'reference'
    if not folder.is_dir(): pytest.skip('no reference notes beside the real data')
    return {p.stem: p.read_text(encoding='utf-8') for p in folder.glob('*.md')}


def section(text, start, end):
    "From the line that begins with `start` up to the one that begins with `end`."
    return re.search(rf'^{re.escape(start)}.*?(?=^{re.escape(end)})', text, re.S | re.M)[0]


def md_table(text):
    "All tables of a text: lists of rows, each a list of cells; the header first, bold marks dropped."
    tables, rows = [], []
    for line in text.splitlines() + ['']:
        if line.startswith('|'): rows.append([c.replace('**', '').strip() for c in line.strip().strip('|').split('|')])
        elif rows: tables.append([r for r in rows if not all(set(c) <= {'-'} for c in r) or not any(r)]); rows = []
    return [[r for r in t if not all(re.fullmatch('-+', c or '') for c in r)] for t in tables]


def numbers(cell): return [float(x) for x in re.findall(r'(?<![\w.])\d*\.?\d+(?![\w])', cell)]


def have(**where):
    "The values of the table as a sorted list of (method, dataset, metric, fraction, value)."
    t = table
    for column, value in where.items(): t = t[t[column].isin(value if isinstance(value, list) else [value])]
    return t


def triples(cell):
    "'- 0.5 4.4' or '9.0/28.6/54.3' -> three values, None for a dash."
    parts = re.split(r'[\s/]+', cell.strip())
    return [None if p == '-' else float(p) for p in parts]


def name_of(method):
    method = method.replace('**', '').strip()
    star = method.rstrip().replace(' (frozen enc.)', '').rstrip('*')
    return {'random': 'Random', 'G2D enc+dec': 'G2D encoder + decoder', 'G2D encoder+decoder': 'G2D encoder + decoder'}.get(star, star)


def same(rows, expected):
    "Rows of the table against a set of (method, dataset, metric, fraction, value)."
    got = {(r.method, r.dataset, r.metric, None if r.fraction != r.fraction else r.fraction, None if r.value != r.value else r.value) for r in rows.itertuples()}
    assert len(got) == len(rows)
    assert got == expected, (sorted(map(str, got - expected))[:5], sorted(map(str, expected - got))[:5])


F = (.01, .1, 1.)


def test_tables_of_the_g2d_paper(reference):
    for text in (section(reference['data_protocols_peers'], '## 3.1', '## 3.2'), section(reference['g2d_and_mpma_papers'], '**Table 1', '**Table 2a')):
        (header, *rows), = md_table(text)
        sets = [('SIIM', 'Dice'), ('RSNA', 'Dice'), ('RSNA', 'mAP'), ('Object-CXR', 'mAP')]
        expected = {(name_of(m), d, k, f, v) for m, *cells in rows for (d, k), cell in zip(sets, cells) if cell not in ('', 'n/a') for f, v in zip(F, triples(cell), strict=True)}
        assert len(rows) == 10
        same(have(source='G2D, NeurIPS 2024 (arXiv 2312.01522 v4), table 1'), expected)
    for text in (section(reference['data_protocols_peers'], '## 3.2', '## 3.3'), section(reference['g2d_and_mpma_papers'], '**Table 4', '**Table 7')):
        (header, *rows), = md_table(text)
        sets = [('CheXpert', 'AUC'), ('RSNA', 'AUC'), ('COVIDx', 'ACC')]
        assert len(rows) == 9
        same(have(source='G2D, NeurIPS 2024 (arXiv 2312.01522 v4), table 4'), {(name_of(m), d, k, f, v) for m, *cells in rows for (d, k), cell in zip(sets, cells) for f, v in zip(F, triples(cell), strict=True)})


def test_fine_tuned_and_per_class(reference):
    text = section(reference['data_protocols_peers'], '## 3.3', '## 3.4')
    first, second = text.splitlines()[1:3]
    expected = {(*(name_of(part.rsplit(' ', 3)[0]), 'CXR14', 'AUC'), f, float(v)) for part in first.replace('**', '').split(' | ') for f, v in zip(F, part.split()[-3:], strict=True)}
    whole = have(source='G2D, NeurIPS 2024 (arXiv 2312.01522 v4), table 3')
    same(whole[whole.label.isna()], expected)
    text = section(reference['g2d_and_mpma_papers'], '**Table 3', '**Table 4')
    same(whole[whole.label.isna()], {(name_of(m), 'CXR14', 'AUC', f, float(v)) for m, v3 in re.findall(r'(?:\*\* |; |\*\*)([A-Za-z0-9*]+?) ([\d.]+/[\d.]+/[\d.]+)', ' '.join(text.split()).replace('(1/10/100 %)** ', '** '))
                                     for f, v in zip(F, v3.split('/'), strict=True)})
    per_class = re.search(r'G2D per class at 100 %: (.*?)\n\n', text, re.S)[1]
    pairs = re.findall(r'([A-Za-z]+) (\d+\.\d)', per_class)
    classes = whole[whole.label.notna()]
    assert len(pairs) == 14 == len(classes) and [float(v) for _, v in pairs] == classes.value.tolist() and (classes.fraction == 1).all()
    assert all(short[:3].lower() == label[:3].lower() or short in ('Ptx', 'Effu') for (short, _), label in zip(pairs, classes.label))
    # table 7, in both notes
    a = re.search(r"MedKLIP's own setting \(Table 7\): (.*)", second + '\n' + reference['data_protocols_peers'])[1]
    assert numbers(a.replace('CXR14', '').replace('G2D', '')) == have(protocol='as_medklip').sort_values(['task', 'dataset'], key=lambda s: s.map({'finetune': 0, 'segmentation': 1, 'CXR14': 0, 'RSNA': 1, 'SIIM': 2}), kind='stable').value.tolist()
    b = section(reference['g2d_and_mpma_papers'], '**Table 7', 'MedKLIP sample code').split('**')[2]
    assert sorted(float(x) for group in re.findall(r'[\d.]+/[\d.]+/[\d.]+', b) for x in group.rstrip('.').split('/')) == sorted(have(protocol='as_medklip').value)


def test_zero_shot_tables(reference):
    for text, slash in ((section(reference['data_protocols_peers'], '## 3.4', '## 3.5'), ' '), (section(reference['g2d_and_mpma_papers'], '**Table 2b', '**Table 3'), '/')):
        (header, *rows), = md_table(text)
        expected = set()
        for m, *cells in rows:
            for d, cell in zip(('RSNA', 'SIIM', 'CXR14', 'CheXpert'), cells, strict=True):
                cell = re.sub(r'\(sic[^)]*\)', '', cell)
                if cell.strip() == '/': continue
                expected |= {(name_of(m), d, k, None, v) for k, v in zip(('AUC', 'F1', 'ACC')[:2 if d == 'CheXpert' else 3], triples(cell), strict=True)}
        assert len(rows) == 7
        same(have(source='G2D, NeurIPS 2024 (arXiv 2312.01522 v4), table 2b'), expected)
    line = re.search(r'^Grounding Recall/IoU/Dice, SIIM \| RSNA: (.*)\.$', reference['data_protocols_peers'], re.M)[1]
    expected = set()
    for part in line.split('; '):
        left, right = part.split(' | ')
        method = left.split()[0]
        for d, cell in (('SIIM', left.split()[1:]), ('RSNA', right.split())): expected |= {(method, d, k, None, float(v)) for k, v in zip(('Recall', 'IoU', 'Dice'), cell, strict=True)}
    same(have(task='grounding'), expected)
    other = section(reference['g2d_and_mpma_papers'], '**Table 2a', '**Table 2b').replace('**', '')
    assert sorted(float(x) for g in re.findall(r'[\d.]+/[\d.]+/[\d.]+', other) for x in g.rstrip('.').split('/')) == sorted(have(task='grounding').value)


def test_ablations(reference):
    (header, *rows), = md_table(section(reference['g2d_and_mpma_papers'], '## A8', 'Reading [D]'))
    got = have(source='G2D, NeurIPS 2024 (arXiv 2312.01522 v4), ablations')
    assert len(rows) == 21 and len(got) == 63 and (got.fraction == .01).all()
    printed = [tuple(map(float, cell.split('+-'))) for _, _, *cells in rows for cell in cells]
    assert printed == list(zip(got.value, got.error))
    factor = ''
    for (new, setting, *_), ours in zip(rows, got.setting[::3]):
        factor = new or factor
        assert re.sub(r' \(.*', '', factor) == ours.split(': ')[0] and ours.split(': ')[1].split()[0] in setting, (factor, setting, ours)


def test_other_papers(reference):
    text = reference['data_protocols_peers']
    (header, *rows), = md_table(section(text, '## 3.5', '## 3.6'))
    same(have(protocol='mavl'), {(name_of(m), d, k, None, float(v)) for m, *cells in rows for d, cell in zip(header[1:], cells, strict=True) for k, v in zip(('AUC', 'F1', 'ACC'), cell.split(), strict=True)})
    maco = section(text, '## 3.6', '## 3.7')
    expected, body = set(), maco.split('\n', 1)[1].replace('CheXpert | NIH | RSNA: ', '')
    three, m3ae, nih = re.fullmatch(r'(.*?);\n(M3AE .*?)\. NIH only: (.*?)\.\n', body, re.S).groups()
    for part in three.split('; '):
        method, rest = part.split(' ', 1)
        for d, cell in zip(('CheXpert', 'CXR14', 'RSNA'), rest.split(' | '), strict=True): expected |= {(method, d, 'AUC', f, float(v)) for f, v in zip(F, cell.split(), strict=True)}
    for d, cell in zip(('CheXpert', 'RSNA'), re.findall(r'(?:CheXpert|RSNA) ([\d. ]+)', m3ae), strict=True): expected |= {('M3AE', d, 'AUC', f, float(v)) for f, v in zip(F, cell.split(), strict=True)}
    for part in nih.split('; '): expected |= {(part.split()[0], 'CXR14', 'AUC', f, float(v)) for f, v in zip(F, part.split()[1:], strict=True)}
    same(have(protocol='maco'), expected)


def test_benchx(reference):
    text = section(reference['data_protocols_peers'], '## 3.7', '## 3.8')
    (header, *rows), = md_table(text)
    sets, expected = [('CXR14', 'AUC'), ('VinDr', 'AUC'), ('COVIDx', 'F1'), ('SIIM', 'F1'), ('RSNA', 'F1')], set()
    for m, *cells in rows:
        for (d, k), cell in zip(sets, cells): expected |= {(m, d, k, f, float(v)) for f, v in zip(F, cell.split(), strict=bool(cell))}
        expected |= {(m, d, 'mDice', None, float(v)) for d, v in zip(('Object-CXR', 'RSNA', 'SIIM', 'TBX'), cells[5].split(), strict=bool(cells[5]))}
    got = have(protocol='benchx')
    same(got[got.task != 'retrieval'], expected)
    line = re.search(r'^Retrieval MIMIC 5x200 H@1/P@5/P@10: (.*)\.$', text, re.M)[1]
    same(got[got.task == 'retrieval'], {(part.split()[0], 'MIMIC 5x200', k, None, float(v)) for part in line.split('; ') for k, v in zip(('H@1', 'P@5', 'P@10'), part.split()[1:], strict=True)})


def test_egma_lovt_xrv(reference):
    text = reference['data_protocols_peers']
    egma = section(text, '## 3.8', '## 3.9')
    parts = [re.search(rf'{start}: (.*?)\.(?= |\n)', egma)[1].split('; ') for start in ('SIIM supervised AUC', 'CheXpert 5x200 zero-shot ACC/F1', '8x200 text->image P@1/5/10')]
    names = [('SIIM', ['AUC']*3, F), ('CheXpert 5x200', ['ACC', 'F1'], [None]*2), ('8x200', ['P@1', 'P@5', 'P@10'], [None]*3)]
    same(have(protocol='egma'), {(p.split()[0], d, k, f, float(v)) for part, (d, ks, fs) in zip(parts, names) for p in part for k, f, v in zip(ks, fs, p.split()[1:], strict=True)})
    lovt = section(text, '## 3.9', '## 3.10').split('\n', 1)[1]
    got = have(protocol='lovt')
    printed = numbers(re.sub(r'mAP@\.5', '', lovt))
    assert sorted(printed) == sorted(got.value) and len(got) == 16
    assert got[(got.metric == 'mAP@.5')].value.tolist() == [float(x) for x in re.search(r'mAP@\.5 ([\d. ]+)\)', lovt)[1].split()]
    assert got[got.setting == 'YOLO, fine-tuned'].value.tolist() == [float(x) for x in re.search(r'fine-tuned ([\d. ]+);', lovt)[1].split()]
    xrv = re.search(r'^## 3\.10 (.*)$', text, re.M)[1]
    assert sorted(100*x for x in numbers(xrv.replace('-', ' ').replace('/', ' '))) == pytest.approx(sorted(have(protocol='xrv').value))


def test_no_number_of_section_3_is_left_out(reference):
    "Every number with a decimal point between 3.1 and 3.11 is in the table, as often as it is printed there."
    from collections import Counter
    text = section(reference['data_protocols_peers'], '## 3.1', '## 3.11')
    text = re.sub(r'^## \S+', '', text, flags=re.M)                       # numbers of headings
    text = text.replace('; MAVL 15.6', '')                                   # quoted once more beside the (sic)
    text = re.sub(r'^Same baselines, other numbers.*$', '', text, flags=re.M)  # quotes of numbers above
    text = text.replace('mAP@.5', 'mAP')
    printed = Counter(round(float(x), 2) for x in re.findall(r'(?<![\w.])\d+\.\d(?!\d)', text))
    t = table[(table.source != 'G2D, NeurIPS 2024 (arXiv 2312.01522 v4), ablations') & table.label.isna() & (table.protocol != 'xrv')]
    ours = Counter(round(v, 2) for v in t.value.dropna())
    assert printed == ours, (printed - ours, ours - printed)
