"The radiograph store: one transform, atomic and resumable writing, checked reading, selections."
import errno, itertools, json, os, pickle, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
import g2d.data.store as store_room
from g2d.settings import G2DError
from g2d.data.store import RadiographStore, StoreWriter, columns, fit, is_half_written, rle_decode, rle_encode, to_uint8

root = Path(__file__).resolve().parents[1]
files = ('images.npy', 'index.parquet', 'manifest.json')

def film(seed, h=50, w=70):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (h, w)).astype(np.uint8)
    mask = np.zeros((h, w), bool)
    y, x = rng.integers(0, h - 12), rng.integers(0, w - 12)
    mask[y:y + 12, x:x + 12] = True
    return image, mask, dict(label='spot', x=x, y=y, w=12, h=12)

def add(writer, k):
    image, mask, box = film(k, 40 + k % 7, 60 + k % 5)
    writer.add(image, image_id=f'i{k}', patient_id=f'p{k // 2}', split=None if k % 11 == 0 else 'train' if k % 2 else 'test', text=f'text {k}' if k % 3 else ' \n ',
               labels=[[], None, ['a', 'b']][k % 3], masks={'spot': mask} if k % 4 else None, boxes=[box] if k % 5 else None, extra=dict(k=k) if k % 7 == 0 else None)

def write(path, n=30, **kw):
    with StoreWriter(path, size=32, source='toy', **kw) as writer:
        for k in range(n):
            if f'i{k}' not in writer.done: add(writer, k)
    return RadiographStore.open(path)

def contents(path): return {name: (Path(path)/name).read_bytes() for name in files}

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "One finished store; tests only read it."
    return write(tmp_path_factory.mktemp('whole')/'store')

# --- the transform -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype,values', [(np.uint16, [0, 30000, 65535]), (np.int16, [-1000, 0, 3000]), (np.float32, [0., .25, 1.])])
def test_to_uint8_is_linear_and_never_wraps(dtype, values):
    out = to_uint8(np.array(values, dtype))
    assert out.dtype == np.uint8 and out[0] == 0 and out[-1] == 255
    assert abs(int(out[1]) - 255*(values[1] - values[0])/(values[2] - values[0])) <= .5

def test_to_uint8_edges():
    image = np.arange(10, dtype=np.uint8)
    assert to_uint8(image) is image                                   # eight bits are left alone
    assert not to_uint8(np.full((3, 3), 7.5)).any()                   # flat: no division by zero
    with pytest.raises(G2DError, match='not finite'): to_uint8(np.array([1., np.inf]))

@pytest.mark.parametrize('shape', [(300, 200), (111, 333), (64, 64), (20, 31), (1, 500)])
def test_fit_matches_antialiased_torch(shape):
    "The pixels are those of torch's antialiased bilinear resize (another implementation), placed in zeros."
    torch = pytest.importorskip('torch')
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    out, _, _ = fit(image, 64)
    (h, w), (oy, ox) = store_room._geometry(shape, (64, 64), 'pad')
    want = torch.nn.functional.interpolate(torch.from_numpy(image)[None, None].float(), (h, w), mode='bilinear', antialias=True)[0, 0].numpy()
    assert max(h, w) == 64 and abs(h/w - shape[0]/shape[1]) < max(h/w, 1)*.51*(1/h + 1/w)      # aspect kept to rounding
    assert np.abs(out[oy:oy + h, ox:ox + w] - want).max() <= 1.01
    rest = out.copy(); rest[oy:oy + h, ox:ox + w] = 0
    assert not rest.any() and abs(2*oy + h - 64) <= 1 and abs(2*ox + w - 64) <= 1               # centred

