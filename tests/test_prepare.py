"Preparation: reading films, rejecting rows with a reason, stopping on what would corrupt results; the real sets."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
import g2d.data.prepare as room
from g2d.settings import G2DError
from g2d.data.prepare import SETS, Item, Listing, data_set, list_items, mend_text, parse_options, prepare, read_mask, read_radiograph, read_table
from g2d.data.store import RadiographStore, fit, to_uint8

root = Path(__file__).resolve().parents[1]

def film(seed=0, h=90, w=70):
    "Smooth enough for a JPEG to keep it, with noise of its own."
    y, x = np.mgrid[:h, :w]
    rng = np.random.default_rng(seed)
    return np.clip(120 + 80*np.sin(x/9 + rng.uniform(0, 6))*np.cos(y/11 + rng.uniform(0, 6)) + rng.normal(0, 3, (h, w)), 1, 254).astype(np.uint8)

def save_dicom(path, pixels, photometric='MONOCHROME2', **tags):
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.ExplicitVRLittleEndian, '1.2.840.10008.5.1.4.1.1.1.1', '1.2.3'
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0'*128)
    data.Rows, data.Columns, data.SamplesPerPixel, data.PixelRepresentation = *pixels.shape[:2], 1, int(pixels.dtype.kind == 'i')
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize*8
    data.HighBit, data.PhotometricInterpretation, data.PixelData = data.BitsStored - 1, photometric, pixels.tobytes()
    for name, value in tags.items(): setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)

def table(folder, rows, name='list.csv', **kw):
    path = Path(folder)/name
    pd.DataFrame(rows).to_csv(path, index=False, **kw)
    return path

def rejected(out): return pd.read_csv(Path(out)/'rejected.csv')

# --- reading --------------------------------------------------------------------------------------------------------------

def test_every_kind_of_picture_gives_the_same_film(tmp_path):
    f = film()
    Image.fromarray(f).save(tmp_path/'grey.png'); Image.fromarray(np.dstack([f]*3)).save(tmp_path/'rgb.png')
    Image.fromarray(np.dstack([f]*3 + [np.full_like(f, 255)])).save(tmp_path/'rgba.png'); Image.fromarray(f).convert('LA').save(tmp_path/'la.png')
    Image.fromarray(f).convert('P').save(tmp_path/'palette.png'); Image.fromarray(f).save(tmp_path/'film.tif')
    Image.fromarray(f).save(tmp_path/'png_named.jpg', format='PNG')             # the public COVID-19 set has these
    for name in ('grey.png', 'rgb.png', 'rgba.png', 'la.png', 'palette.png', 'film.tif', 'png_named.jpg'): assert np.array_equal(read_radiograph(tmp_path/name), f), name
    Image.fromarray(f.astype(np.uint16)*257).save(tmp_path/'deep.png')
    deep = read_radiograph(tmp_path/'deep.png')
    assert deep.dtype == np.uint16 and np.array_equal(deep, f.astype(np.uint16)*257) and np.abs(to_uint8(deep).astype(float) - (f - f.min())*(255/(f.max() - f.min()))).max() <= .5 + 1e-6
    Image.fromarray(f).save(tmp_path/'grey.jpg', quality=95)
    assert np.abs(read_radiograph(tmp_path/'grey.jpg').astype(int) - f).mean() < 2
    assert np.array_equal(read_radiograph(tmp_path/'grey.png', invert=True), 255 - f)

def test_transparent_becomes_black(tmp_path):
    f = film(); alpha = np.full_like(f, 255); alpha[:, :20] = 0
    Image.fromarray(np.dstack([np.full_like(f, 255)]*2 + [f, alpha])).save(tmp_path/'a.png')
    out = read_radiograph(tmp_path/'a.png')
    assert not out[:, :20].any() and out[:, 20:].min() > 100

def test_dicom_rescale_window_and_inversion(tmp_path):
    f = film().astype(np.uint16)*16
    save_dicom(tmp_path/'a.dcm', f); save_dicom(tmp_path/'no_ending', 4095 - f, 'MONOCHROME1')
    save_dicom(tmp_path/'r.dcm', f, RescaleSlope='2', RescaleIntercept='-1000'); save_dicom(tmp_path/'w.dcm', f, WindowCenter='2000', WindowWidth='400')
    assert np.array_equal(read_radiograph(tmp_path/'a.dcm'), f)
    assert np.array_equal(to_uint8(read_radiograph(tmp_path/'no_ending')), to_uint8(f))           # inverted film comes out upright
    assert np.allclose(read_radiograph(tmp_path/'r.dcm'), f*2. - 1000)
    windowed = to_uint8(read_radiograph(tmp_path/'w.dcm')).astype(float)
    want = np.clip((f - (2000 - .5))/(400 - 1) + .5, 0, 1)*255                                    # DICOM PS3.3 C.11.2.1.2.1
    assert np.abs(windowed - want).max() <= 1
    save_dicom(tmp_path/'signed.dcm', (f.astype(np.int16) - 2000))
    assert np.array_equal(read_radiograph(tmp_path/'signed.dcm'), f.astype(np.int16) - 2000)

