"Run lengths of every kind, shapes, and masks that travel: against loops over runs and pixels, COCO's own tools, and real rows."
import pickle
from importlib.util import find_spec
from pathlib import Path
import numpy as np, pytest
from g2d.settings import G2DError
from g2d.data.annotations import (KINDS, Runs, Shapes, check_shape, decode, decode_coco, draw_shapes, encode, film_header, find_runs, pack_counts, paint_runs,
                                  parse_shapes, read_any_mask, shape_box, unpack_counts)


def brute_decode(row, size, kind, order):
    "One pixel at a time, one rule at a time."
    flat, numbers, at = [False]*(size[0]*size[1]), [int(word) for word in row.split()], 0
    if kind == 'counts':
        for k, count in enumerate(numbers):
            for _ in range(count): flat[at] = k % 2 == 1; at += 1
    else:
        for first, length in zip(numbers[::2], numbers[1::2]):
            at = at + first if kind == 'relative' else first - 1
            for i in range(at, at + length): flat[i] = True
            at += length
    mask = np.zeros(size, bool)
    for i, value in enumerate(flat):
        if order == 'F': mask[i % size[0], i // size[0]] = value
        else: mask[i // size[1], i % size[1]] = value
    return mask


def brute_encode(mask, kind, order):
    "Runs by walking over the pixels."
    (h, w), runs, start = mask.shape, [], None
    pixels = [mask[i % h, i // h] if order == 'F' else mask[i // w, i % w] for i in range(h*w)]
    for i, value in enumerate([*pixels, False]):
        if value and start is None: start = i
        if not value and start is not None: runs.append((start, i - start)); start = None
    if kind == 'absolute': return ' '.join(f'{s + 1} {n}' for s, n in runs) or '-1'
    words, end = [], 0
    for s, n in runs: words += [s - end, n]; end = s + n
    if kind == 'counts' and end < h*w: words.append(h*w - end)
    return ' '.join(map(str, words)) or '-1'


def masks():
    rng = np.random.default_rng(0)
    found = [rng.random(rng.integers(1, 30, 2)) < p for p in (.02, .1, .3, .5, .8, .98) for _ in range(8)]
    return found + [np.zeros((4, 7), bool), np.ones((5, 3), bool), np.eye(6, dtype=bool), ~np.eye(6, dtype=bool), np.ones((1, 1), bool)]


@pytest.mark.parametrize('order', ['F', 'C'])
@pytest.mark.parametrize('kind', KINDS)
def test_codes_equal_a_loop_both_ways(kind, order):
    for mask in masks():
        row = encode(mask, kind, order)
        assert row == brute_encode(mask, kind, order)
        assert np.array_equal(decode(row, mask.shape, kind, order), mask)
        if row != '-1': assert np.array_equal(brute_decode(row, mask.shape, kind, order), mask)


def test_runs_in_any_order_overlapping_or_several_rows_are_united():
    rng = np.random.default_rng(1)
    for _ in range(20):
        size = tuple(rng.integers(5, 20, 2)); n = int(size[0]*size[1])
        starts = rng.integers(0, n, 6); lengths = np.array([rng.integers(1, n - s + 1) for s in starts]); lengths = np.minimum(lengths, 9)
        flat = np.zeros(n, bool)
        for s, length in zip(starts, lengths): flat[s:s + length] = True
        assert np.array_equal(paint_runs(starts, lengths, n), flat)
        row = ' '.join(f'{s + 1} {length}' for s, length in zip(starts, lengths))
        assert np.array_equal(decode(row, size, 'absolute'), flat.reshape(size, order='F'))
    a, b = np.random.default_rng(2).random((2, 9, 8)) < .3
    for kind in KINDS: assert np.array_equal(decode([encode(a, kind), encode(b, kind), '-1' if kind != 'counts' else encode(np.zeros_like(a), kind)], a.shape, kind), a | b)
    starts, lengths = find_runs(a.ravel('F'))
    assert np.array_equal(paint_runs(starts, lengths, a.size).reshape(a.shape, order='F'), a)


def test_compressed_counts_are_those_of_coco():
    pytest.importorskip('faster_coco_eval')
    from faster_coco_eval.core import mask as coco
    big = [np.random.default_rng(3).random((300, 200)) < p for p in (.001, .5)] + [draw_shapes([('ellipse', 10, 20, 180, 280)], (300, 200))]
    for mask in masks() + big:
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = theirs['counts'].decode() if isinstance(theirs['counts'], bytes) else theirs['counts']
        assert pack_counts([int(word) for word in encode(mask, 'counts').split()]) == text
        assert np.array_equal(decode_coco(dict(size=list(mask.shape), counts=text)), mask)
        assert np.array_equal(decode_coco(dict(size=list(mask.shape), counts=unpack_counts(text))), mask)


def test_real_rows_of_siim_equal_a_loop():
    if (spec := find_spec('torchxrayvision')) is None: pytest.skip('torchxrayvision is not installed: no real rows')
    from g2d.data.tables import read_packed
    rows = [r for r in read_packed(Path(spec.origin).parent/'data/siim-pneumothorax-train-rle.csv.gz')['EncodedPixels'] if r != '-1']
    assert len(rows) == 12954 - 9378
    for k in np.random.default_rng(0).choice(len(rows), 120, replace=False):
        flat, at = np.zeros(1024*1024, bool), 0
        numbers = [int(word) for word in rows[k].split()]
        for gap, length in zip(numbers[::2], numbers[1::2]): at += gap; flat[at:at + length] = True; at += length
        mask = decode(rows[k], (1024, 1024))
        assert np.array_equal(mask, flat.reshape(1024, 1024).T)
        assert encode(mask) == rows[k]


@pytest.mark.parametrize('row, kind, message', [
    ('3 4 5', 'relative', 'are 3 numbers; expected pairs of gap and length'), ('7', 'absolute', 'pairs of start and length'),
    ('15 4 7 1', 'relative', 'Run 2 of 2 .* ends at pixel 27, beyond the image of 5 x 4'), ('20 2', 'absolute', 'ends at pixel 21, beyond'),
    ('0 3', 'absolute', 'begins at pixel -1, before'), ('-3 3', 'relative', 'before the image'), ('5 0', 'relative', 'is empty'), ('5 -2', 'relative', 'is empty'),
    ('1 x', 'relative', "'x', which is no whole number"), ('1 2.5', 'relative', "'2.5', which is no whole number"), ('1 99999999999999999999999', 'absolute', 'no whole number'),
    ('9223372036854775807 9223372036854775807', 'absolute', 'no image has that many pixels'), ('4611686018427387904 4 4611686018427387904 4', 'relative', 'no image has'), ('5 5 9', 'counts', 'add up to 19 pixels, but the image has 20'), ('25 -5', 'counts', 'cannot be negative')])
def test_a_bad_row_is_one_sentence(row, kind, message):
    with pytest.raises(G2DError, match=message) as error: decode(row, (4, 5), kind)
    assert '\n' not in str(error.value)
    with pytest.raises(G2DError, match=message): Runs((row,), (4, 5), kind).read()


def test_unknown_codes_are_refused():
    with pytest.raises(G2DError, match='relative, absolute, counts'): decode('1 1', (4, 5), 'rle')
    with pytest.raises(G2DError, match='relative, absolute, counts'): encode(np.ones((2, 2)), 'rle')
    with pytest.raises(G2DError, match='expected F'): decode('1 1', (4, 5), order='K')
    with pytest.raises(G2DError, match='"size"'): decode_coco(dict(counts='1'))
    with pytest.raises(G2DError, match='character'): decode_coco(dict(size=(2, 2), counts='\x05'))
    with pytest.raises(G2DError, match='inside a number'): unpack_counts('o')
    for blank in ('', ' ', '-1', ' -1 '): assert not decode(blank, (3, 3)).any()


def test_shapes_hold_the_pixels_whose_centres_they_hold():
    from matplotlib.path import Path as Outline
    rng, (h, w) = np.random.default_rng(4), (50, 70)
    x, y = np.meshgrid(np.arange(w) + .5, np.arange(h) + .5)
    for _ in range(25):
        x0, x1 = np.sort(rng.uniform(0, w, 2)); y0, y1 = np.sort(rng.uniform(0, h, 2))
        x1, y1 = min(w, x1 + 2), min(h, y1 + 2)
        assert np.array_equal(draw_shapes([('rectangle', x0, y0, x1, y1)], (h, w)), (x >= x0) & (x < x1) & (y >= y0) & (y < y1))
        ellipse = ((x - (x0 + x1)/2)/((x1 - x0)/2))**2 + ((y - (y0 + y1)/2)/((y1 - y0)/2))**2 <= 1
        if ellipse.any(): assert np.array_equal(draw_shapes([('ellipse', x0, y0, x1, y1)], (h, w)), ellipse)
        points = np.stack([rng.uniform(0, w, 9), rng.uniform(0, h, 9)], 1)
        points = points[np.argsort(np.arctan2(*(points - points.mean(0)).T))]
        inside = Outline(np.vstack([points, points[:1]])).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(h, w)
        assert np.array_equal(draw_shapes([('polygon', *points.ravel())], (h, w)), inside)
        box = shape_box(('polygon', *points.ravel()), 'a')
        assert np.allclose([box['x'], box['y'], box['x'] + box['w'], box['y'] + box['h']], [*points.min(0), *points.max(0)])
    assert draw_shapes([('rectangle', 10, 20, 14, 22)], (h, w)).sum() == 8                      # as the slice [20:22, 10:14] of the peers
    assert np.array_equal(draw_shapes([('rectangle', 14, 22, 10, 20)], (h, w)), draw_shapes([('rectangle', 10, 20, 14, 22)], (h, w)))
    needle = draw_shapes([('polygon', 5.1, 5.6, 30.2, 5.8, 5.1, 5.7)], (h, w))
    assert needle.any() and not draw_shapes([], (h, w)).any()


def test_a_little_beyond_the_border_is_cut_and_far_beyond_is_refused():
    mask = draw_shapes([('rectangle', -1, -1, 101, 50)], (100, 100))
    assert mask[:50].all() and not mask[50:].any()
    for shape in (('rectangle', 80, 10, 110, 20), ('ellipse', -9, 10, 20, 20), ('polygon', 10, 10, 50, 10, 30, 130)):
        with pytest.raises(G2DError, match='lies outside the image of 100 x 100'): draw_shapes([shape], (100, 100))


@pytest.mark.parametrize('cell, message', [('3 1 1 5 5', 'type 3'), ('0 1 1 5', 'rectangle of 3 numbers'), ('2 1 1 5 5', 'at least 3 points'), ('2 1 1 5 5 9 9 3', 'at least 3 points'),
                                           ('0 a b c d', 'not numbers'), ('1 5 5 5 9', 'without extent'), ('0 1 1 nan 4', 'no number'), ('0 1 1 5 5;x', 'not numbers')])
def test_a_bad_cell_is_one_sentence(cell, message):
    with pytest.raises(G2DError, match=message): parse_shapes(cell)


def test_cells_of_object_cxr():
    assert parse_shapes('') == parse_shapes(' ; ') == ()
    assert parse_shapes('0 1 2 3 4;1 5 6 7 8;2 1 1 5 1 3 9;') == (('rectangle', 1, 2, 3, 4), ('ellipse', 5, 6, 7, 8), ('polygon', 1, 1, 5, 1, 3, 9))
    with pytest.raises(G2DError, match='no shape "circle"'): check_shape(('circle', 1, 2, 3))


def test_masks_that_travel(tmp_path):
    from PIL import Image
    from g2d.data.layouts import write_dicom
    mask = np.random.default_rng(5).random((20, 30)) < .4
    runs = Runs((encode(mask & (np.arange(30) < 10)), encode(mask & (np.arange(30) >= 10))), (20, 30))
    again = pickle.loads(pickle.dumps(runs))
    assert again == runs and np.array_equal(again.read(), mask) and hash(again) == hash(runs)
    assert not Runs((), (20, 30)).read().any() and Runs((), (20, 30)).read().shape == (20, 30)
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(tmp_path/'a.jpg')
    write_dicom(tmp_path/'b.dcm', np.zeros((60, 30), np.uint8), ViewPosition='PA')
    shapes = (('ellipse', 5, 6, 20, 30),)
    for name, size in (('a.jpg', (40, 50)), ('b.dcm', (60, 30))):
        travelling = pickle.loads(pickle.dumps(Shapes(shapes, film=tmp_path/name)))
        assert np.array_equal(read_any_mask(travelling), draw_shapes(shapes, size)) and str(tmp_path) not in repr(travelling)
    assert film_header(tmp_path/'b.dcm') == dict(height=60, width=30, view='PA')
    (tmp_path/'c.dcm').write_bytes(b'no dicom'); (tmp_path/'c.jpg').write_bytes(b'no jpeg')
    for name, message in (('none.jpg', 'absent'), ('c.dcm', 'broken header'), ('c.jpg', 'broken header')):
        with pytest.raises(G2DError, match=message): Shapes(shapes, film=tmp_path/name).read()
    with pytest.raises(G2DError, match='size or a film'): Shapes(shapes).read()
    Image.fromarray(mask).save(tmp_path/'mask.png')
    assert np.array_equal(read_any_mask(tmp_path/'mask.png'), mask)


def test_a_mask_for_a_smaller_mirror_is_covered_by_half():
    mask = np.random.default_rng(6).random((64, 64)) < .5
    mask[10:40, 20:50] = True
    small = Runs((encode(mask),), (64, 64), to=(16, 16)).read()
    cover = mask.reshape(16, 4, 16, 4).mean((1, 3))
    clear = np.abs(cover - .5) > .2
    assert small.shape == (16, 16) and np.array_equal(small[clear], (cover > .5)[clear])


def test_real_polygons_of_chestx_det(data_root):
    import json
    films = json.loads((data_root/'annotations/ChestX_Det_test.json').read_text())
    for film in films[1:60:3]:
        for box, points in zip(film['boxes'], film['polygons']):
            b, mask = shape_box(('polygon', *np.ravel(points)), ''), draw_shapes([('polygon', *np.ravel(points))], (1024, 1024))
            assert np.abs(np.array([b['x'], b['y'], b['x'] + b['w'], b['y'] + b['h']]) - box).max() <= 9
            rows, columns = np.nonzero(mask)
            assert np.abs(np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) - [b['x'], b['y'], b['x'] + b['w'], b['y'] + b['h']]).max() <= 8 # a tip may be thinner than a pixel