@pytest.mark.parametrize('how', ['pad', 'stretch', 'crop'])
@pytest.mark.parametrize('seed', range(6))
def test_image_mask_and_box_stay_together(how, seed):
    "A white rectangle: its thresholded image, its mask and its box say the same after every kind of resize."
    rng = np.random.default_rng(seed)
    h, w = rng.integers(80, 400, 2)
    size = (64, 64) if seed % 2 else (48, 80)
    y, x, bh, bw = h//2 - 15, w//2 - 18, 30 + rng.integers(0, 9), 36 + rng.integers(0, 9)
    image, mask = np.zeros((h, w), np.uint8), np.zeros((h, w), bool)
    image[y:y + bh, x:x + bw] = 255; mask[y:y + bh, x:x + bw] = True
    out, masks, boxes = fit(image, size, {'a': mask}, [dict(label='a', x=x, y=y, w=bw, h=bh)], how)
    assert out.shape == size and masks['a'].shape == size and masks['a'].dtype == bool
    assert np.array_equal(out >= 128, masks['a'])
    ys, xs = np.nonzero(masks['a'])
    b = boxes[0]
    assert np.allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], [b['x'], b['y'], b['x'] + b['w'], b['y'] + b['h']], atol=1)
    assert abs(b['w']/b['h']/(bw/bh) - 1) < .03 or how == 'stretch'

def test_fit_identity_and_small_masks():
    image, mask, box = film(0, 64, 64)
    out, masks, boxes = fit(image, 64, {'m': mask}, [box])
    assert np.array_equal(out, image) and np.array_equal(masks['m'], mask) and boxes == [{k: v if k == 'label' else float(v) for k, v in box.items()}]
    dot = np.zeros((2000, 1500), bool); dot[700:703, 900:903] = True
    small = fit(np.zeros((2000, 1500), np.uint8), 128, {'dot': dot, 'none': np.zeros_like(dot)})[1]
    assert small['dot'].sum() == 1 and not small['none'].any()        # a lesion does not vanish, an empty mask stays empty
    y, x = np.argwhere(small['dot'])[0]
    assert abs(y - 701.5*128/2000) <= 1 and abs(x - (901.5*128/2000 + 16)) <= 1

def test_crop_drops_boxes_that_are_cut_away():
    boxes = [dict(label='left', x=0, y=0, w=20, h=20), dict(label='mid', x=190, y=20, w=20, h=20)]
    assert [b['label'] for b in fit(np.zeros((100, 400), np.uint8), 50, boxes=boxes, how='crop')[2]] == ['mid']

def test_box_rules():
    image = np.zeros((100, 200), np.uint8)
    clipped = fit(image, 200, boxes=[dict(label='a', x=-2, y=50, w=30, h=51.5)])[2][0]          # 2 % over is rounding: clipped
    assert (clipped['x'], clipped['w']) == (0, 28) and clipped['y'] + clipped['h'] == 150
    for bad, why in [(dict(label='a', x=180, y=0, w=40, h=9), 'outside the image of 200 x 100'), (dict(label='a', x=0, y=0, w=0, h=9), 'no area'),
                     (dict(label='a', x=0, y=0, w=9), 'is not'), (dict(label='a', x='?', y=0, w=9, h=9), 'is not'), (dict(label='a', x=float('nan'), y=0, w=9, h=9), 'no area')]:
        with pytest.raises(G2DError, match=why): fit(image, 64, boxes=[bad])
    with pytest.raises(G2DError, match=r'mask "lung" has shape \(200, 100\)'): fit(image, 64, {'lung': image.T})
    with pytest.raises(G2DError, match='expected "pad"'): fit(image, 64, how='squash')
    with pytest.raises(G2DError, match='size is'): fit(image, 0)

def test_rle_against_groupby():
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (3, 5), (17, 4)]:
        for p in (0, .2, .5, 1):
            mask = rng.random(shape) < p
            runs = [(value, len(list(group))) for value, group in itertools.groupby(mask.ravel().tolist())]
            want = ([0] if runs[0][0] else []) + [n for _, n in runs]
            assert rle_encode(mask) == want
            assert np.array_equal(rle_decode(want, shape), mask)
    with pytest.raises(G2DError, match='add up to 5'): rle_decode([2, 3], (2, 3))

# --- contents -----------------------------------------------------------------------------------------------------