def test_broken_files_say_why(tmp_path):
    f = film()
    Image.fromarray(f).save(tmp_path/'a.jpg'); Image.fromarray(f).save(tmp_path/'a.png'); save_dicom(tmp_path/'a.dcm', f)
    for name, n, why in [('a.jpg', 1000, 'truncated image'), ('a.png', 1000, 'truncated image|broken image'), ('a.dcm', 400, 'DICOM'), ('a.jpg', 0, r'empty \(0 bytes\)'), ('a.jpg', 12, 'not an image|broken|truncated')]:
        (tmp_path/f'cut_{name}').write_bytes((tmp_path/name).read_bytes()[:n])
        with pytest.raises(G2DError, match=why): read_radiograph(tmp_path/f'cut_{name}')
    (tmp_path/'text.jpg').write_text('<html>404</html>')
    with pytest.raises(G2DError, match='not an image'): read_radiograph(tmp_path/'text.jpg')
    with pytest.raises(G2DError, match='file is absent'): read_radiograph(tmp_path/'nowhere.jpg')
    with pytest.raises(G2DError, match='cannot be read'): read_radiograph(tmp_path)
    save_dicom(tmp_path/'frames.dcm', np.stack([f, f]).reshape(180, 70), NumberOfFrames='2', Rows=90)
    with pytest.raises(G2DError, match='2 frames'): read_radiograph(tmp_path/'frames.dcm')

@pytest.mark.parametrize('seed', range(40))
def test_no_damage_escapes_as_another_exception(tmp_path, seed):
    "Random bytes changed or cut in JPEG, PNG and DICOM: a film or a G2DError, nothing else."
    rng = np.random.default_rng(seed)
    path = tmp_path/('a.jpg', 'a.png', 'a.dcm', 'a.tif')[seed % 4]
    save_dicom(path, film()) if path.suffix == '.dcm' else Image.fromarray(film()).save(path)
    data = bytearray(path.read_bytes())
    for at in rng.integers(0, min(len(data), 600), 6): data[at] = rng.integers(0, 256)
    path.write_bytes(data[:rng.integers(10, len(data))] if seed % 3 == 0 else data)
    try: image = read_radiograph(path)
    except G2DError as error: assert '\n' not in str(error) and str(error)
    else: assert image.ndim == 2

def test_masks_of_every_kind(tmp_path):
    m = film() > 120
    Image.fromarray(m).save(tmp_path/'bit.png'); Image.fromarray(m.astype(np.uint8)).save(tmp_path/'one.png'); Image.fromarray(m.astype(np.uint8)*255).save(tmp_path/'full.png')
    for name in ('bit.png', 'one.png', 'full.png'): assert np.array_equal(read_mask(tmp_path/name), m)
    disc = np.hypot(*(np.mgrid[:90, :70] - np.array([45, 35])[:, None, None])) < 20
    Image.fromarray(disc.astype(np.uint8)*255).save(tmp_path/'lossy.jpg', quality=60)
    assert (read_mask(tmp_path/'lossy.jpg') != disc).mean() < .005                                # ringing is not inside

# --- tables ---------------------------------------------------------------------------------------------------------------

def test_tables_as_the_world_writes_them(tmp_path):
    frame = pd.DataFrame(dict(image=['a.png', 'b.png'], text=['Ärztin; "quoted", 38 °C', ' ']))
    for name, kw in [('a.csv', {}), ('b.csv', dict(sep=';', encoding='utf-8-sig')), ('c.tsv', dict(sep='\t')), ('d.csv', dict(encoding='cp1252')), ('e.csv', dict(encoding='utf-16')), ('f.csv', dict(lineterminator='\r\n'))]:
        frame.to_csv(tmp_path/name, index=False, **kw)
        got = read_table(tmp_path/name)
        assert got.text.tolist() == ['Ärztin; "quoted", 38 °C', ''] and list(got.index) == [2, 3] and list(got.columns) == ['image', 'text'], name
    frame.assign(labels=[['a', 'b'], None], boxes=[[dict(label='a', x=1)], []]).to_parquet(tmp_path/'g.parquet')
    got = read_table(tmp_path/'g.parquet')
    assert got.labels.tolist() == ['a|b', ''] and json.loads(got.boxes[2]) == [dict(label='a', x=1)] and list(got.index) == [2, 3]
    (tmp_path/'h.csv').write_text('image, text \n\n"a.png","two\nlines"\n\nb.png,NA\n')
    got = read_table(tmp_path/'h.csv')
    assert got.text.tolist() == ['two\nlines', 'NA'] and list(got.index) == [3, 5]                # "NA" is a word; blank rows count, as in a spreadsheet

@pytest.mark.parametrize('text,why', [('', 'empty'), ('image,text\na,b,c\n', 'row 2 has 3 cells, the header has 2'), ('image,text\na\n', 'row 2 has 1 cells'), ('image,image\na,b\n', '"image" is there twice'), ('image,text\n"a,b\n', 'not a table')])
def test_malformed_tables_stop(tmp_path, text, why):
    (tmp_path/'t.csv').write_text(text)
    with pytest.raises(G2DError, match=why): read_table(tmp_path/'t.csv')

# --- tidy: rejected rows --------------------------------------------------------------------------------------------------

