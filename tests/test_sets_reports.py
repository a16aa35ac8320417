"The sets with reports or phrases: MIMIC-CXR, MS-CXR, Open-I, VQA-RAD; from their raw layout to a store, with faults injected, and on the real archives."
import importlib.util, json, os, re, runpy, shutil, sys, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest
from g2d.settings import G2DError
from g2d.data.layouts import phantom_films, write_layout, write_image
from g2d.data.prepare import check_counts, list_items, prepare, read_radiograph
from g2d.data.splits import check_disjoint, check_unseen, fingerprints, ids_hash
from g2d.data.store import RadiographStore
from g2d.data.sets import mimic_cxr as mimic, ms_cxr as ms, open_i as iu, vqa_rad as vqa
from g2d.data.tables import read_packed

root = Path(__file__).resolve().parents[1]
N = 30

def rejected(out): return pd.read_csv(Path(out)/'rejected.csv', dtype=str, keep_default_na=False)

def make(name, source, out, **options): return prepare(name, source, out, size=96, workers=0, progress=False, **options)

def one_sentence(error): text = str(error.value); assert '\n' not in text and 'Traceback' not in text and len(text) < 900; return text

@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    "One phantom copy of each layout, not to be changed."
    folder = tmp_path_factory.mktemp('raw')
    return {name: write_layout(name, folder/name, N) for name in ('mimic_cxr', 'ms_cxr', 'open_i', 'vqa_rad')}

