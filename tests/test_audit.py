"The audit: fingerprints against a brute force, planted duplicates, tables against pandas by hand, one page for any store."
import io, json, re, subprocess, sys
import numpy as np, pandas as pd, pytest
from pathlib import Path
from PIL import Image
import g2d.data.audit as room
from g2d.data.audit import audit, audit_page, choose_films, count_labels, count_rows, count_texts, find_leaks, fingerprint, near_duplicates, read_pixels, write_audit
from g2d.data.phantom import make_phantom_store
from g2d.data.store import RadiographStore, StoreWriter
from g2d.settings import G2DError


def jpeg(image, quality):
    data = io.BytesIO()
    Image.fromarray(image).save(data, 'JPEG', quality=quality)
    return np.asarray(Image.open(io.BytesIO(data.getvalue())))

CHANGES = dict(
    same=lambda i: i, brighter=lambda i: np.clip(i.astype(int) + 25, 0, 255).astype(np.uint8), darker=lambda i: np.clip(i.astype(int) - 25, 0, 255).astype(np.uint8),
    contrast=lambda i: np.clip(i*.75 + 10, 0, 255).astype(np.uint8), jpeg80=lambda i: jpeg(i, 80), jpeg20=lambda i: jpeg(i, 20),
    resized=lambda i: np.asarray(Image.fromarray(i).resize((75, 75), Image.Resampling.BILINEAR).resize(i.shape[::-1], Image.Resampling.BICUBIC)),
    noise=lambda i: np.clip(i + np.random.default_rng(0).normal(0, 6, i.shape), 0, 255).astype(np.uint8))


@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    return make_phantom_store(tmp_path_factory.mktemp('phantoms')/'store', 200, size=128, seed=3, workers=0)


@pytest.fixture(scope='module')
def planted(phantoms, tmp_path_factory):
    "The phantoms, and a changed copy of a training film under another patient in the test split for each change; one more copy within train, of the same patient."
    train = np.flatnonzero(phantoms.index['split'] == 'train')
    path = tmp_path_factory.mktemp('planted')/'store'
    with StoreWriter(path, size=128, source='phantom', licence='Apache-2.0') as writer:
        for i, row in phantoms.index.iterrows():
            writer.add(phantoms.images[i], **{k: row[k] for k in ('image_id', 'patient_id', 'split', 'view', 'text', 'labels', 'boxes')}, masks=phantoms.masks(i) or None)
        for k, (name, change) in enumerate(CHANGES.items()): writer.add(change(phantoms.images[train[k]]), image_id=f'copy {name}', patient_id=f'other {name}', split='test')
        writer.add(CHANGES['jpeg80'](phantoms.images[train[20]]), image_id='copy within', patient_id=phantoms.index.patient_id[train[20]], split='train', licence='CC0')
    return RadiographStore.open(path)


# --- fingerprints -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('shape', [(64, 64), (128, 128), (96, 80), (40, 130)])
def test_fingerprint_against_brute_force(shape):
    "The 256 coefficients from scipy's cosine transform, sorted by a plain loop, and the hash as a sum of powers of two."
    from scipy.fft import dctn
    images = np.random.default_rng(1).integers(0, 256, (5, *shape)).astype(np.uint8)
    hashes, details = fingerprint(images)
    assert hashes.dtype == np.uint64 and details.shape == (5, 192)
    order = sorted(((u, v) for u in range(32) for v in range(32) if (u, v) != (0, 0)), key=lambda p: (p[0]**2 + p[1]**2, p[0]))[:256]
    for image, h, d in zip(images, hashes, details):
        X = dctn(np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX), float), type=2)
        c = np.array([X[u, v] for u, v in order])
        assert int(h) == sum(1 << k for k in range(64) if c[k] > np.median(c[:64]))
        assert np.allclose(d, c[64:]/np.linalg.norm(c[64:]), atol=1e-3)

def test_fingerprint_does_not_depend_on_the_batch(phantoms):
    images = np.asarray(phantoms.images[:9])
    together = fingerprint(images)
    for k in range(9):
        h, d = fingerprint(images[k:k + 1])
        assert h[0] == together[0][k] and np.array_equal(d[0], together[1][k])
    h, d = fingerprint(np.zeros((2, 64, 64), np.uint8))
    assert np.isfinite(d).all() and float(np.abs(d).max()) < 1e-3                          # flat: no division by zero