def bad_rows(folder):
    "A good row, and one row for each thing that can be wrong with a film: list of (row as dict, reason or None)."
    f = film()
    Image.fromarray(f).save(folder/'good.png'); Image.fromarray(f).save(folder/'whole.jpg')
    (folder/'cut.jpg').write_bytes((folder/'whole.jpg').read_bytes()[:700]); (folder/'zero.jpg').touch()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(folder/'black.png'); Image.fromarray(np.full((1, 1), 9, np.uint8)).save(folder/'pixel.png')
    Image.fromarray(f.astype(np.uint16)*100).save(folder/'deep.png'); Image.fromarray(np.dstack([f]*3 + [np.full_like(f, 255)])).save(folder/'rgba.png')
    save_dicom(folder/'mono1.dcm', 255 - f, 'MONOCHROME1')
    Image.fromarray(f > 100).save(folder/'mask.png'); Image.fromarray(f[:40] > 100).save(folder/'other_mask.png')
    box = lambda **kw: json.dumps([dict(dict(label='a', x=5, y=5, w=20, h=20), **kw)])
    row = lambda **kw: dict(dict(image='good.png', patient_id='p', text='t', mask='', boxes='', labels='x|y', invert=''), **kw)
    return [(row(), None), (row(image='whole.jpg'), None), (row(image='deep.png'), None), (row(image='rgba.png'), None), (row(image='mono1.dcm'), None),
            (row(mask='mask.png', boxes=box()), None), (row(mask='{"lung": "mask.png"}'), None), (row(text='  '), None), (row(text=''), None), (row(labels=''), None), (row(labels='no finding'), None), (row(invert='TRUE'), None),
            (row(image='cut.jpg'), 'truncated'), (row(image='zero.jpg'), 'empty'), (row(image='black.png'), 'flat film'), (row(image='pixel.png'), '1 x 1 pixels'), (row(image='none.png'), 'absent'),
            (row(boxes=box(x=500)), 'outside the image'), (row(boxes=box(w=-3)), 'no area'), (row(boxes='[{'), 'boxes is not valid JSON'), (row(boxes='{"a": 1}'), 'boxes is not valid JSON'), (row(boxes='[3]'), 'is not'),
            (row(mask='other_mask.png'), 'mask "mask" has shape'), (row(mask='none.png'), 'mask none.png: file is absent'), (row(mask='{"lung": '), 'column mask is not valid JSON'),
            (row(image=''), 'image is blank'), (row(patient_id=' '), 'patient_id is blank'), (row(invert='perhaps'), "invert is 'perhaps'")]

def test_bad_rows_are_listed_and_good_ones_kept(tmp_path):
    cases = bad_rows(tmp_path)
    path = table(tmp_path, [dict(row, image_id=f'i{k}') for k, (row, _) in enumerate(cases)])
    store = prepare('tidy', path, tmp_path/'out', size=64, progress=False)
    good = [k for k, (_, reason) in enumerate(cases) if reason is None]
    assert store.index.image_id.tolist() == [f'i{k}' for k in good]
    bad = rejected(tmp_path/'out')
    assert list(bad.columns) == ['file', 'row', 'reason'] and bad.row.tolist() == [k + 2 for k, (_, reason) in enumerate(cases) if reason] and (bad.file == str(path)).all()
    for (_, reason), found in zip((c for c in cases if c[1]), bad.reason): assert reason in found
    want = fit(film(), 64)[0]
    at = {k: i for i, k in enumerate(good)}
    assert np.array_equal(store.images[at[0]], want) and np.array_equal(store.images[at[3]], want) and np.array_equal(store.images[at[4]], fit(to_uint8(film()), 64)[0])
    assert np.array_equal(store.images[at[2]], fit(film().astype(np.uint16)*100, 64)[0]) and np.array_equal(store.images[at[11]], fit(255 - film(), 64)[0])
    assert store.index.text.isna().tolist() == [k in (7, 8) for k in good]
    assert [store.index.labels[at[k]] for k in (0, 9, 10)] == [['x', 'y'], None, []]
    assert list(store.masks(at[5])) == ['mask'] and list(store.masks(at[6])) == ['lung'] and np.array_equal(store.mask(at[5]), store.mask(at[6]))
    assert store.boxes(at[5])[0]['w'] == pytest.approx(20*50/70)                              # 90 x 70 becomes 64 x 50

def test_all_rejected_is_one_sentence_and_no_store(tmp_path):
    path = table(tmp_path, [dict(image=f'none{k}.png', patient_id=k) for k in range(5)])
    with pytest.raises(G2DError, match=r'All 5 rows were rejected, so no store was made \(most often: .*absent\); see .*rejected.csv'): prepare('tidy', path, tmp_path/'out', progress=False)
    assert len(rejected(tmp_path/'out')) == 5 and not list((tmp_path/'out').glob('*.npy*'))
    with pytest.raises(G2DError, match='not a g2d store'): RadiographStore.open(tmp_path/'out')
    (tmp_path/'head.csv').write_text('image,patient_id\n')
    with pytest.raises(G2DError, match='list of the data set is empty'): prepare('tidy', tmp_path/'head.csv', tmp_path/'out2', progress=False)

# --- tidy: what stops -----------------------------------------------------------------------------------------------------

def stops(tmp_path, why, path, **options):
    with pytest.raises(G2DError, match=why) as caught: prepare('tidy', path, tmp_path/'never', progress=False, **options)
    assert '\n' not in str(caught.value) and not (tmp_path/'never').exists()                      # one sentence, before anything is written

def test_what_would_corrupt_results_stops_before_writing(tmp_path):
    for k in range(4): Image.fromarray(film(k)).save(tmp_path/f'{k}.png')
    rows = [dict(image=f'{k}.png', patient_id=f'p{k}', split='train') for k in range(4)]
    stops(tmp_path, 'has no column "image"', table(tmp_path, [dict(path='0.png', patient_id=1)]))
    stops(tmp_path, r'has no column "patient_id": map one with columns patient_id=NAME, or patient_id=image', table(tmp_path, [dict(image='0.png')]))
    stops(tmp_path, r'no column "report" \(wanted for text\); it has image, patient_id, split', table(tmp_path, rows), columns=dict(text='report'))
    stops(tmp_path, r'no column "lungs" \(wanted for lung\)', table(tmp_path, rows), masks=dict(lung='lungs'))
    stops(tmp_path, 'maps "txt", which is no field', table(tmp_path, rows), columns=dict(txt='image'))
    stops(tmp_path, 'no option "colour"', table(tmp_path, rows), colour=1)
    stops(tmp_path, '1 image ids occur more than once: "0" in list.csv row 2 and list.csv row 6', table(tmp_path, rows + [dict(rows[0])]))
    stops(tmp_path, 'more than one split: p0 in', table(tmp_path, rows + [dict(image='x.png', patient_id='p0', split='test')]))
    stops(tmp_path, 'There is no table', tmp_path/'nowhere.csv')
    with pytest.raises(G2DError, match='There is no data set "mimic3"; the sets are .*covid_chestxray, '): prepare('mimic3', tmp_path, tmp_path/'never')