def test_contract(whole):
    assert tuple(whole.index.columns) == (*columns, 'extra') and isinstance(whole.index.index, pd.RangeIndex)
    assert whole.images.shape == (30, 32, 32) and whole.images.dtype == np.uint8 and not whole.images.flags.writeable
    plain = np.load(whole.path/'images.npy', mmap_mode='r', allow_pickle=False)
    for k in range(30):
        image, mask, box = film(k, 40 + k % 7, 60 + k % 5)
        want, masks, boxes = fit(image, 32, {'spot': mask}, [box])
        assert np.array_equal(plain[k], want)
        assert whole.index.text.isna()[k] == (k % 3 == 0) and whole.index.labels[k] == [[], None, ['a', 'b']][k % 3]
        if k % 4: assert np.array_equal(whole.mask(k), masks['spot']) and np.array_equal(whole.masks(k)['spot'], masks['spot'])
        else:
            assert whole.index['mask'][k] is None and whole.masks(k) == {}
            with pytest.raises(G2DError, match='has no mask'): whole.mask(k)
        assert whole.boxes(k) == (boxes if k % 5 else []) and (whole.index.boxes[k] is None) == (k % 5 == 0)
    with pytest.raises(G2DError, match=r"no mask \"lung\"; it has \['spot'\]"): whole.mask(1, 'lung')
    assert whole.manifest['counts']['with_text'] == 20 and whole.manifest['counts']['with_mask'] == 22
    assert all(str(whole.index[name].dtype) == 'string' for name in ('image_id', 'split', 'text'))

def test_same_input_same_bytes(whole, tmp_path):
    write(tmp_path/'again')
    assert contents(tmp_path/'again') == contents(whole.path)

def test_extra_column_only_when_used(tmp_path):
    with StoreWriter(tmp_path/'s', size=16) as writer: writer.add(film(0)[0], image_id=1, patient_id=2)
    index = RadiographStore.open(tmp_path/'s').index
    assert tuple(index.columns) == columns and (index.image_id[0], index.patient_id[0]) == ('1', '2')

def test_what_a_killed_writer_could_not_rename_is_cleared_away(tmp_path):
    write(tmp_path/'whole', 6)
    (tmp_path/'cut').mkdir()
    (tmp_path/'cut'/'.journal.jsonl.31467.tmp').write_bytes(b'{"g2d')
    write(tmp_path/'cut', 6)
    assert sorted(p.name for p in (tmp_path/'cut').iterdir()) == sorted(p.name for p in (tmp_path/'whole').iterdir())
    assert all((tmp_path/'cut'/f).read_bytes() == (tmp_path/'whole'/f).read_bytes() for f in files)


def test_writer_refuses(tmp_path):
    with StoreWriter(tmp_path/'s', size=16) as writer:
        writer.add(film(0)[0], image_id='a', patient_id='p')
        with pytest.raises(G2DError, match='"a" is already in'): writer.add(film(1)[0], image_id=' a ', patient_id='q')
        with pytest.raises(G2DError, match='without patient_id'): writer.add(film(1)[0], image_id='b', patient_id='  ')
        with pytest.raises(G2DError, match='without image_id'): writer.add(film(1)[0], image_id=None, patient_id='p')
        with pytest.raises(G2DError, match='outside'): writer.add(film(1)[0], image_id='b', patient_id='p', boxes=[dict(label='x', x=500, y=0, w=5, h=5)])
    assert len(RadiographStore.open(tmp_path/'s')) == 1               # what was refused left no trace
    with pytest.raises(G2DError, match='Nothing was added'):
        with StoreWriter(tmp_path/'empty', size=16): pass
    with pytest.raises(G2DError, match='is not a g2d store'): RadiographStore.open(tmp_path/'empty')
    with pytest.raises(G2DError, match='There is no store'): RadiographStore.open(tmp_path/'nowhere')

def test_odd_text_survives(tmp_path):
    with StoreWriter(tmp_path/'s', size=16) as writer: writer.add(film(0)[0], image_id='ä/1', patient_id='p', text='lone \ud800 surrogate, 38 °C\nnew line')
    assert RadiographStore.open(tmp_path/'s').index.text[0] == 'lone ? surrogate, 38 °C\nnew line'