def brute(hashes, most):
    return [(a, b) for a in range(len(hashes)) for b in range(a + 1, len(hashes)) if bin(int(hashes[a]) ^ int(hashes[b])).count('1') <= most]

@pytest.mark.parametrize('most', [0, 1, 3, 6, 10])
@pytest.mark.parametrize('kind', ['random', 'crowd', 'equal', 'few'])
def test_search_against_brute_force(kind, most, monkeypatch):
    rng = np.random.default_rng(most)
    flip = lambda h, n: h ^ np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (n, len(h)), dtype=np.uint64), axis=0)
    base = rng.integers(0, 2**63, 40).astype(np.uint64)*np.uint64(2) + np.uint64(1)
    hashes = dict(random=rng.integers(0, 2**63, 300).astype(np.uint64), crowd=flip(rng.choice(base, 300), 4), equal=np.full(60, 2**63 + 5, np.uint64), few=base[:2])[kind]
    want = brute(hashes, most)
    got = near_duplicates(hashes, most=most)
    assert list(zip(got.a, got.b)) == want and got.attrs['complete'] and not got.duplicated(['a', 'b']).any()
    assert all(bin(int(hashes[a]) ^ int(hashes[b])).count('1') == d for a, b, d in zip(got.a, got.b, got.distance))
    monkeypatch.setattr(room, '_block', 700)                                               # many small blocks
    got = near_duplicates(hashes, most=most)
    assert list(zip(got.a, got.b)) == want
    monkeypatch.setattr(room, '_bands', lambda h, t: ([np.uint64(0)], [[np.arange(len(h))]]))  # all with all
    assert list(zip(*[near_duplicates(hashes, most=most)[c] for c in 'ab'])) == want

def test_bands_are_used_where_they_save_work():
    rng = np.random.default_rng(0)
    masks, groups = room._bands(rng.integers(0, 2**63, 5000).astype(np.uint64), 4)
    assert len(masks) == 5 and np.bitwise_or.reduce(masks) == np.uint64(2**64 - 1) and sum(len(g)**2 for band in groups for g in band) < 5000**2/100
    masks, groups = room._bands(np.zeros(100, np.uint64), 4)
    assert len(masks) == 1 and [len(g) for g in groups[0]] == [100]

def test_details_are_asked_and_the_limit_is_kept():
    hashes, details = np.zeros(40, np.uint64), np.eye(40, 192, dtype=np.float16)
    details[7] = details[31]
    got = near_duplicates(hashes, details)
    assert got[['a', 'b']].to_numpy().tolist() == [[7, 31]] and got.similarity[0] == pytest.approx(1)
    some = near_duplicates(np.zeros(3000, np.uint64), limit=1000)
    assert not some.attrs['complete'] and 1000 <= len(some) < 3000*2999/2
    assert len(near_duplicates(np.zeros(0, np.uint64))) == 0

def test_popcount_of_numpy_1(monkeypatch):
    values = np.random.default_rng(0).integers(0, 2**63, (7, 5)).astype(np.uint64)
    want = [[bin(int(v)).count('1') for v in row] for row in values]
    assert room._popcount(values).tolist() == want
    monkeypatch.delattr(np, 'bitwise_count', raising=False)
    monkeypatch.setattr(room, '_table16', np.array([bin(k).count('1') for k in range(2**16)], np.uint8))
    assert room._popcount(values).tolist() == want

def test_a_hundred_thousand_hashes_take_seconds():
    import time
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 100_000).astype(np.uint64)
    hashes[60_000:60_020] = hashes[:20] ^ np.uint64(0b101)
    start = time.process_time()
    got = near_duplicates(hashes, progress=False)
    assert {(k, 60_000 + k) for k in range(20)} <= set(zip(got.a, got.b)) and time.process_time() - start < 15   # about 1 s on a free core


# --- planted films ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def result(planted): return audit(planted, progress=False)