def test_mapping_ids_and_extra(tmp_path):
    (tmp_path/'p1').mkdir(); (tmp_path/'p2').mkdir()
    for p in ('p1', 'p2'):
        for name in ('1.2.840.1', '1.2.840.2'): save_dicom(tmp_path/p/name, film())
    rows = [dict(path=f'{p}\\{name}', age='', sex='F') for p in ('p1', 'p2') for name in ('1.2.840.1', '1.2.840.2')]
    store = prepare('tidy', table(tmp_path, rows), tmp_path/'out', size=32, progress=False, columns=dict(image='path', patient_id='path'), extra=['age', 'sex'], split=False)
    assert store.index.image_id.tolist() == ['p1/1.2.840.1', 'p1/1.2.840.2', 'p2/1.2.840.1', 'p2/1.2.840.2']     # dots of a UID are no ending
    assert store.index.split.isna().all() and [json.loads(e) for e in store.index.extra] == [dict(sex='F')]*4

def test_two_tables_in_one_store(tmp_path):
    Image.fromarray(film()).save(tmp_path/'a.png')
    tables = [table(tmp_path, [dict(image='a.png', patient_id='p1', split=s)], name) for name, s in (('north.csv', 'train'), ('south.csv', 'train'))]
    store = prepare('tidy', tables, tmp_path/'out', size=32, progress=False)
    assert store.index.image_id.tolist() == ['north/a', 'south/a'] and store.index.patient_id.nunique() == 1
    tables[1] = table(tmp_path, [dict(image='a.png', patient_id='p1', split='test')], 'south.csv')
    stops(tmp_path, 'in more than one split', tables)                                             # across tables too