# --- interrupted writing --------------------------------------------------------------------------------------------

_script = '''
import sys; sys.path.insert(0, {root!r}); sys.path.insert(0, {tests!r})
import test_store as t, time
import g2d.data.store as room
{setup}
with room.StoreWriter({path!r}, size=32, source='toy') as writer:
    print(len(writer.done), flush=True)
    for k in range(30):
        if f'i{{k}}' in writer.done: continue
        t.add(writer, k); {each}
'''
def script(path, setup='', each='pass'): return [sys.executable, '-c', _script.format(root=str(root), tests=str(root/'tests'), path=str(path), setup=setup, each=each)]

def test_kill_9_at_any_moment_gives_the_same_bytes(whole, tmp_path):
    "Three kills in a row at random moments, then a run to the end."
    rng = np.random.default_rng(0)
    path, progress = tmp_path/'s', []
    for _ in range(3):
        process = subprocess.Popen(script(path, each='writer.flush() if k % 3 == 0 else None; time.sleep(.02)'), stdout=subprocess.PIPE, text=True)
        progress.append(int(process.stdout.readline()))
        time.sleep(rng.uniform(.08, .2))
        process.send_signal(signal.SIGKILL); process.wait()
        with pytest.raises(G2DError, match='half-written .* run the command that was preparing it again'): RadiographStore.open(path)
    assert progress[0] == 0 and progress == sorted(progress) and progress[-1] > 0
    write(path)
    assert contents(path) == contents(whole.path)
    assert sorted(p.name for p in path.iterdir() if p.name != '.writing.lock') == sorted(files)