def test_planted_copies_are_found_and_nothing_else(result, phantoms):
    table, train = result.tables['duplicates'], phantoms.index.image_id[phantoms.index['split'] == 'train'].tolist()
    want = {(train[k], f'copy {name}') for k, name in enumerate(CHANGES)} | {(train[20], 'copy within')}
    assert set(zip(table.image_a, table.image_b)) == want
    assert table.across.tolist() == [True]*len(CHANGES) + [False] and table.same_patient.tolist() == [False]*len(CHANGES) + [True]
    assert table[table.identical].image_b.tolist() == ['copy same'] and not len(result.tables['patients_in_two_splits'])
    assert f'{len(CHANGES)} pairs of films look the same and are in different splits ({len(CHANGES)} of them under different patients)' in result.warnings[0]
    assert not any('licence' in w or 'stopped' in w for w in result.warnings)
    counts = result.tables['duplicate_counts']
    assert counts.pairs.sum() == len(table) and counts.loc[counts.across, 'splits'].tolist() == ['test and train']

def test_different_phantoms_are_not_reported(phantoms):
    hashes, details = fingerprint(np.asarray(phantoms.images))
    assert not len(near_duplicates(hashes, details))
    assert len(near_duplicates(hashes)) > 5                                                # the hash alone would report some: the detail tells them apart

def test_real_films(data_root, tmp_path):
    "All films of ChestX-ray14 in the shared data are different; copies of some of them are found."
    from g2d.data.prepare import prepare
    store = prepare('tidy', data_root/'open_cxr/vqa_rad_chest/vqa_rad_chest.csv', tmp_path/'s', size=128, progress=False)
    films = np.asarray(store.images)
    hashes, details = fingerprint(np.concatenate([films, *(np.stack([change(f) for f in films[::8]]) for change in CHANGES.values())]))
    got, n, m = near_duplicates(hashes, details), len(films), len(films[::8])
    assert not ((got.a < n) & (got.b < n)).any()
    found = {(a, b) for a, b in zip(got.a, got.b) if a < n}
    want = {(8*k, n + c*m + k) for c in range(len(CHANGES)) for k in range(m)}
    assert found <= want and len(found) >= .97*len(want)


# --- tables -----------------------------------------------------------------------------------------------------------

def test_counts_against_the_index(planted):
    t, index = count_rows(planted), planted.index
    counts = dict(zip(t['counts'].quantity, t['counts'].value))
    assert counts['images'] == len(index) == planted.manifest['counts']['images'] and counts['patients'] == len(set(index.patient_id)) and counts['with_mask'] == sum(m is not None for m in index['mask'])
    missing = t['missing'].set_index('column')
    assert missing.missing['text'] == len(CHANGES) + 1 and missing.missing['licence'] == 0 and missing.missing['study_id'] == len(index) and missing.share['study_id'] == 1
    splits = t['splits'].set_index('split')
    for name in ('train', 'val', 'test'):
        part = index[index.split == name]
        assert splits.loc[name, ['images', 'patients', 'texts', 'with_boxes']].tolist() == [len(part), part.patient_id.nunique(), part.text.notna().sum(), part.boxes.notna().sum()]
    views = t['views']
    assert views.groupby('split').share.sum().round(9).eq(1).all() and views.images.sum() == len(index) and set(views.view) == {'AP', 'PA', 'missing'}
    assert t['licences'].set_index('licence').images.to_dict() == {'Apache-2.0': len(index) - 1, 'CC0': 1}