def test_splits_are_dealt_by_patient(tmp_path):
    for k in range(40): Image.fromarray(film(k, 20, 20)).save(tmp_path/f'{k}.png')
    path = table(tmp_path, [dict(image=f'{k}.png', patient_id=k//2) for k in range(40)])
    a = prepare('tidy', path, tmp_path/'a', size=16, progress=False).index
    assert a.groupby('split').patient_id.nunique().to_dict() == dict(train=16, val=2, test=2) and (a.groupby('patient_id').split.nunique() == 1).all()
    b = prepare('tidy', path, tmp_path/'b', size=16, progress=False, split=dict(train=.5, test=.5), seed=3).index
    assert b.groupby('split').patient_id.nunique().to_dict() == dict(train=10, test=10)
    path.write_text(path.read_text().replace('7.png', '7_absent.png'))                            # one film lost changes nobody else's split
    c = prepare('tidy', path, tmp_path/'c', size=16, progress=False).index
    assert c.set_index('patient_id').split.to_dict().items() <= a.set_index('patient_id').split.to_dict().items() and len(c) < 40

def test_parse_options():
    assert parse_options('covid_chestxray', ['frontal=true']) == dict(frontal=True)
    assert parse_options('tidy', ['columns.image=path', 'columns.text=report', 'no_finding=normal|No Finding', 'masks.lung=m=1']) == dict(
        columns=dict(image='path', text='report'), no_finding=['normal', 'No Finding'], masks=dict(lung='m=1'))
    for bad, why in [('columns', 'is no option'), ('=3', 'is no option'), ('what=3', 'no option "what"')]:
        with pytest.raises(G2DError, match=why): parse_options('tidy', [bad])

# --- the machinery --------------------------------------------------------------------------------------------------------

def many(folder, n=80):
    for k in range(n):
        if k % 9: Image.fromarray(film(k, 100 + k % 13, 90)).save(folder/f'{k}.png')
        else: (folder/f'{k}.png').write_bytes(b'broken')
    return table(folder, [dict(image=f'{k}.png', patient_id=k//3, text=f'film {k}') for k in range(n)])

def contents(out):
    "Name -> bytes of every file of a store; only the lock is left out. Nothing half-written may lie there."
    found = {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob('*') if p.is_file() and p.name != '.writing.lock'}
    assert {'images.npy', 'index.parquet', 'manifest.json', 'rejected.csv'} <= set(found) <= {'images.npy', 'index.parquet', 'manifest.json', 'rejected.csv'} | {n for n in found if n.startswith('splits/') and n.endswith('.json')}
    return found

def test_workers_change_nothing(tmp_path):
    path = many(tmp_path)
    prepare('tidy', path, tmp_path/'one', size=32, workers=0, progress=False); prepare('tidy', path, tmp_path/'two', size=32, workers=2, progress=False)
    assert contents(tmp_path/'one') == contents(tmp_path/'two') and len(rejected(tmp_path/'one')) == 9

def test_kill_9_and_run_again(tmp_path):
    "Killed while writing, twice; the third run gives the bytes of an uninterrupted one. A change of the table in between stops."
    path = many(tmp_path)
    prepare('tidy', path, tmp_path/'whole', size=32, workers=0, progress=False)
    script = f'''
import sys, time; sys.path.insert(0, {str(root)!r})
import g2d.data.prepare as room
real = room._load
def slow(*a): time.sleep(.01); return real(*a)
room._load = slow
room.StoreWriter._write = (lambda inner: lambda self, *a: (inner(self, *a), self.flush()))(room.StoreWriter._write)
print('ready', flush=True)
room.prepare('tidy', {str(path)!r}, {str(tmp_path/'out')!r}, size=32, workers=0, progress=False)
'''
    left = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        lines = lambda: sum(1 for _ in open(tmp_path/'out/journal.jsonl')) if (tmp_path/'out/journal.jsonl').exists() else 0
        while process.poll() is None and lines() < (left[-1] if left else 1) + 5: time.sleep(.005)   # a fixed pause says nothing on a busy machine
        process.send_signal(signal.SIGKILL); process.wait()
        left.append(lines())
    assert 1 < left[0] < left[1] < 71
    old = path.read_text(); path.write_text(old.replace('film 5', 'film five'))
    with pytest.raises(G2DError, match='was begun with settings.listing'): prepare('tidy', path, tmp_path/'out', size=32, progress=False)
    with pytest.raises(G2DError, match='was begun with size'): prepare('tidy', path, tmp_path/'out', size=64, progress=False)
    path.write_text(old)
    prepare('tidy', path, tmp_path/'out', size=32, workers=2, progress=False)
    assert contents(tmp_path/'out') == contents(tmp_path/'whole')

KILLED_SET = '''
"A set with splits of its own, one of them leaking, and a raw layout: imported by the test and by the process that it kills."
import time
from pathlib import Path
import numpy as np, pandas as pd
from g2d.data.layouts import layout, write_image, write_table
from g2d.data.prepare import Item, Listing, data_set, read_radiograph, read_table
from g2d.data.splits import make_scheme
from g2d.settings import G2DError

def slowly(path, invert):
    time.sleep(.004)
    return read_radiograph(path, invert)

def mask_of(runs):
    mask = np.zeros((64, 48), bool); mask.ravel()[slice(*map(int, runs.split()))] = True
    return mask

@layout('killed', shape=(64, 48))
def write(folder, films, rng):
    for film in films:
        if film.number % 11 == 3: (folder/'films').mkdir(exist_ok=True); (folder/'films'/f'{film.number}.jpg').write_bytes(b'broken')
        else: write_image(folder/'films'/f'{film.number}.jpg', film.image)
    write_table(folder/'list.csv', 'name,patient,text,runs', [[f.number, f.patient, f.text, f'{200 + f.number} {900 + f.number}' if f.number % 3 else ''] for f in films])

@data_set('killed')
def read(source):
    "Films that are slow to read."
    table = read_table(Path(source)/'list.csv')
    items = [Item(Path(source)/'films'/f'{row["name"]}.jpg', f'film{row["name"]}', row['patient'], text=row['text'], labels=[], masks={'a': row['runs']} if row['runs'] else None,
                  file=str(Path(source)/'list.csv'), row=number) for number, row in zip(table.index, table.to_dict('records'))]
    frame = pd.DataFrame(dict(image_id=[i.image_id for i in items], patient_id=[i.patient_id for i in items]))
    half, ids = frame.patient_id.astype(int) % 2 == 0, frame.image_id
    schemes = [make_scheme('official', frame, dict(train=ids[half], test=ids[~half]), source='even and odd patients'),
               make_scheme('as_mgca', frame, dict(train=ids[:100], test=ids[90:]), source='overlapping', leaking=True)]
    return Listing(items, source='killed', schemes=schemes, split='official', read_image=slowly, read_mask=mask_of)
'''

def alive(pids):
    "Those of the processes that still run (a zombie does not)."
    def runs(pid):
        try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] not in 'ZX'
        except OSError: return False
    return [pid for pid in pids if runs(pid)]

@pytest.mark.skipif(not Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').exists(), reason='children are found in /proc')
@pytest.mark.parametrize('seed', [0, 1])
def test_kill_9_of_a_set_with_workers_and_splits(tmp_path, monkeypatch, seed):
    "Killed with its workers at work, again and again at random moments, until a run gets through: every file has the bytes of an uninterrupted run."
    import importlib, random
    from g2d.data.layouts import LAYOUTS, _shapes, write_layout
    monkeypatch.setattr(room, 'SETS', dict(SETS)); monkeypatch.setattr('g2d.data.layouts.LAYOUTS', dict(LAYOUTS)); monkeypatch.setattr('g2d.data.layouts._shapes', dict(_shapes))
    (tmp_path/'killed_set.py').write_text(KILLED_SET); monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop('killed_set', None); importlib.import_module('killed_set')
    source = write_layout('killed', tmp_path/'raw', n=150)
    prepare('killed', source, tmp_path/'whole', size=32, workers=0, progress=False, crop_borders=True)
    whole = contents(tmp_path/'whole')
    assert {'splits/official.json', 'splits/as_mgca.json'} <= set(whole) and len(rejected(tmp_path/'whole')) == 14
    script = f'''
import sys; sys.path[:0] = [{str(root)!r}, {str(tmp_path)!r}]
import killed_set, g2d.data.prepare as room
room.StoreWriter._write = (lambda inner: lambda self, *a: (inner(self, *a), self.flush() if self.count % 7 == 0 else None))(room.StoreWriter._write)
print('ready', flush=True)
room.prepare('killed', {str(source)!r}, {str(tmp_path/'out')!r}, size=32, workers=2, progress=False, crop_borders=True)
print('done', flush=True)
'''
    rng, kills, through = random.Random(seed), 0, False
    while not through:
        process = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
        assert process.stdout.readline() == 'ready\n', process.stderr.read()
        try: process.wait(rng.uniform(.02, .3) if kills < 6 else 60)
        except subprocess.TimeoutExpired:
            children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
            process.kill(); kills += 1
        process.wait()
        through = process.returncode == 0
        assert through or process.returncode == -signal.SIGKILL, process.stderr.read()
        until = time.monotonic() + 10
        while not through and alive(children) and time.monotonic() < until: time.sleep(.01)
        assert through or not alive(children), 'a worker outlived its main process and holds the lock'
        process.stdout.close(); process.stderr.close()
    assert kills >= 3 and contents(tmp_path/'out') == whole

@pytest.mark.parametrize('name', ['rsna', 'siim', 'mimic_cxr'])
def test_an_interrupted_set_layout_gives_the_same_bytes(tmp_path, monkeypatch, name):
    "The layout of a real set, stopped after some films, with the splits of the set."
    from g2d.data.layouts import LAYOUTS, write_layout
    room.load_sets()
    if name not in LAYOUTS: pytest.skip(f'the set {name} has no layout yet')
    source = write_layout(name, tmp_path/'raw', n=24)
    prepare(name, source, tmp_path/'whole', size=32, workers=0, progress=False)
    inner, seen = room.StoreWriter.add, []
    def stop(self, *a, **kw):
        if len(seen) % 6 == 5: seen.append(0); raise KeyboardInterrupt
        seen.append(0); return inner(self, *a, **kw)
    with monkeypatch.context() as patch:
        patch.setattr(room.StoreWriter, 'add', stop)
        with pytest.raises(KeyboardInterrupt): prepare(name, source, tmp_path/'out', size=32, workers=0, progress=False)
        assert not (tmp_path/'out/manifest.json').exists()
        with pytest.raises(KeyboardInterrupt): prepare(name, source, tmp_path/'out', size=32, workers=0, progress=False)
    prepare(name, source, tmp_path/'out', size=32, workers=0, progress=False)
    assert contents(tmp_path/'out') == contents(tmp_path/'whole') and any(n.startswith('splits/') for n in contents(tmp_path/'out'))

def test_crop_borders_through_prepare(tmp_path):
    "Black borders are cut with boxes and masks when asked for, with workers too; the manifest says so, and another choice does not continue the store."
    rows = []
    for k in range(34):
        inner = film(k, 60, 50); border = ((k % 5, 7), (9, k % 4))
        Image.fromarray(np.pad(inner, border)).save(tmp_path/f'{k}.png'); Image.fromarray(np.pad(inner > 120, border)).save(tmp_path/f'm{k}.png')
        rows.append(dict(image=f'{k}.png', patient_id=k, mask=f'm{k}.png', boxes=json.dumps([dict(label='a', x=9 + 5, y=k % 5 + 6, w=20, h=15)])))
    spot = np.zeros((60, 60), np.uint8); spot[20:29, 20:50] = 7; spot[21, 22] = 9
    Image.fromarray(spot).save(tmp_path/'spot.png'); rows.append(dict(image='spot.png', patient_id='s', mask='', boxes=''))
    path = table(tmp_path, rows)
    for workers in (0, 2):
        store = prepare('tidy', path, tmp_path/f'w{workers}', size=32, workers=workers, progress=False, crop_borders=True)
        assert store.manifest['settings']['crop_borders'] is True and len(store) == 34
        for k in range(34):
            image, masks, boxes = fit(film(k, 60, 50), 32, {'mask': film(k, 60, 50) > 120}, [dict(label='a', x=5, y=6, w=20, h=15)])
            assert np.array_equal(store.images[k], image) and np.array_equal(store.mask(k), masks['mask']) and [store.boxes(k)[0][c] for c in 'xywh'] == pytest.approx([boxes[0][c] for c in 'xywh'])
    assert contents(tmp_path/'w0') == contents(tmp_path/'w2')
    assert 'has 30 x 9 pixels between its black borders' in rejected(tmp_path/'w0').reason[0]
    plain = prepare('tidy', path, tmp_path/'plain', size=32, workers=0, progress=False)
    assert plain.manifest['settings']['crop_borders'] is False and not np.array_equal(plain.images[0], store.images[0])
    with pytest.raises(G2DError, match='was begun with settings.crop_borders = False, not True'): prepare('tidy', path, tmp_path/'plain', size=32, progress=False, crop_borders=True)

def test_a_finished_store_is_returned_at_once(tmp_path, monkeypatch):
    path = many(tmp_path, 20)
    first = prepare('tidy', path, tmp_path/'out', size=32, progress=False)
    monkeypatch.setattr(room, '_load', lambda *a: pytest.fail('read a film again'))
    assert prepare('tidy', path, tmp_path/'out', size=32, progress=False).hash == first.hash

def test_list_hash_sees_every_field_and_no_folder():
    "Each field changes the hash, except the folder of a path; sets and odd keys are stable; order counts."
    base = Item(Path('/a/x.png'), 'i', 'p', 's', 'train', 'PA', 'text', ['l'], [dict(label='b', x=1., y=2, w=3, h=4)], {'m': Path('/a/m.png')}, 'src', 'CC0', {'k': 1}, False, (5, 6), '/a/list.csv', 2)
    other = dict(image=Path('/a/y.png'), image_id='j', patient_id='q', study_id=None, split='test', view='AP', text=None, labels=[], boxes=None, masks={'m': Path('/a/n.png')}, source=None, licence='CC BY', extra={'k': 2}, invert=True, boxes_on=None, file='/a/other.csv', row=3)
    h = room._list_hash([base])
    assert set(other) == {f.name for f in room.dataclass_fields(Item)} and len({h, *(room._list_hash([room.replace(base, **{k: v})]) for k, v in other.items())}) == len(other) + 1
    assert h == room._list_hash([room.replace(base, image=Path('/elsewhere/x.png'), masks={'m': Path('/b/m.png')}, file='/b/list.csv')])
    assert room._list_hash([base, room.replace(base, image_id='j')]) != room._list_hash([room.replace(base, image_id='j'), base])
    odd = room.replace(base, extra={1: np.float32(2), 'a': {'z', 'y', 'x'}, None: (1, 2)})
    assert room._list_hash([odd]) == room._list_hash([room.replace(odd, extra={None: [1, 2], 'a': {'x', 'y', 'z'}, 1: np.float32(2)})]) != h

def test_a_long_list_is_quick_and_small():
    "30,000 items: the checks, the hash and the deal take seconds at most for the 377,110 films of MIMIC-CXR, and little memory beyond the list."
    import tracemalloc
    items = [Item(Path(f'/data/p{k//5}/{k:044d}.jpg'), f'{k:044d}', f'{k//5}', file='list.csv.gz', row=k + 2, text=f'report {k}') for k in range(30_000)]
    start = time.process_time()
    room.check_items(items); room._list_hash(items); dealt, _ = room._deal(items, None, 0); room._with_column((), dealt)
    assert time.process_time() - start < 8                                                        # about 0.8 s on a free core
    tracemalloc.start(); room._list_hash(items); peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 200_000                                                                         # streams

def test_the_same_data_elsewhere_gives_the_same_store(tmp_path):
    for name in ('here', 'there'): (tmp_path/name).mkdir(); prepare('tidy', many(tmp_path/name, 12), tmp_path/name/'out', size=32, progress=False)
    a, b = contents(tmp_path/'here/out'), contents(tmp_path/'there/out')
    assert a.pop('rejected.csv') != b.pop('rejected.csv') and a == b

def test_full_disk_while_preparing(tmp_path):
    path = many(tmp_path, 40)
    script = f'''
import resource, sys; sys.path.insert(0, {str(root)!r})
from g2d.data.prepare import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
prepare('tidy', {str(path)!r}, {str(tmp_path/'out')!r}, size=32, workers=0, progress=False)
'''
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode and 'G2DError: The disk is full while writing' in done.stderr.strip().splitlines()[-1]
    prepare('tidy', path, tmp_path/'out', size=32, progress=False)
    prepare('tidy', path, tmp_path/'whole', size=32, progress=False)
    assert contents(tmp_path/'out') == contents(tmp_path/'whole')

def test_a_worker_that_dies_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(SETS, 'deadly', lambda source: Listing([Item(k, f'i{k}', f'p{k}', file='f', row=k) for k in range(40)], read_image=_die))
    with pytest.raises(G2DError, match='worker process died'): prepare('deadly', tmp_path, tmp_path/'out', size=32, workers=2, progress=False)

def _die(image, invert): os._exit(9) if image == 20 else None; return film(image, 32, 32)

def test_a_new_set_is_one_function(tmp_path, monkeypatch):
    "Other readers for films and masks, as a set with run-length masks in its table needs them."
    monkeypatch.setattr(room, 'SETS', dict(SETS))
    @data_set('toy')
    def toy(source, n: int = 5):
        "A set whose films are numbers."
        return Listing([Item(k, f'i{k}', f'p{k}', masks={'a': k}, file='f', row=k) for k in range(n)], read_image=lambda k, invert: film(k), read_mask=lambda k: film(k) > 100)
    store = prepare('toy', tmp_path, tmp_path/'out', size=90, progress=False, **parse_options('toy', ['n=7']))
    assert len(store) == 7 and np.array_equal(store.mask(3), fit(film(3), 90, {'a': film(3) > 100})[1]['a'])
    assert len(list_items('toy', tmp_path).items) == 5

# --- covid-chestxray ------------------------------------------------------------------------------------------------------

def covid(folder, rows, **files):
    head = 'patientid,offset,sex,age,finding,survival,view,modality,date,location,folder,filename,doi,url,license,clinical_notes,other_notes,'
    (folder/'images').mkdir(exist_ok=True); (folder/'annotations').mkdir(exist_ok=True)
    lines = [','.join([p, '3', 'M', '50', f'"{finding}"', 'Y', view, modality, '', '', 'images', name, '', '', licence, f'"{note}"', 'credit', '']) for p, finding, view, modality, name, licence, note in rows]
    (folder/'metadata.csv').write_bytes('\n'.join([head, *lines]).encode() if 'raw' not in files else files['raw'](head, lines))

def test_covid_layout_and_traps(tmp_path):
    covid(tmp_path, [('1', 'COVID-19, ARDS', 'PA', 'X-ray', 'a.jpg', 'CC BY', 'temp 38\ufffdC, man\ufffds chest'), ('2', 'No Finding', 'L', 'X-ray', 'b.png', ' ', '  '), ('3', 'COVID-19', 'Axial', 'CT', 'c.png', '', 'x'),
                     ('4', 'todo', 'AP', 'X-ray', 'gone.png', '', 'x'), ('5', 'Pneumonia/Viral/SARS', 'AP Supine', 'X-ray', 'a.jpg', 'CC BY', 'x'), ('5', 'SARS', 'AP', 'X-ray', 'd.png', '', 'x')])
    for name in ('a.jpg', 'b.png', 'c.png', 'd.png'): Image.fromarray(film()).save(tmp_path/'images'/name, format='PNG')
    boxes = dict(categories=[dict(id=1, name='Left Lung')], images=[dict(id=k, file_name=n, height=h, width=70) for k, n, h in ((1, 'a.jpg', 90), (2, 'b.png', 90), (3, 'd.png', 91))],
                 annotations=[dict(id=1, image_id=1, category_id=1, bbox=[7, 9, 21, 30]), dict(id=2, image_id=2, category_id=1, bbox=[None]*4), dict(id=3, image_id=3, category_id=1, bbox=[7, 9, 21, 30])])
    (tmp_path/'annotations/imageannotation_ai_lung_bounding_boxes.json').write_text(json.dumps(boxes))
    (tmp_path/'annotations/covid-severity-scores.csv').write_text('## comment,,\nfilename,geographic_mean,opacity_mean\na.jpg,2.7,2.0\n')
    store = prepare('covid_chestxray', tmp_path, tmp_path/'out', size=90, progress=False)
    assert store.index.image_id.tolist() == ['a', 'b'] and store.index.labels.tolist() == [['COVID-19', 'ARDS'], []]
    assert store.index.text[0] == "temp 38°C, man's chest" and store.index.text.isna()[1] and store.index.licence.isna().tolist() == [False, True]
    assert store.boxes(0) == [dict(label='Left Lung', x=17., y=9., w=21., h=30.)] and store.index.boxes[1] is None
    extra = json.loads(store.index.extra[0])
    assert (extra['opacity_mean'], extra['annotation_licence'], extra['other_notes']) == (2.0, 'CC BY 4.0', 'credit')
    bad = rejected(tmp_path/'out').set_index('row').reason
    assert 'modality is CT' in bad[4] and 'file is absent' in bad[5] and 'same film as row 2' in bad[6] and 'boxes were drawn on 70 x 91 pixels' in bad[7]
    same = list_items('covid_chestxray', tmp_path).items
    assert [i.patient_id for i in same] == ['1', '2', '1']                                        # patient 5 is patient 1: they share a film
    assert [i.image_id for i in list_items('covid_chestxray', tmp_path, frontal=True).items] == ['a', 'd']

def test_covid_bytes_that_are_not_utf8(tmp_path):
    rows = [('1', 'COVID-19', 'PA', 'X-ray', 'a.png', '', 'fi\xe8vre 38\xb0C')]
    covid(tmp_path, rows, raw=lambda head, lines: '\n'.join([head, *lines]).encode('latin-1'))
    Image.fromarray(film()).save(tmp_path/'images/a.png')
    assert prepare('covid_chestxray', tmp_path, tmp_path/'out', size=32, progress=False).index.text[0] == 'fièvre 38°C'

def test_covid_wrong_folder(tmp_path):
    with pytest.raises(G2DError, match='There is no table .*metadata.csv'): list_items('covid_chestxray', tmp_path)
    table(tmp_path, [dict(image='a')], 'metadata.csv')
    with pytest.raises(G2DError, match='is .* the covid-chestxray-dataset'): list_items('covid_chestxray', tmp_path)

def test_mend_text_leaves_good_text_alone():
    text = 'Temperature 38.2 °C, the patient\u2019s SpO2 > 94 %; "wet market".'
    assert mend_text(text) == text and mend_text(' a\n b\u2009c ') == 'a b c' and '\ufffd' not in mend_text('4\ufffd11 per L, 7\ufffd4 \ufffd 109')

# --- the real data --------------------------------------------------------------------------------------------------------

def test_real_covid_sample(data_root, tmp_path):
    sample = data_root/'raw_samples/covid_chestxray'
    store = prepare('covid_chestxray', sample, tmp_path/'out', size=128, progress=False)
    meta = pd.read_csv(sample/'metadata.csv', dtype=str, keep_default_na=False)
    there = set(os.listdir(sample/'images'))
    assert len(meta) == 673 == len(store) + len(rejected(tmp_path/'out'))
    reasons = rejected(tmp_path/'out').reason
    assert reasons.str.contains('not X-ray').sum() == (meta.modality != 'X-ray').sum() == 84
    assert reasons.str.contains('file is absent').sum() == ((meta.modality == 'X-ray') & ~meta.filename.isin(there)).sum()
    assert set(store.index.image_id) == {Path(name).stem for name in there} and len(store) == 88
    assert not store.index.text.str.contains('\ufffd').any() and store.manifest['counts']['with_boxes'] == 25

@pytest.mark.parametrize('name,n,masks,boxes,text', [('nih_cxr14', 435, 0, 8, 0), ('kermany_cxr', 419, 419, 0, 0), ('hannover_covid', 170, 53, 73, 0), ('vqa_rad_chest', 75, 0, 0, 75), ('covid_ccby', 6, 6, 6, 6)])
def test_real_tables_need_no_code(data_root, name, n, masks, boxes, text):
    "Every row of the shared tables becomes an item; films of a few are decoded, with their masks and boxes."
    listing = list_items('tidy', data_root/f'open_cxr/{name}/{name}.csv', masks=dict(lung='mask'))
    assert len(listing.items) == n and not listing.rejected
    assert [sum(getattr(i, f) is not None for i in listing.items) for f in ('masks', 'boxes', 'text')] == [masks, boxes, text]
    some = sorted(listing.items, key=lambda i: (i.masks is None, i.boxes is None))[:6]
    for item in some: assert not isinstance(room._load(item, (64, 64), 'pad', read_radiograph, read_mask), str)

def test_real_pairs(data_root, tmp_path):
    "The 248 films with text, as one store with splits by patient; a stored mask equals the one made by hand."
    store = prepare('shared_pairs', data_root, tmp_path/'out', size=96, progress=False)
    counts = store.manifest['counts']
    assert (counts['images'], counts['with_text'], len(rejected(tmp_path/'out'))) == (248, 248, 0)
    assert counts['source'] == dict(covid_ccby=6, covid_ccbyncsa=167, vqa_rad_chest=75) and set(counts['split']) == {'train', 'val', 'test'}
    assert (store.index.groupby('patient_id').split.nunique() == 1).all() and store.index.licence.notna().all()
    i = [i for i in range(248) if 'lung' in store.masks(i) and store.index.source[i] == 'covid_ccbyncsa'][-1]
    name = store.index.image_id[i].split('/')[-1]
    raw = np.asarray(Image.open(data_root/f'noncommercial/covid_ccbyncsa/masks/{name}_lung.png')) != 0
    assert np.array_equal(store.mask(i, 'lung'), fit(np.zeros(raw.shape, np.uint8), 96, {'lung': raw})[1]['lung'])