@pytest.mark.parametrize('after', range(4))
def test_kill_between_the_renames(whole, tmp_path, monkeypatch, after):
    "The writer stops before the k-th of the last three renames (and after all of them, before the journal is removed)."
    real, count = os.replace, []
    def replace(a, b):
        if Path(b).name in files:
            count.append(b)
            if len(count) > after: raise KeyboardInterrupt
        real(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    monkeypatch.setattr(Path, 'unlink', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): write(tmp_path/'s')
    monkeypatch.undo()
    if after < 3:
        assert is_half_written(tmp_path/'s')
        with pytest.raises(G2DError, match='half-written'): RadiographStore.open(tmp_path/'s')
    write(tmp_path/'s')
    assert contents(tmp_path/'s') == contents(whole.path)
    assert sorted(p.name for p in (tmp_path/'s').iterdir() if p.name != '.writing.lock') == sorted(files)

def interrupted(path, at=20):
    with pytest.raises(KeyboardInterrupt):
        with StoreWriter(path, size=32, source='toy') as writer:
            for k in range(at): add(writer, k)
            raise KeyboardInterrupt

@pytest.mark.parametrize('damage', ['journal ahead', 'images ahead', 'torn line', 'no journal', 'empty journal', 'header only'])
def test_a_torn_disk_is_cut_back(whole, tmp_path, damage):
    "What a power cut may leave: one of the two files ahead of the other, or a torn last line."
    path = tmp_path/'s'; interrupted(path)
    part, journal = path/'images.npy.part', path/'journal.jsonl'
    lines = journal.read_bytes().splitlines(keepends=True)
    if damage == 'journal ahead': os.truncate(part, 128 + 32*32*13 + 77)
    if damage == 'images ahead': journal.write_bytes(b''.join(lines[:9]))
    if damage == 'torn line': journal.write_bytes(b''.join(lines[:9]) + lines[9][:40])
    if damage == 'no journal': journal.unlink()
    if damage == 'empty journal': journal.write_bytes(b'')
    if damage == 'header only': journal.write_bytes(lines[0]); os.truncate(part, 60)
    with StoreWriter(path, size=32, source='toy') as writer:
        assert len(writer.done) == {'journal ahead': 13, 'images ahead': 8, 'torn line': 8}.get(damage, 0)
        for k in range(len(writer.done), 30): add(writer, k)
    assert contents(path) == contents(whole.path)

def test_resuming_with_other_settings_is_refused(tmp_path):
    interrupted(tmp_path/'s')
    for kw, why in [(dict(size=64, source='toy'), r'size = \[32, 32\], not \[64, 64\]'), (dict(size=32, source='other'), "source = 'toy'"),
                    (dict(size=32, source='toy', settings=dict(seed=1)), 'settings.seed = None, not 1'), (dict(size=32, source='toy', how='crop'), "how = 'pad'")]:
        with pytest.raises(G2DError, match=why): StoreWriter(tmp_path/'s', **kw)
    write(tmp_path/'s')                                               # and the lock is free again

def test_two_writers_at_once_are_refused(tmp_path):
    with StoreWriter(tmp_path/'s', size=32, source='toy') as writer:
        add(writer, 0)
        with pytest.raises(G2DError, match='Another process is writing'): StoreWriter(tmp_path/'s', size=32, source='toy')
        other = subprocess.run(script(tmp_path/'s'), capture_output=True, text=True)
        assert other.returncode and 'Another process is writing' in other.stderr.strip().splitlines()[-1]
    assert len(RadiographStore.open(tmp_path/'s')) == 1

# --- full disk --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('limit', [128 + 32*32*12 + 500, 2000])
def test_full_disk_keeps_what_is_good(whole, tmp_path, limit):
    "A real write failure in a process of its own: no file may grow beyond the limit."
    setup = f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))'
    done = subprocess.run(script(tmp_path/'s', setup, each='writer.flush() if k == 5 else None'), capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and 'G2DError: The disk is full while writing' in last and 'run the same command again' in last
    with pytest.raises(G2DError, match='half-written'): RadiographStore.open(tmp_path/'s')
    with StoreWriter(tmp_path/'s', size=32, source='toy') as writer:
        assert len(writer.done) == (limit - 128)//1024               # every image that fitted is kept
        for k in range(30):
            if f'i{k}' not in writer.done: add(writer, k)
    assert contents(tmp_path/'s') == contents(whole.path)

@pytest.mark.parametrize('where', ['flush', 'index', 'hash'])
def test_full_disk_at_the_end(whole, tmp_path, monkeypatch, where):
    full = OSError(errno.ENOSPC, 'No space left on device')
    def fail(*args, **kw): raise full
    if where == 'flush':
        real = store_room._write_at
        def half(file, offset, data): # half of the journal's lines get out before the disk is full
            if not str(file.name).endswith('jsonl'): return real(file, offset, data)
            real(file, offset, bytes(data)[:len(data)//2]); raise full
        monkeypatch.setattr(store_room, '_write_at', half)
    if where == 'index': monkeypatch.setattr('pyarrow.parquet.ParquetWriter.write_table', fail)
    if where == 'hash': monkeypatch.setattr(store_room, 'write_json', fail)
    with pytest.raises(G2DError, match='The disk is full'): write(tmp_path/'s')
    monkeypatch.undo()
    write(tmp_path/'s')
    assert contents(tmp_path/'s') == contents(whole.path)

# --- black borders ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['pad', 'stretch', 'crop'])
@pytest.mark.parametrize('seed', range(6))
def test_crop_borders_is_fit_on_the_cut_film(how, seed):
    "Image, masks and boxes are those of a film cut by hand (rule of the released code: the extent of what is not zero)."
    rng = np.random.default_rng(seed)
    top, bottom, left, right = (int(v) for v in rng.integers(0, 25, 4))
    inner = rng.integers(1, 256, (rng.integers(30, 60), rng.integers(30, 60))).astype(np.uint8)
    inner[5:9, 5:9] = 0                                                       # zeros inside are no border
    image = np.pad(inner, ((top, bottom), (left, right)))
    ys, xs = np.nonzero(image)
    rows, columns = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
    assert store_room.zero_borders(image) == (rows, columns) and image[rows, columns].shape == inner.shape
    mask = np.zeros(image.shape, bool); mask[top + 4:top + 20, left + 3:left + 17] = True
    box = dict(label='spot', x=left + 3., y=top + 4., w=14., h=16.)
    got = fit(image, 32, {'spot': mask}, [box], how, crop_borders=True)
    want = fit(inner, 32, {'spot': mask[rows, columns]}, [dict(box, x=3., y=4.)], how)
    assert np.array_equal(got[0], want[0]) and np.array_equal(got[1]['spot'], want[1]['spot']) and [b['label'] for b in got[2]] == [b['label'] for b in want[2]]
    for a, b in zip(got[2], want[2]): assert [a[k] for k in 'xywh'] == pytest.approx([b[k] for k in 'xywh'])
    plain = fit(image, 32, {'spot': mask}, [box], how)
    assert np.array_equal(plain[0], fit(image, 32, how=how)[0])               # off unless asked for

def test_crop_borders_edges():
    image = np.zeros((40, 50), np.uint8); image[10:30, 15:35] = 90
    boxes = [dict(label='half', x=5, y=12, w=20, h=4), dict(label='gone', x=0, y=0, w=10, h=8), dict(label='touches', x=5, y=12, w=10, h=4)]
    out, masks, kept = fit(image, 20, {'black': np.pad(np.ones((5, 5), bool), ((0, 35), (0, 45)))}, boxes, crop_borders=True)
    assert (out == 90).all() and not masks['black'].any() and kept == [dict(label='half', x=0., y=2., w=10., h=4.)]
    assert not fit(np.zeros((40, 50), np.uint8), 20, crop_borders=True)[0].any()                    # all black: left as it is
    image[0, 0] = 1                                                                                 # a grain of dust ends the cut
    assert store_room.zero_borders(image) == (slice(0, 30), slice(0, 35))
    deep = np.full((40, 50), 700, np.int16); deep[10:30, 15:35] = np.arange(800, 1200).reshape(20, 20)
    assert np.array_equal(fit(deep, 20, crop_borders=True)[0], fit(to_uint8(deep)[10:30, 15:35], 20)[0])  # zero is the lowest value of a deep film
    with pytest.raises(G2DError, match='outside the image'): fit(image, 20, boxes=[dict(label='a', x=60, y=5, w=5, h=5)], crop_borders=True)
    with pytest.raises(G2DError, match='has shape'): fit(image, 20, {'a': np.ones((20, 20))}, crop_borders=True)

def test_rows_go_through_the_journal_in_pieces(tmp_path, monkeypatch, whole):
    "Several row groups give the same table, whether or not the run was interrupted, and counts that brute force confirms."
    monkeypatch.setattr(store_room, '_piece', 2000)
    cut = write(tmp_path/'cut')
    import pyarrow.parquet as pq
    assert pq.ParquetFile(tmp_path/'cut/index.parquet').num_row_groups > 3
    pd.testing.assert_frame_equal(cut.index, whole.index)
    assert cut.manifest['counts'] == whole.manifest['counts']
    index, counts = whole.index, whole.manifest['counts']
    assert counts['patients'] == index.patient_id.nunique() and counts['with_text'] == index.text.notna().sum() and counts['with_mask'] == sum(m is not None for m in index['mask'])
    assert counts['split'] == index.split.fillna('missing').value_counts().to_dict()
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path/'again', size=32, source='toy') as writer:
        for k in range(17): add(writer, k)
        raise KeyboardInterrupt
    write(tmp_path/'again')
    assert contents(tmp_path/'again') == contents(tmp_path/'cut')

# --- appending --------------------------------------------------------------------------------------------------------

def test_append(whole, tmp_path):
    path = tmp_path/'s'; write(path, 20)
    old = contents(path)
    with pytest.raises(KeyboardInterrupt):
        with StoreWriter(path, size=32, source='toy', append=True) as writer:
            assert len(writer.done) == 20
            for k in range(20, 25): add(writer, k)
            raise KeyboardInterrupt
    assert contents(path) == old and len(RadiographStore.open(path)) == 20    # the old store is valid until the new one is whole
    write(path, 30, append=True)
    assert (path/'images.npy').read_bytes() == contents(whole.path)['images.npy']
    assert RadiographStore.open(path).index.equals(whole.index)
    assert RadiographStore.open(path).manifest['appended_to']['sha256'] != RadiographStore.open(path).manifest['sha256']

def test_finished_store_is_left_alone(whole, tmp_path):
    path = tmp_path/'s'; write(path)
    before = {name: (path/name).stat().st_mtime_ns for name in files}
    write(path)                                                       # the same command again: nothing to do
    assert {name: (path/name).stat().st_mtime_ns for name in files} == before
    with StoreWriter(path, size=32, source='toy') as writer:
        with pytest.raises(G2DError, match='finished store of 30 images; use append=True'): writer.add(film(99)[0], image_id='new', patient_id='p')
    with pytest.raises(G2DError, match='was begun with source'): StoreWriter(path, size=32, source='else')
    with pytest.raises(G2DError, match='was begun with size'): StoreWriter(path, size=64, append=True)
    assert contents(path) == contents(whole.path)

def test_appending_to_a_damaged_store_is_refused(tmp_path):
    path = tmp_path/'s'; write(path, 5)
    flip(path/'images.npy')
    with pytest.raises(G2DError, match='images.npy is damaged'): StoreWriter(path, size=32, source='toy', append=True)

# --- damage ------------------------------------------------------------------------------------------------------------

def flip(path, at=None):
    data = bytearray(path.read_bytes()); data[len(data)//2 if at is None else at] ^= 1; path.write_bytes(data)

@pytest.mark.parametrize('name', ['images.npy', 'index.parquet'])
@pytest.mark.parametrize('at', [0, 200, -1])
def test_one_flipped_bit_is_found(tmp_path, name, at):
    path = tmp_path/'s'; write(path, 5)
    flip(path/name, at)
    with pytest.raises(G2DError, match=f'{name} is damaged'): RadiographStore.open(path)

def test_other_damage_is_one_sentence(tmp_path):
    path = tmp_path/'s'; write(path, 5)
    good = contents(path)
    def restore(): [(path/name).write_bytes(data) for name, data in good.items()]
    os.truncate(path/'images.npy', 900)
    with pytest.raises(G2DError, match='images.npy is damaged: it has 900 bytes'): RadiographStore.open(path, verify=False)
    restore(); (path/'index.parquet').unlink()
    with pytest.raises(G2DError, match='index.parquet is missing'): RadiographStore.open(path)
    restore(); (path/'manifest.json').write_text('{"version": 1')
    with pytest.raises(G2DError, match='not valid JSON'): RadiographStore.open(path)
    restore(); (path/'manifest.json').write_text(json.dumps(json.loads(good['manifest.json']) | dict(version=9)))
    with pytest.raises(G2DError, match='store format 9'): RadiographStore.open(path)
    restore(); flip(path/'index.parquet', -1)
    with pytest.raises(G2DError, match='index.parquet cannot be read'): RadiographStore.open(path, verify=False)
    restore(); assert len(RadiographStore.open(path)) == 5

def test_large_files_are_hashed_once(tmp_path, monkeypatch):
    path = tmp_path/'s'; write(path, 5)
    monkeypatch.setattr(store_room, '_always_hash', 0)
    hashed = []
    real = store_room.sha256_file
    monkeypatch.setattr(store_room, 'sha256_file', lambda p, *a: hashed.append(Path(p).name) or real(p, *a))
    for _ in range(3): RadiographStore.open(path)
    assert hashed == ['images.npy', 'index.parquet']
    flip(path/'images.npy')                                           # a new time stamp: hashed again, and found
    with pytest.raises(G2DError, match='images.npy is damaged'): RadiographStore.open(path)
    flip(path/'images.npy')
    (path/'verified.json').write_text('[not json')                    # a broken note is no reason to fail
    assert len(RadiographStore.open(path)) == 5
    def fail(*a): raise OSError(errno.EROFS, 'Read-only file system')
    (path/'verified.json').unlink(); monkeypatch.setattr(store_room, 'write_json', fail)
    assert len(RadiographStore.open(path)) == 5

# --- selections --------------------------------------------------------------------------------------------------------

def test_select_keeps_rows_and_images_together(whole):
    train = whole.select(split='train')
    assert (train.index.split == 'train').all() and 0 < len(train) < 30 and isinstance(train.index.index, pd.RangeIndex)
    sub = train.select(where=lambda index: index.text.notna())
    for view in (train, sub):
        assert view.images.shape == (len(view), 32, 32) and np.asarray(view.images).shape == view.images.shape
        for i in range(len(view)):
            k = int(view.index.image_id[i][1:])
            assert view.rows[i] == k and np.array_equal(view.images[i], whole.images[k])
            if k % 4: assert np.array_equal(view.mask(i), whole.mask(k))
        assert np.array_equal(view.images[[2, 0]], whole.images[view.rows[[2, 0]]]) and np.array_equal(view.images[1:3], whole.images[view.rows[1:3]])
        assert np.array_equal(view.images[0, :5, 3], whole.images[view.rows[0], :5, 3]) and np.array_equal(view.images[:2, :5], whole.images[view.rows[:2]][:, :5])
    assert len({whole.hash, train.hash, sub.hash}) == 3 and train.hash == whole.select(split='train').hash

@pytest.mark.parametrize('seed', range(3))
def test_fractions_are_nested_and_by_patient(whole, seed):
    parts = [whole.select(fraction=f, seed=seed) for f in (.05, .1, .4, 1.)]
    for small, large in itertools.pairwise(parts): assert set(small.rows) <= set(large.rows)
    assert [p.index.patient_id.nunique() for p in parts] == [1, 2, 6, 15] and len(parts[-1]) == 30
    for p in parts: assert not set(p.index.patient_id) & set(whole.index.patient_id[~whole.index.index.isin(p.rows)])
    assert np.array_equal(parts[2].rows, whole.select(fraction=.4, seed=seed).rows)
    assert not np.array_equal(parts[2].rows, whole.select(fraction=.4, seed=seed + 10).rows)

def test_select_forms_and_refusals(whole):
    a, b, c = (whole.select(where=w) for w in ('patient_id == "p3"', lambda index: index.patient_id == 'p3', (whole.index.patient_id == 'p3').to_numpy()))
    assert list(a.rows) == list(b.rows) == list(c.rows) == [6, 7]
    with pytest.raises(G2DError, match=r"its splits are \['test', 'train'\]"): whole.select(split='val')
    for bad in (0, 1.5, -1):
        with pytest.raises(G2DError, match='fraction is'): whole.select(fraction=bad)

def test_pickling_carries_no_pixels(whole):
    whole.images
    view = whole.select(split='train')
    data = pickle.dumps(view)                                         # what a worker process of a loader is handed
    assert len(data) < 60_000 and np.array_equal(pickle.loads(data).images[3], view.images[3])

def test_real_masks_survive_the_road(data_root, tmp_path):
    "Real lung masks at 256: area fractions agree with the originals to 1 % and boxes with the padded masks."
    from PIL import Image
    folder = data_root/'open_cxr/kermany_cxr'
    table = pd.read_csv(folder/'kermany_cxr.csv').iloc[:12]
    with StoreWriter(tmp_path/'s') as writer:
        for r in table.itertuples():
            mask = np.asarray(Image.open(folder/r.mask)) != 0
            ys, xs = np.nonzero(mask)
            writer.add(np.asarray(Image.open(folder/r.image)), image_id=r.image, patient_id=r.patient_id, masks={'lung': mask},
                       boxes=[dict(label='lung', x=xs.min(), y=ys.min(), w=np.ptp(xs) + 1, h=np.ptp(ys) + 1)])
    store = RadiographStore.open(tmp_path/'s')
    for i, r in enumerate(table.itertuples()):
        mask = np.asarray(Image.open(folder/r.mask)) != 0
        scale = 256/max(mask.shape)
        assert abs(store.mask(i).sum()/(mask.sum()*scale**2) - 1) < .01
        ys, xs = np.nonzero(store.mask(i)); b = store.boxes(i)[0]
        assert np.allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], [b['x'], b['y'], b['x'] + b['w'], b['y'] + b['h']], atol=1.01)