@pytest.fixture(scope='module')
def stores(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp('stores')
    return {name: make(name, source, folder/name) for name, source in raw.items()}

def copy(raw, name, folder):
    "A copy of a layout that may be damaged; the source for `prepare`."
    source = raw[name]
    top = source[0].parent if isinstance(source, list) else source
    shutil.copytree(top, folder)
    return [folder/path.relative_to(top) for path in source] if isinstance(source, list) else folder

def rewrite(path, change):
    "Change a packed or plain table: `change(frame) -> frame`."
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    change(table).to_csv(path, index=False)

# --- MIMIC-CXR: sections -----------------------------------------------------------------------------------------------------

words = 'the lungs are clear heart size is normal no effusion or pneumothorax seen'.split()

@pytest.mark.parametrize('seed', range(20))
def test_sections_of_random_reports(seed):
    "Reports put together from known sections come apart again; of a name that occurs twice the last one counts, empty findings do not."
    rng = np.random.default_rng(seed)
    headings = [('EXAMINATION', 'examination'), ('INDICATION', 'indication'), ('COMPARISONS', 'comparison'), ('FINDINGS', 'findings'), ('PA AND LATERAL VIEWS OF THE CHEST', 'findings'),
                ('IMPRESSION', 'impression'), ('IMPRESSON', 'impression'), ('FINDINGS/IMPRESSION', 'impression'), ('RECOMMENDATION(S)', 'recommendations'), ('CLINICAL INFORMATION', 'history')]
    text, truth = '                                 FINAL REPORT\n', {'preamble': 'FINAL REPORT'}
    for k in rng.permutation(len(headings))[:rng.integers(2, 8)]:
        heading, name = headings[k]
        body = '' if name in ('findings', 'impression') and rng.random() < .3 else ' '.join(rng.choice(words, 9)) + '.\n ' + ' '.join(rng.choice(words, 5)) + '.'
        text += f' {heading}: {body}\n \n'
        if body: truth[name] = body
    truth = {name: body for name, body in truth.items()}
    found = mimic.mit_sections(text)
    last = found.pop('last_paragraph', '')
    if not {'findings', 'impression'} & set(truth): assert not last     # the empty line stands at the very end
    assert found == truth

@pytest.mark.parametrize('heading, name', [('IMPRESSION', 'impression'), ('NDICATION', 'impression'), ('PFI', 'history'), ('FINAL IMPRESSION', 'impression'), ('WETREAD', 'wet read'),
                                           ('PORTABLE SUPINE', 'findings'), ('BONE WINDOW', 'findings'), ('TECHNIQUE', 'technique'), ('CLINICAL HISTORY', 'history'), ('REFERENCE EXAM', 'comparison')])
def test_names_of_sections(heading, name): assert mimic.mit_section_name(heading) == name

def test_a_heading_on_the_line_of_another_is_text():
    assert mimic.mit_sections('\n FINDINGS: see CT: clear.\n IMPRESSION: normal.\n') == {'preamble': '', 'findings': 'see CT: clear.', 'impression': 'normal.'}
    assert mimic.mit_sections('no heading at all') == {'full report': 'no heading at all'}
    assert mimic.mit_sections('') == {'full report': ''}
    assert mimic.mit_sections(' IMPRESSION: first line of the file') == {'full report': 'IMPRESSION: first line of the file'}     # a heading needs a line before it
    assert mimic.mit_sections('x\n HISTORY: Cough.\n \n The lungs are clear.\n \n Nothing else.')['last_paragraph'] == 'The lungs are clear.\n \n Nothing else.'

def test_all_hand_picked_studies_reach_the_table(tmp_path):
    "MIT-LCP's create_section_files drops them (checked in its code); the 8 without a reading are there, and empty."
    assert (len(mimic.HAND_PICKED_SECTIONS), len(mimic.HAND_PICKED_RANGES)) == (23, 31)
    assert set(mimic.HAND_PICKED_SECTIONS.values()) == {'recommendations', 'examination', 'technique', 'indication', 'note', 'history'}
    assert ids_hash(f'{s} {n}' for s, n in {**mimic.HAND_PICKED_SECTIONS, **mimic.HAND_PICKED_RANGES}.items())[:12] == '81ecc1acdd21'
    heading = dict(recommendations='RECOMMENDATION(S)')
    texts = {study: f'FINAL REPORT\n TECHNIQUE:  PA.\n {heading.get(name, name.upper())}:  The reading of {study}.\n' for study, name in mimic.HAND_PICKED_SECTIONS.items()}
    texts |= {study: ''.join(chr(97 + k % 26) for k in range(1000)) for study in mimic.HAND_PICKED_RANGES}
    with zipfile.ZipFile(tmp_path/'mimic-cxr-reports.zip', 'w') as archive:
        for study, text in texts.items(): archive.writestr(f'mimic-cxr-reports/files/p10/p10000000/{study}.txt', text)
        archive.writestr('files/p10/p10000000/README.txt', 'no report')
    table = pd.read_csv(mimic.write_sectioned(tmp_path/'mimic-cxr-reports.zip', tmp_path/'mimic_cxr_sectioned.csv'), keep_default_na=False).set_index('study')
    assert list(table.columns) == ['impression', 'findings', 'last_paragraph', 'comparison'] and set(table.index) == set(texts)
    for study in mimic.HAND_PICKED_SECTIONS: assert table.impression[study] == f'The reading of {study}.'
    for study, (a, b) in mimic.HAND_PICKED_RANGES.items(): assert table.impression[study] == texts[study][a:b]
    assert (table.impression == '').sum() == 8

def test_table_of_sections_appears_whole_or_not_at_all(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(pd.DataFrame, 'to_csv', lambda self, path, **k: (Path(path).write_text('half'), exec('raise OSError("disk full")')))
    with pytest.raises(Exception): mimic.write_sectioned(raw['mimic_cxr']/'mimic-cxr-reports.zip', tmp_path/'a.csv')
    assert not list(tmp_path.iterdir())

# --- MIMIC-CXR: the set ------------------------------------------------------------------------------------------------------

def truth_of_mimic(source):
    "film -> phantom, by the order of the metadata table."
    meta = read_packed(source/'mimic-cxr-2.0.0-metadata.csv.gz')
    return dict(zip(meta['dicom_id'][meta['ViewPosition'].isin(('PA', 'AP'))], phantom_films(N, 0, (192, 160))))

def test_mimic_from_end_to_end(raw, stores):
    store, truth = stores['mimic_cxr'], truth_of_mimic(raw['mimic_cxr'])
    assert set(store.index.image_id) == set(truth) and len(rejected(store.path)) == 0
    from g2d.data.store import fit
    labels = {'nodule': 'Lung Lesion', 'mass': 'Lung Lesion', 'pleural effusion': 'Pleural Effusion', 'edema': 'Edema', 'foreign object': 'Support Devices', 'cardiomegaly': 'Cardiomegaly',
              'pneumothorax': 'Pneumothorax', 'consolidation': 'Consolidation', 'atelectasis': 'Atelectasis'}
    for i, row in enumerate(store.index.itertuples()):
        film = truth[row.image_id]
        assert np.abs(store.images[i].astype(int) - fit(film.image, 96)[0]).mean() < 2
        assert row.view == film.view and row.source == 'mimic_cxr' and row.patient_id.endswith(f'{7*film.patient:03d}')
        if i < len(store) - 1: assert set(row.labels) == {labels[l] for l in film.labels}, film.number
        assert row.split == {4: 'val', 5: 'test'}.get(film.patient % 6, 'train')
        usual = film.number % 8 != 5 and int(row.study_id) < 50000000 + 13*N
        if usual: assert ' '.join(row.text.split()) == ' '.join(film.text.replace('\nIMPRESSION', ' IMPRESSION').split())
    assert pd.isna(store.index.labels.iloc[-1])                                         # the last study is not in the table of labels
    check_disjoint(store.index)
    assert {'train', 'val', 'test'} == set(store.index.split)

def test_mimic_splits_leak_where_they_should(raw, stores):
    store = stores['mimic_cxr']
    official, mgca, released, paper, fixed = (store.scheme(n) for n in ('official', 'as_mgca', 'as_released', 'as_paper', 'fixed'))
    assert official.leaks == fixed.leaks == paper.leaks == {} and mgca.leaks and released.leaks
    assert mgca.parts['val'] == mgca.parts['test'] and set(mgca.parts['val']) <= set(official.parts['val']) | set(official.parts['test'])
    assert mgca.leaks['val and test']['images'] == len(mgca.parts['val'])
    text = store.index.set_index('image_id')
    assert set(released.parts['train']) == set(mgca.parts['train']) | set(released.parts['val']) | set(released.parts['test'])
    picked = set(text.index[text.study_id.isin(['50913680', '50525523', '58235663'])])
    for scheme in (mgca, released, paper): assert not picked & set().union(*scheme.parts.values())  # lost to the peers
    assert len(picked & set().union(*fixed.parts.values())) == 2                        # the third holds no reading
    assert set(fixed.parts['train']) == set(text.index[(text.split == 'train') & text.text.notna()])
    assert paper.parts['train'] == mgca.parts['train'] and list(paper.parts) == ['train']
    rows = text[(text.split == 'train') & text.text.notna() & ~text.index.isin(picked)]
    for f in (.01, .1): assert mgca.fractions[f'{f:g}'] == sorted(rows.sample(frac=f, random_state=42).index)      # as pandas draws them
    leaking = make_released(raw, store)
    assert (leaking.index.split == 'train').sum() == len(released.parts['train'])       # chosen as the split, everything is in train

def make_released(raw, store): return make('mimic_cxr', raw['mimic_cxr'], store.path.parent/'released', split='as_released')

def test_mimic_in_every_place_and_form(raw, tmp_path):
    "2.0.0 beneath, unpacked tables, version 2.1.0, what wget leaves, reports unzipped or as a file of their own: the same films, texts and labels."
    key = lambda source, **o: [(i.image_id, i.text, tuple(i.labels or ()), i.view, i.split, read_radiograph(i.image).sum()) for i in list_items('mimic_cxr', source, **o).items]
    want, source = key(raw['mimic_cxr']), raw['mimic_cxr']
    a = tmp_path/'a'; shutil.copytree(source, a/'2.0.0')
    assert key(a) == want
    b = tmp_path/'b'; shutil.copytree(source, b/'physionet.org/files/mimic-cxr-jpg/2.1.0')
    inner = b/'physionet.org/files/mimic-cxr-jpg/2.1.0'
    (inner/'mimic-cxr-2.0.0-split.csv').write_bytes(__import__('gzip').decompress((inner/'mimic-cxr-2.0.0-split.csv.gz').read_bytes())); (inner/'mimic-cxr-2.0.0-split.csv.gz').unlink()
    (inner/'mimic-cxr-2.0.0-chexpert.csv.gz').rename(inner/'mimic-cxr-2.1.0-chexpert.csv.gz')
    with zipfile.ZipFile(inner/'mimic-cxr-reports.zip') as archive: archive.extractall(tmp_path/'reports')
    (inner/'mimic-cxr-reports.zip').unlink()
    with pytest.raises(G2DError, match='There are no reports'): list_items('mimic_cxr', b)
    assert key([b, tmp_path/'reports']) == key(b, reports=tmp_path/'reports/files') == want
    shutil.copytree(tmp_path/'reports/files', inner/'files', dirs_exist_ok=True)        # films and reports in one tree
    assert key(b) == want
    shutil.copy(source/'mimic-cxr-reports.zip', tmp_path/'texts.zip')
    assert key([source, tmp_path/'texts.zip']) == key(source, reports=tmp_path/'texts.zip') == want
    mimic.write_sectioned(source/'mimic-cxr-reports.zip', tmp_path/'mimic_cxr_sectioned.csv')
    c = tmp_path/'c'; shutil.copytree(source, c); (c/'mimic-cxr-reports.zip').unlink()
    assert key([c, tmp_path/'mimic_cxr_sectioned.csv']) == want
    with pytest.raises(G2DError, match='text=report'): list_items('mimic_cxr', [c, tmp_path/'mimic_cxr_sectioned.csv'], text='report')

def test_mimic_options(raw):
    source = raw['mimic_cxr']
    items = lambda **o: list_items('mimic_cxr', source, **o).items
    assert len(items(views='all')) > len(items()) == N and {i.view for i in items(views='LATERAL')} == {'LATERAL'} and None in {i.view for i in items(views='all')}
    first = lambda **o: next(i for i in items(**o) if i.study_id == '50000000').text
    assert first(sections='impression|findings') == first(sections=['impression', 'findings']) and first(sections=['impression', 'findings']).startswith('IMPRESSION') and len(items(views='PA|AP')) == N and 'IMPRESSION' not in first(sections='findings')
    assert first(text='report').startswith('FINAL REPORT') and first(text='none') is None and first(text='priority').startswith('IMPRESSION')
    assert list_items('mimic_cxr', source, text='none').schemes[0].name == 'official'
    assert all(i.text for i in items(pairs=True)) and len(items(pairs=True)) < N
    ones, zeros, keep = ({i.study_id: i for i in items(uncertain=rule)} for rule in ('u_ones', 'u_zeros', 'keep'))
    unsure = [s for s, i in ones.items() if i.extra and 'Pneumonia' in i.extra.get('uncertain', [])]
    assert unsure and all('Pneumonia' in ones[s].labels and 'Pneumonia' not in zeros[s].labels and 'Pneumonia' not in keep[s].labels for s in unsure)
    assert {i.study_id: i.labels for i in items(labels='negbio', uncertain='u_ones')} != {s: i.labels for s, i in ones.items()} and all(i.labels is None for i in items(labels='none'))
    plain = lambda t: t and ' '.join(t.split())
    assert sum(plain(g.text) == plain(m.text) for g, m in zip(items(rules='g2d'), items())) >= N - 2     # ours also takes 'Comparison:' in small letters for a heading

def test_mimic_radiologist_labels(raw, tmp_path):
    source = copy(raw, 'mimic_cxr', tmp_path/'m')
    table = read_packed(source/'mimic-cxr-2.0.0-chexpert.csv.gz').rename(columns={'Lung Opacity': 'Airspace Opacity'}).drop(columns='subject_id').iloc[:5]
    table['Airspace Opacity'] = '1.0'
    table.to_csv(source/'mimic-cxr-2.1.0-test-set-labeled.csv', index=False)
    items = list_items('mimic_cxr', source, labels='radiologist').items
    assert sum(i.labels is not None for i in items) == 5 and all('Lung Opacity' in i.labels for i in items[:5])

def test_held_out_patients_leave_fixed(raw, tmp_path):
    source = raw['mimic_cxr']
    fixed = lambda **o: next(s for s in list_items('mimic_cxr', source, **o).schemes if s.name == 'fixed')
    items, all_in = {i.image_id: i for i in list_items('mimic_cxr', source).items}, fixed()
    film = next(i for i in all_in.parts['train'] if sum(items[k].patient_id == items[i].patient_id for k in all_in.parts['train']) > 1)
    (tmp_path/'out.csv').write_text(f'dicom_id,x\n{film},1\n')
    left = fixed(held_out=tmp_path/'out.csv')
    assert set(all_in.parts['train']) - set(left.parts['train']) == {i for i in all_in.parts['train'] if items[i].patient_id == items[film].patient_id} and left.parts['test'] == all_in.parts['test']
    (tmp_path/'who.csv').write_text(f'subject_id\n{items[film].patient_id}\n')
    (tmp_path/'ms.json').write_text(json.dumps(dict(images=[dict(file_name=f'{film}.jpg')])))
    assert fixed(held_out=tmp_path/'who.csv').parts == fixed(held_out=[tmp_path/'ms.json']).parts == left.parts
    (tmp_path/'bad.csv').write_text('name\nx\n')
    with pytest.raises(G2DError, match='no column dicom_id'): fixed(held_out=tmp_path/'bad.csv')

def test_master_table_as_the_peers_read_it(raw, tmp_path):
    source = raw['mimic_cxr']
    mimic.write_master(source, tmp_path/'master.csv'); mimic.write_master(source, tmp_path/'peer.csv', hand_picked=False, merge=False)
    ours, peer = (pd.read_csv(tmp_path/name) for name in ('master.csv', 'peer.csv'))
    assert list(ours) == ['Path', 'dicom_id', 'subject_id', 'study_id', 'ViewPosition', 'impression', 'findings', 'split']
    assert set(ours.split) == {'train', 'valid'} and set(peer.split) == {'train', 'validate', 'test'} and ours.notna().all().all() and ours.Path.str.startswith('2.0.0/files/p1').all()
    assert set(ours.study_id) - set(peer.study_id) == {'s50913680', 's50525523'}
    assert all((source/path.removeprefix('2.0.0/')).is_file() for path in ours.Path)
    released = next(s for s in list_items('mimic_cxr', source).schemes if s.name == 'as_released')
    assert sorted(peer.dicom_id) == released.parts['train']

tables = ['split', 'metadata', 'chexpert']

@pytest.mark.parametrize('kind', tables)
def test_mimic_missing_table(raw, tmp_path, kind):
    source = copy(raw, 'mimic_cxr', tmp_path/'m')
    (source/f'mimic-cxr-2.0.0-{kind}.csv.gz').unlink()
    with pytest.raises(G2DError) as error: make('mimic_cxr', source, tmp_path/'out')
    assert f'mimic-cxr-2.0.0-{kind}.csv' in one_sentence(error) and not (tmp_path/'out').exists()

@pytest.mark.parametrize('kind, column', [('split', 'split'), ('split', 'dicom_id'), ('metadata', 'ViewPosition'), ('metadata', 'subject_id'), ('metadata', 'study_id'), ('chexpert', 'Edema'), ('chexpert', 'study_id')])
def test_mimic_renamed_column(raw, tmp_path, kind, column):
    source = copy(raw, 'mimic_cxr', tmp_path/'m')
    rewrite(source/f'mimic-cxr-2.0.0-{kind}.csv.gz', lambda t: t.rename(columns={column: 'renamed'}))
    with pytest.raises(G2DError) as error: make('mimic_cxr', source, tmp_path/'out')
    assert f'mimic-cxr-2.0.0-{kind}.csv.gz' in one_sentence(error) and f'"{column}"' in one_sentence(error)

def test_mimic_bad_rows_and_films(raw, tmp_path):
    source = copy(raw, 'mimic_cxr', tmp_path/'m')
    films = [i for i in list_items('mimic_cxr', source).items]
    films[0].image.write_bytes(films[0].image.read_bytes()[:900]); films[1].image.unlink(); films[2].image.write_bytes(b''); films[3].image.write_text('<html>login</html>')
    def spoil(t):
        name = t.dicom_id
        t.loc[name == films[4].image_id, 'subject_id'] = ''; t.loc[name == films[5].image_id, 'study_id'] = 's50'
        return t
    rewrite(source/'mimic-cxr-2.0.0-metadata.csv.gz', spoil)
    def spoil_split(t): t.loc[t.dicom_id == films[6].image_id, 'split'] = 'dev'; return pd.concat([t[t.dicom_id != films[7].image_id], pd.DataFrame([dict(dicom_id='ghost', study_id='1', subject_id='1', split='train')])])
    rewrite(source/'mimic-cxr-2.0.0-split.csv.gz', spoil_split)
    def spoil_labels(t): t.loc[t.study_id == films[8].study_id, 'Edema'] = 'maybe'; return t
    rewrite(source/'mimic-cxr-2.0.0-chexpert.csv.gz', spoil_labels)
    store = make('mimic_cxr', source, tmp_path/'out')
    reasons = ' '.join(rejected(tmp_path/'out').reason)
    assert len(store) == N - 8 and len(rejected(tmp_path/'out')) == 10
    for words in ('truncated', 'file is absent', 'empty (0 bytes)', 'not an image', 'subject_id or study_id is no number', 'split is "dev"', 'not in mimic-cxr-2.0.0-split.csv.gz', 'ghost: not in', 'Edema is "maybe"'): assert words in reasons, words
    assert store.index.labels[store.index.image_id == films[8].image_id].isna().all()
    assert set(rejected(tmp_path/'out').file.map(lambda f: Path(f).name)) == {f'mimic-cxr-2.0.0-{kind}.csv.gz' for kind in tables}

@pytest.mark.parametrize('options, words', [(dict(uncertain='u_twos'), 'u_ones'), (dict(text='impression'), 'priority'), (dict(views='front'), 'LATERAL'), (dict(labels='chexbert'), 'negbio'), (dict(sections='impresion'), 'impression'),
                                            (dict(rules='mine'), 'mit_lcp'), (dict(reports='/no/such'), 'There are no reports'), (dict(wrong=1), 'has no option'), (dict(held_out='/no/such.csv'), 'such.csv')])
def test_mimic_wrong_options(raw, options, words):
    with pytest.raises(G2DError) as error: list_items('mimic_cxr', raw['mimic_cxr'], **options)
    assert words in one_sentence(error)

def test_mimic_broken_archive_and_tables(raw, tmp_path):
    source = copy(raw, 'mimic_cxr', tmp_path/'m')
    zipped = source/'mimic-cxr-reports.zip'
    zipped.write_bytes(zipped.read_bytes()[:500])
    with pytest.raises(G2DError, match='not a readable zip'): list_items('mimic_cxr', source)
    with pytest.raises(G2DError, match='There is no /no/where'): list_items('mimic_cxr', '/no/where')
    (source/'mimic-cxr-2.0.0-split.csv.gz').write_bytes(b'\x1f\x8bxx')
    with pytest.raises(G2DError, match='split.csv.gz'): list_items('mimic_cxr', source)
    with pytest.raises(G2DError, match='holds no report'): zipfile.ZipFile(tmp_path/'e.zip', 'w').close(); mimic.write_sectioned(tmp_path/'e.zip', tmp_path/'x.csv')

def test_mimic_doubled_film_and_patient_in_two_parts_stop(raw, tmp_path):
    source = copy(raw, 'mimic_cxr', tmp_path/'m')
    meta = source/'mimic-cxr-2.0.0-metadata.csv.gz'
    kept = meta.read_bytes()
    rewrite(meta, lambda t: pd.concat([t, t.iloc[:1]]))
    with pytest.raises(G2DError, match='more than once'): make('mimic_cxr', source, tmp_path/'out')
    meta.write_bytes(kept)
    twice = read_packed(meta).groupby('subject_id').filter(lambda g: len(g) > 1).query('ViewPosition in ("PA", "AP")')
    two = twice[twice.subject_id == twice.subject_id[twice.subject_id.duplicated()].iloc[0]].dicom_id.iloc[0]
    def move(t): t.loc[t.dicom_id == two, 'split'] = 'test' if t.split[t.dicom_id == two].iloc[0] != 'test' else 'train'; return t
    rewrite(source/'mimic-cxr-2.0.0-split.csv.gz', move)
    with pytest.raises(G2DError, match='more than one split|leaks'): make('mimic_cxr', source, tmp_path/'out')

# --- MS-CXR --------------------------------------------------------------------------------------------------------------------

def test_ms_cxr_from_end_to_end(raw, stores):
    from g2d.validation import findings_with_words
    source, store = raw['ms_cxr'], stores['ms_cxr']
    truth = truth_of_mimic(source[1])
    zoom = 96/192
    assert len(rejected(store.path)) == 1 and 'outside its film' in rejected(store.path).reason[0]
    for i, row in enumerate(store.index.itertuples()):
        film, extra = truth[row.image_id], json.loads(row.extra)
        said = list(ms._said(film))
        assert extra['prompts'] == [phrase for _, phrase, _ in said][:len(extra['prompts'])] and len(extra['prompts']) == len(store.boxes(i))
        for box, (finding, _, want) in zip(store.boxes(i), said):
            assert box['label'] == finding and abs(box['x'] - (want['x']*zoom + 8)) < 1 and abs(box['y'] - want['y']*zoom) < 1 and abs(box['w'] - want['w']*zoom) < 1
        assert [p for p, _ in findings_with_words(store, i)] == extra['prompts'] and row.source == 'mimic_cxr'
    assert store.scheme('fixed').sizes == {'test': len(store)} and set(store.index.split) == {'test'}
    assert sum(store.scheme('as_mimic').sizes.values()) == len(store)

def test_a_phrase_with_two_boxes_is_one_region(stores):
    store = stores['ms_cxr']
    both = [(i, found) for i in range(len(store)) for found in ms.phrases(store, i) if 'bilateral pleural effusions' in found[0]]
    assert both
    for i, (phrase, label, inside) in both:
        want = np.zeros(store.size, bool)
        for box, prompt in zip(store.boxes(i), json.loads(store.index.extra[i])['prompts']):
            if prompt == phrase: want[int(box['y']):int(np.ceil(box['y'] + box['h'])), int(box['x']):int(np.ceil(box['x'] + box['w']))] = True
        assert (inside == want).all() and label == 'Pleural Effusion'

def test_ms_cxr_forms(raw, tmp_path):
    "JSON, CSV, version 1.1.0 with splits, images given as an option: the same boxes."
    folder, films = raw['ms_cxr']
    key = lambda source, **o: [(i.image_id, i.boxes, i.extra, i.boxes_on, read_radiograph(i.image).sum()) for i in list_items('ms_cxr', source, **o).items]
    want = key([folder, films])
    assert key([folder/'MS_CXR_Local_Alignment_v1.0.0.csv', films]) == key(folder, images=films) == key([films, folder]) == want
    table = pd.read_csv(folder/'MS_CXR_Local_Alignment_v1.0.0.csv')
    table['split'] = np.where(table.dicom_id.map(list(table.dicom_id.unique()).index) % 2, 'val', 'test')
    table.to_csv(tmp_path/'MS_CXR_Local_Alignment_v1.1.0.csv', index=False)
    listing = list_items('ms_cxr', [tmp_path, films])
    assert key([tmp_path, films]) == want and {'val', 'test'} == set(next(s for s in listing.schemes if s.name == 'official').parts)

def test_ms_cxr_on_shrunken_films(raw, tmp_path):
    source = copy(raw, 'ms_cxr', tmp_path/'m')
    whole = make('ms_cxr', raw['ms_cxr'], tmp_path/'whole')
    for path in source[1].rglob('*.jpg'):
        from PIL import Image
        with Image.open(path) as film: small = film.resize((80, 96))
        small.save(path)
    with pytest.raises(G2DError, match='drawn on'): make('ms_cxr', source, tmp_path/'no')      # every film rejected with its reason, none misread
    half = make('ms_cxr', source, tmp_path/'half', resized=True)
    for i in range(len(whole)):
        for a, b in zip(whole.boxes(i), half.boxes(i)): assert all(abs(a[k] - b[k]) < 1e-6 for k in 'xywh')
    first = list_items('ms_cxr', source).items[0].image
    write_image(first, np.tile(np.arange(96, dtype=np.uint8), (96, 1)))                         # another shape
    assert any('not only the scale' in reason for *_, reason in list_items('ms_cxr', source, resized=True).rejected)

@pytest.mark.parametrize('column, value, words', [('w', 0, '0 x'), ('x', 'left', 'x is "left"'), ('h', 5000, 'outside'), ('label_text', '', 'label_text is blank'), ('path', 'here.jpg', 'path is'), ('image_width', 'wide', 'image_width')])
def test_ms_cxr_bad_rows(raw, tmp_path, column, value, words):
    source = copy(raw, 'ms_cxr', tmp_path/'m')
    (source[0]/'MS_CXR_Local_Alignment_v1.0.0.json').unlink()
    def spoil(t): t.loc[0, column] = str(value); return t
    rewrite(source[0]/'MS_CXR_Local_Alignment_v1.0.0.csv', spoil)
    listing = list_items('ms_cxr', source)
    assert any(words in reason and row == 2 for _, row, reason in listing.rejected), listing.rejected

@pytest.mark.parametrize('spoil, words', [(lambda p: p.write_text('{'), 'not valid JSON'), (lambda p: p.write_text('{}'), "lacks 'categories'"), (lambda p: p.write_text('[]'), 'lacks'),
                                          (lambda p: p.write_text(json.dumps(dict(json.loads(p.read_text()), images=[]))), 'lacks')])
def test_ms_cxr_broken_json(raw, tmp_path, spoil, words):
    source = copy(raw, 'ms_cxr', tmp_path/'m')
    spoil(source[0]/'MS_CXR_Local_Alignment_v1.0.0.json')
    with pytest.raises(G2DError) as error: make('ms_cxr', source, tmp_path/'out')
    assert words in one_sentence(error) and 'MS_CXR_Local' in one_sentence(error)

def test_ms_cxr_missing_things(raw, tmp_path):
    source = copy(raw, 'ms_cxr', tmp_path/'m')
    with pytest.raises(G2DError, match='MS_CXR_Local_Alignment'): list_items('ms_cxr', source[1])
    films = list_items('ms_cxr', source).items
    films[0].image.unlink(); films[1].image.write_bytes(b'\xff\xd8\xff')
    store = make('ms_cxr', source, tmp_path/'out')
    assert len(store) == len(films) - 2 and {'absent', 'broken', 'truncated'} & set(re.findall(r'\w+', ' '.join(rejected(tmp_path/'out').reason)))
    rewrite(source[0]/'MS_CXR_Local_Alignment_v1.0.0.csv', lambda t: t.rename(columns={'label_text': 'phrase'}))
    with pytest.raises(G2DError, match='no column "label_text"'): list_items('ms_cxr', [source[0]/'MS_CXR_Local_Alignment_v1.0.0.csv', source[1]])

# --- leaks between the sets ------------------------------------------------------------------------------------------------------

def test_pretraining_on_mimic_that_has_seen_ms_cxr_is_found_out(raw, stores, tmp_path):
    "Fingerprints as a checkpoint carries them: of all of MIMIC, of its official training part, of `fixed` with MS-CXR held out."
    source, test = raw['ms_cxr'], stores['ms_cxr']
    every = make('mimic_cxr', source[1], tmp_path/'all', held_out=source[0]/'MS_CXR_Local_Alignment_v1.0.0.json')
    seen = lambda ids: fingerprints(every.index[every.index.image_id.isin(ids)])
    with pytest.raises(G2DError, match=f'seen {len(test)} of these {len(test)} test images'): check_unseen(seen(every.index.image_id), test.index)
    with pytest.raises(G2DError, match='has seen'): check_unseen(seen(every.scheme('as_released').parts['train']), test.index)
    train = set(test.scheme('as_mimic').parts['train'])
    with pytest.raises(G2DError, match=rf'seen {len(train)} of these'): check_unseen(seen(every.scheme('official').parts['train']), test.index)
    check_unseen(seen(every.scheme('fixed').parts['train']), test.index)
    official = every.scheme('official')                                         # val and test of MIMIC share no patient with train
    for part in ('val', 'test'):
        rows = every.index[every.index.image_id.isin(official.parts[part])]
        check_unseen(seen(official.parts['train']), rows); check_unseen(seen(every.scheme('fixed').parts['train']), rows)
        with pytest.raises(G2DError): check_unseen(seen(every.scheme('as_released').parts['train']), rows)
    other = test.index[~test.index.image_id.isin(train)]                        # another film of a seen patient counts as seen
    moved = other.assign(image_id='new-' + other.image_id)
    with pytest.raises(G2DError): check_unseen(seen(every.index.image_id), moved)

# --- Open-I ----------------------------------------------------------------------------------------------------------------------

def test_open_i_from_end_to_end(raw, stores):
    from g2d.data.store import fit
    store, films = stores['open_i'], phantom_films(N, 0, (192, 160))
    for i, row in enumerate(store.index.itertuples()):
        film = films[int(row.patient_id.removeprefix('CXR')) - 1]
        image = film.image if row.image_id.endswith('-1001') else film.image[:, ::-1]
        assert np.abs(store.images[i].astype(int) - fit(np.ascontiguousarray(image), 96)[0]).max() <= 1
        n = film.number % 8
        if n == 5: assert pd.isna(row.text)
        else: assert ('FINDINGS' in row.text) == (n != 3) and ('IMPRESSION' in row.text) == (n != 2)
        if n == 4: assert pd.isna(row.labels) if not isinstance(row.labels, list) else False
        else: assert len(row.labels) == len(film.labels)
    reasons = rejected(store.path).reason
    assert sum('refers to no film' in r for r in reasons) == 3 and sum('file is absent' in r for r in reasons) == 3 and sum('not a readable XML' in r for r in reasons) == 1
    assert store.scheme('fixed').leaks == {} and set(store.index.licence) == {'http://creativecommons.org/licenses/by-nc-nd/4.0/'}
    check_disjoint(store.index)

def test_open_i_forms(raw, tmp_path):
    "Archive or folder, names of the library or of Kaggle, films in a folder of their own: the same films."
    import tarfile
    source = raw['open_i']
    key = lambda s, **o: [(i.image_id, i.text, i.labels, Path(i.image).is_file()) for i in list_items('open_i', s, **o).items]
    want = key(source)
    tarfile.open(source/'NLMCXR_reports.tgz').extractall(tmp_path/'x', filter='data')
    kaggle = tmp_path/'images'; kaggle.mkdir()
    for path in (source/'NLMCXR_png').iterdir(): shutil.copy(path, kaggle/f'{path.stem.removeprefix("CXR")}.dcm.png')
    assert key([tmp_path/'x/ecgen-radiology', kaggle]) == key(tmp_path/'x', images=kaggle) == key([source/'NLMCXR_reports.tgz', source/'NLMCXR_png']) == want
    assert not any(there for *_, there in key(source/'NLMCXR_reports.tgz'))

def test_open_i_views_and_r2gen(raw, tmp_path):
    source = raw['open_i']
    views = source/'nlmcxr_tsne_pa.csv.gz'
    frontal = list_items('open_i', source, views='frontal', views_table=views).items
    assert frontal and {i.view for i in frontal} <= {'PA', 'AP'} and all(i.image_id.endswith('-1001') for i in frontal)
    (tmp_path/'k.csv').write_text('uid,filename,projection\n1,1_IM-0001-1001.dcm.png,Frontal\n')
    assert [i.image_id for i in list_items('open_i', source, views='frontal', views_table=tmp_path/'k.csv').items] == ['CXR1_IM-0001-1001']
    lists = dict(train=[dict(id='CXR1_IM-0001'), dict(id='CXR2_IM-0002')], val=[dict(id='CXR3_IM-0003')], test=[dict(id='CXR4_IM-0004')])
    (tmp_path/'annotation.json').write_text(json.dumps(lists))
    listing = list_items('open_i', source, annotation=tmp_path/'annotation.json')
    scheme = next(s for s in listing.schemes if s.name == 'as_r2gen')
    assert scheme.parts['train'] == ['CXR1_IM-0001-1001', 'CXR2_IM-0002-1001', 'CXR2_IM-0002-2001'] and listing.counts['as_r2gen/train reports'] == 2
    (tmp_path/'bad.json').write_text('[1]')
    for options, words in ((dict(annotation=tmp_path/'bad.json'), 'annotation.json of R2Gen'), (dict(views='frontal'), 'views_table'), (dict(views='pa'), 'frontal'), (dict(sections='technique'), 'indication')):
        with pytest.raises(G2DError) as error: list_items('open_i', source, **options)
        assert words in one_sentence(error)
    (tmp_path/'v.csv').write_text('a,b\n1,2\n')
    with pytest.raises(G2DError, match='no column'): list_items('open_i', source, views_table=tmp_path/'v.csv')

def test_open_i_bad_input(raw, tmp_path):
    source = copy(raw, 'open_i', tmp_path/'o')
    films = sorted((source/'NLMCXR_png').iterdir())
    films[0].write_bytes(films[0].read_bytes()[:200]); films[1].write_bytes(b'')
    store = make('open_i', source, tmp_path/'out')
    assert len(rejected(tmp_path/'out')) == 9 and {'empty (0 bytes)'} <= {w for r in rejected(tmp_path/'out').reason for w in [r.split('file is ')[-1]]}
    (source/'NLMCXR_reports.tgz').write_bytes((source/'NLMCXR_reports.tgz').read_bytes()[:400])
    with pytest.raises(G2DError) as error: make('open_i', source, tmp_path/'out2')
    one_sentence(error)
    (source/'NLMCXR_reports.tgz').unlink()
    with pytest.raises(G2DError, match='There are no reports'): make('open_i', source, tmp_path/'out3')
    with pytest.raises(G2DError, match='There is no'): make('open_i', tmp_path/'nowhere', tmp_path/'out4')

def archives(data_root=None):
    spec = importlib.util.find_spec('torchxrayvision')
    wheel = spec and Path(spec.origin).parent/'data/NLMCXR_reports.tgz'
    return wheel if wheel and wheel.is_file() else None

@pytest.mark.parametrize('where', ['wheel', 'shared'])
def test_open_i_real_archive_goes_in_whole(where, request, tmp_path):
    "The real archive, with a small film for every one of its 7,470 references: 3,955 reports end to end."
    if where == 'wheel':
        archive = archives()
        if not archive: pytest.skip('torchxrayvision is not installed, or has no NLMCXR_reports.tgz')
    else: archive = request.getfixturevalue('data_root')/'noncommercial/iu_reports_verbatim_ccbyncnd/NLMCXR_reports.tgz'
    if not archive.is_file(): pytest.skip(f'no {archive}')
    if where == 'shared':
        table = check_counts('open_i', archive, progress=False).set_index('count')
        assert (table.verdict[table.published.notna()] == 'same').all() and table.found['reports'] == 3955 and table.found['films absent'] == 7470
        if archives(): return                                                     # the same archive; once is enough for what follows
    written = iu.write_reports(archive, tmp_path/'reports.csv')
    assert len(written) == 3955 and written.text.isna().sum() == 28 and len(pd.read_csv(tmp_path/'reports.csv')) == 3955
    films = tmp_path/'png'; films.mkdir()
    for k, film in enumerate(phantom_films(4, 0, (64, 48), 64)): write_image(films/f'seed{k}.png', film.image)
    for k, name in enumerate(n for names in written.films for n in names.split('|') if n): os.link(films/f'seed{k % 4}.png', films/f'{name}.png')
    views = dict(views_table=archive.parent/'nlmcxr_tsne_pa.csv.gz') if where == 'wheel' else {}
    store = prepare('open_i', [archive, films], tmp_path/'out', size=32, workers=0, progress=False, **views)
    lost = rejected(tmp_path/'out')
    assert len(store) == 7470 and len(lost) == 104 and lost.reason.str.contains('refers to no film').all()
    assert store.index.study_id.nunique() == 3955 - 104 and store.scheme('fixed').leaks == {}
    text = store.index.drop_duplicates('study_id').text
    assert text.str.startswith('FINDINGS').sum() > 3200 and text.isna().sum() <= 28
    if views: assert store.index.view.value_counts().to_dict() == {'PA': 3267, 'L': 584}

# --- VQA-RAD ---------------------------------------------------------------------------------------------------------------------

def test_vqa_rad_from_end_to_end(raw, stores):
    from g2d.data.store import fit
    store, films = stores['vqa_rad'], {f'synpic{20000 + 37*f.number}': f for f in phantom_films(N, 0, (200, 176))}
    assert len(store) == N - N//6 and len(rejected(store.path)) == 1 and 'answer is blank' in rejected(store.path).reason[0]
    for i, row in enumerate(store.index.itertuples()):
        film, qa = films[row.image_id], json.loads(row.extra)['qa']
        assert np.abs(store.images[i].astype(int) - fit(film.image, 96)[0]).mean() < 2 and row.patient_id == f'case{film.patient:04d}'
        assert {'question', 'answer', 'type', 'answer_type', 'part'} <= set(qa[0])
        assert sum(q['part'] == 'test' for q in qa) == (film.number % 3 in (0, 1))
        assert ('effusion? Yes.' in row.text) == ('pleural effusion' in film.labels) or film.number == 0
    assert store.scheme('fixed').leaks == {} and store.scheme('official').leaks['train and test']['images'] > 0 and store.schemes == ['fixed', 'official']
    check_disjoint(store.index)

def test_vqa_rad_options(raw):
    source = raw['vqa_rad']
    items = lambda **o: list_items('vqa_rad', source, **o).items
    assert len(items(organ='all')) == N and {json.dumps(i.extra['organ']) for i in items(organ='head')} == {'"HEAD"'}
    for everything, train in zip(items(), items(text='train')):
        test = [q for q in everything.extra['qa'] if q['part'] == 'test']
        assert len(train.text.split('? ')) == len(everything.text.split('? ')) - len(test)
    assert all(i.text is None for i in items(text='none'))
    more = items(rephrased_too=True)
    assert sum(len(i.extra['qa']) for i in more) > sum(len(i.extra['qa']) for i in items()) and any('Is/Are there pleural effusion?' in i.text for i in more)
    for options, words in ((dict(organ='foot'), "'chest'"), (dict(text='test'), "'train'")):
        with pytest.raises(G2DError) as error: items(**options)
        assert words in one_sentence(error)

@pytest.mark.parametrize('text, words', [('', 'not valid JSON'), ('[', 'not valid JSON'), ('{}', 'no list of questions'), ('[]', 'no list of questions'), ('[{"qid": 1}]', 'no key "image_name"')])
def test_vqa_rad_broken_json(tmp_path, text, words):
    (tmp_path/'VQA_RAD Dataset Public.json').write_text(text)
    with pytest.raises(G2DError) as error: make('vqa_rad', tmp_path, tmp_path/'out')
    assert words in one_sentence(error)

def test_vqa_rad_bad_input(raw, tmp_path):
    source = copy(raw, 'vqa_rad', tmp_path/'v')
    films = list_items('vqa_rad', source).items
    films[0].image.unlink(); films[1].image.write_bytes(films[1].image.read_bytes()[:300])
    path = source/'VQA_RAD Dataset Public.json'
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([17, dict(entries[9], question=' ')] + entries), 'utf-8-sig')
    store = make('vqa_rad', source, tmp_path/'out')
    reasons = ' '.join(rejected(tmp_path/'out').reason)
    assert len(store) == len(films) - 2 and all(w in reasons for w in ('absent', 'truncated', 'no question', 'question is blank', 'answer is blank'))
    rewritten = [{('organ' if k == 'image_organ' else k): v for k, v in e.items()} for e in entries]
    path.write_text(json.dumps(rewritten))
    with pytest.raises(G2DError, match='no key "image_organ"'): list_items('vqa_rad', source)
    path.unlink()
    with pytest.raises(G2DError, match='VQA_RAD Dataset Public.json'): list_items('vqa_rad', source)

def test_vqa_texts_are_those_of_the_shared_data(data_root):
    path = data_root/'open_cxr/vqa_rad_chest/vqa_rad_chest.csv'
    if not path.is_file(): pytest.skip(f'no {path}')
    shared = pd.read_csv(path)
    made = [vqa.qa_text(json.loads(extra)['qa']) for extra in shared.extra]
    assert len(shared) == 75 and sum(m == t for m, t in zip(made, shared.text)) >= 68
    once = lambda text: re.sub(r' *[.?]+(?= |$)', '.', text)                     # doubled full stops and a blank before a question mark are left
    assert [once(m) for m in made] == [once(t) for t in shared.text]

# --- all four ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['mimic_cxr', 'ms_cxr', 'open_i', 'vqa_rad'])
def test_the_same_twice_and_elsewhere(raw, stores, tmp_path, name):
    "Another folder, the same store to the last byte, and the same lists."
    again = make(name, copy(raw, name, tmp_path/'elsewhere'), tmp_path/'out')
    assert again.hash == stores[name].hash
    for scheme in again.schemes: assert again.scheme(scheme) == stores[name].scheme(scheme)
    other = write_layout(name, tmp_path/'again', N)
    assert make(name, other, tmp_path/'out2').hash == again.hash

@pytest.mark.parametrize('name', ['mimic_cxr', 'ms_cxr', 'open_i', 'vqa_rad'])
def test_data_prep_script(raw, tmp_path, monkeypatch, capsys, name):
    script, source = root/f'data_prep/{name}/prepare.py', raw[name]
    run = lambda *words: (monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, words)]), runpy.run_path(str(script), run_name='__main__'))
    sources = source if isinstance(source, list) else [source]
    run(*sources, '--out', tmp_path/'out', '--size', 64, '--workers', 0)
    assert len(RadiographStore.open(tmp_path/'out')) and 'rejected.csv' in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop: run(*sources, '--check')
    assert stop.value.code == 1 and 'published' in capsys.readouterr().out       # phantoms are fewer than the real films
    with pytest.raises(SystemExit) as stop: run(tmp_path/'nowhere', '--out', tmp_path/'none')
    assert isinstance(stop.value.code, str) and '\n' not in stop.value.code
    assert (root/f'data_prep/{name}/README.md').is_file()
    if name == 'mimic_cxr':
        run(*sources, '--sectioned', tmp_path/'s.csv', '--master', tmp_path/'m.csv')
        assert len(pd.read_csv(tmp_path/'s.csv')) == N and len(pd.read_csv(tmp_path/'m.csv')) > N//2
    if name == 'open_i':
        run(*sources, '--reports-table', tmp_path/'r.csv', '--sections', 'impression')
        assert not pd.read_csv(tmp_path/'r.csv').text.str.contains('FINDINGS').any()