def test_labels_and_cooccurrence_by_hand(tmp_path):
    labels = [['a', 'b'], ['a'], [], None, ['b', 'a', 'c'], ['c']]
    film = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    with StoreWriter(tmp_path/'s', size=32) as writer:
        for k, l in enumerate(labels):
            writer.add(np.roll(film, 5*k, 1), image_id=k, patient_id=k//2, split='train', labels=l, boxes=[dict(label='a', x=0, y=0, w=16, h=8)] if k == 1 else None, masks={'a': np.eye(32) > 0} if k < 2 else None)
    t = count_labels(RadiographStore.open(tmp_path/'s'))
    assert t['labels'].set_index('label')[['images', 'patients', 'share_of_known']].T.to_dict('list') == {'(no finding)': [1, 1, .2], 'a': [3, 2, .6], 'b': [2, 2, .4], 'c': [2, 1, .4]}
    both = t['cooccurrence'].set_index(['label', 'other'])
    assert both.images.to_dict() == {('a', 'b'): 2, ('b', 'a'): 2, ('a', 'c'): 1, ('c', 'a'): 1, ('b', 'c'): 1, ('c', 'b'): 1} and both.share_of_label['a', 'b'] == pytest.approx(2/3)
    drawn = t['drawings'].set_index('kind')
    assert drawn.number.to_dict() == dict(box=1, mask=2) and drawn.median_share_of_image['box'] == 16*8/32**2 and drawn.median_share_of_image['mask'] == 1/32

def test_texts_by_hand(tmp_path):
    film = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    texts = ['one', 'one', 'one two three', None, 'four  words\nare here', 'one']
    with StoreWriter(tmp_path/'s', size=32) as writer:
        for k, text in enumerate(texts): writer.add(np.roll(film, 5*k, 1), image_id=k, patient_id=k, split='train' if k < 4 else 'test', text=text)
    t = count_texts(RadiographStore.open(tmp_path/'s'))
    rows = t['texts'].set_index('split')
    assert rows.loc['all', ['texts', 'distinct', 'share_repeated', 'words_min', 'words_max', 'words_mean']].tolist() == [5, 3, .6, 1, 4, 2]
    assert rows.loc['train', ['texts', 'distinct']].tolist() == [3, 2] and rows.share_repeated['train'] == pytest.approx(2/3) and rows.share_repeated['test'] == 0
    assert t['text_lengths'].texts.sum() == 5

def test_grey_values_against_numpy(planted):
    rows = np.array([0, 3, 50, len(planted) - 1])
    got = read_pixels(planted, rows, progress=False)
    images = np.asarray(planted.images[rows]).astype(float)
    films = got['films']
    assert films.row.tolist() == rows.tolist() and np.allclose(films['mean'], images.mean((1, 2))) and np.allclose(films.sd, images.std((1, 2)))
    assert np.allclose(films.black, (images == 0).mean((1, 2))) and np.allclose(films.white, (images == 255).mean((1, 2)))
    assert sum(h for h in got['histogram'].values()).tolist() == np.bincount(images.astype(int).ravel(), minlength=256).tolist()

def test_patients_in_two_splits_and_leaking_schemes(tmp_path):
    film = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    with StoreWriter(tmp_path/'s', size=32) as writer:
        for k, split in enumerate(('train', 'test', 'train', 'test', None)): writer.add(np.roll(film, 5*k, 1), image_id=f'i{k}', patient_id=f'p{k//2}', split=split)
    from g2d.data.splits import make_scheme, save_scheme
    store = RadiographStore.open(tmp_path/'s')
    save_scheme(tmp_path/'s/splits', make_scheme('as_mgca', store.index, dict(train=['i0', 'i1'], test=['i1', 'i2']), source='a rule', leaking=True))
    t = find_leaks(store)
    assert t['patients_in_two_splits'].to_dict('records') == [dict(patient_id='p0', splits='test, train', images=2), dict(patient_id='p1', splits='test, train', images=2)]
    assert t['schemes'].images.tolist() == [2, 2] and t['schemes'].leaks[0] == '1 images and 1 patients in train and test'
    t |= count_rows(store) | room.name_pairs(store, near_duplicates(np.arange(0)), np.arange(5))
    warnings = room._warnings(store, t, np.arange(5), True)
    assert any('2 patients are in more than one split' in w for w in warnings) and any('"as_mgca" leaks' in w for w in warnings) and any('1 films are in no split' in w for w in warnings)


# --- the page ---------------------------------------------------------------------------------------------------------

def test_page_and_tables_are_written(planted, result, tmp_path):
    page = write_audit(planted.path, tmp_path/'deep/out', progress=False)
    text = page.read_text(encoding='utf-8')
    assert page == tmp_path/'deep/out/index.html' and not list((tmp_path/'deep/out').glob('.*'))
    assert len(re.findall('data:image/png;base64,', text)) == 6 and 'copy brighter' in text and 'http' not in text and '<script' not in text
    for name in result.tables: assert (tmp_path/f'deep/out/{name}.csv').is_file()
    assert len(pd.read_csv(tmp_path/'deep/out/duplicates.csv')) == len(CHANGES) + 1
    assert audit_page(result) == text                                                      # the same again

def test_markup_in_ids_and_labels_stays_text(tmp_path):
    film = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    with StoreWriter(tmp_path/'s', size=32, source='<b>x</b>') as writer:
        for k in range(3): writer.add(film, image_id=f'<script>{k}', patient_id='p & q', split='train', labels=['<i>'], masks={'<i>$a_b': film > 99}, view='$x^')
    text = write_audit(tmp_path/'s', tmp_path/'out', progress=False).read_text()
    assert '<script>' not in text and '&lt;script&gt;0' in text and '<i>' not in text

@pytest.mark.parametrize('kind', ['bare', 'one film', 'selection', 'many labels', 'flat'])
def test_any_store(tmp_path, phantoms, kind):
    "Nothing but images; a single film; a selection; more labels than colours; films without contrast."
    film = np.random.default_rng(0).integers(0, 256, (40, 48)).astype(np.uint8)
    if kind == 'selection': store = phantoms.select(split='test')
    else:
        with StoreWriter(tmp_path/'s', size=(40, 48)) as writer:
            for k in range(1 if kind == 'one film' else 30):
                many = kind == 'many labels'
                writer.add(np.zeros((40, 48)) if kind == 'flat' else np.roll(film, 3*k, 1), image_id=k, patient_id=k, labels=[f'label {k}', 'all'] if many else None, boxes=[dict(label=f'label {k}', x=1, y=2, w=9, h=8)] if many else None)
        store = RadiographStore.open(tmp_path/'s')
    result = audit(store, progress=False)
    page = audit_page(result)
    assert len(result.tables) == 15 and page.count('data:image/png') == len(result.figures) >= 3
    if kind == 'flat': assert not len(result.tables['duplicates'])
    if kind == 'many labels': assert len(room.label_styles([str(k) for k in range(28)])) == len({tuple(s.items()) for s in room.label_styles([str(k) for k in range(28)]).values()}) == 28

def test_limit(planted):
    result = audit(planted, limit=50, progress=False)
    assert result.tables['grey_values'].films.sum() == 50 and any(f'Pixels of 50 of the {len(planted)} films' in w for w in result.warnings)
    assert result.tables['counts'].value[0] == len(planted)
    with pytest.raises(G2DError, match='limit is 0'): audit(planted, limit=0)

def test_films_of_the_grid_show_every_drawn_label(planted):
    drawn = {x['label'] for name in ('boxes', 'mask') for i in planted.index[name].dropna() for x in i}
    rows = choose_films(planted, 14)
    assert len(rows) == len(set(rows)) == 14 and {x['label'] for i in rows for name in ('boxes', 'mask') for x in planted.index[name][i] or []} == drawn

def test_bad_input_is_one_sentence(tmp_path, planted):
    with pytest.raises(G2DError, match='There is no store'): write_audit(tmp_path/'nowhere', tmp_path/'out')
    assert not (tmp_path/'out').exists()
    (tmp_path/'file').write_text('x')
    with pytest.raises(G2DError, match='could not be written'): write_audit(planted, tmp_path/'file', progress=False)
    assert (tmp_path/'file').read_text() == 'x'

def test_the_experiment_runs(planted, tmp_path, monkeypatch):
    from g2d.runs import run_notebook
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    folder = run_notebook('audit', dict(store=str(planted.path), films=6), tmp_path, progress=False)
    metrics = json.loads((folder/'metrics.json').read_text())
    assert (metrics['images'], metrics['same_film_across_splits'], metrics['same_film_pairs']) == (len(planted), len(CHANGES), len(CHANGES) + 1)
    assert (folder/'index.html').is_file() and (folder/'figures/films.png').is_file() and (folder/'duplicates.csv').is_file()

def test_importing_is_cheap():
    done = subprocess.run([sys.executable, '-c', 'import sys, g2d.data.audit; print("torch" in sys.modules, "matplotlib" in sys.modules)'], capture_output=True, text=True)
    assert done.stdout.split() == ['False', 'False'], done.stderr
