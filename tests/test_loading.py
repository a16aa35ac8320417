"Loading: order, resuming and ranks of PairLoader; Augment against torchvision, kornia and PIL; masks follow images; nothing is mirrored."
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode

from g2d.data.loading import (Augment, PairLoader, RECIPES, _between, affine_matrices, draw, epoch_order, frame_of, gaussian_blur, geometry,
                              intensity_, move_boxes, moved_corners, perspective_matrices, sampling_grid, step_share, steps_an_epoch)
from g2d.data.store import StoreWriter, RadiographStore
from g2d.settings import G2DError

NAMES = ('as_paper', 'as_released', 'recommended', 'mgca_seg', 'mgca_cls')


# ---------------------------------------------------------------- input

def smooth_images(n, size=96, seed=0):
    "uint8 [n, 1, size, size]: smooth random images with edges."
    noise = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(noise, (size, size), mode='bicubic')
    x = (x - x.amin((2, 3), keepdim=True))/(x.amax((2, 3), keepdim=True) - x.amin((2, 3), keepdim=True))
    return (x*200 + 20*(x > 0.5)).to(torch.uint8)

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "53 images, three of them without text, in two splits."
    path = tmp_path_factory.mktemp('loading')/'store'
    with StoreWriter(path, size=32) as writer:
        for i, image in enumerate(smooth_images(53, 32)[:, 0].numpy()):
            text = {5: None, 17: '   ', 40: ''}.get(i, f'FINDINGS: Image number {i}. Heart is normal. No effusion.')
            writer.add(image, image_id=f'i{i}', patient_id=f'p{i}', split='train' if i % 3 else 'test', text=text)
        writer.finish()
    return RadiographStore.open(path)

@pytest.fixture(scope='module')
def real_images(data_root):
    "uint8 [8, 1, 256, 256] of the shared chest X-rays."
    files = sorted(data_root.glob('open_cxr/nih_cxr14/**/*.jp*g'))[:8]
    if not files: pytest.skip(f'no images in {data_root}/open_cxr/nih_cxr14')
    return torch.stack([torch.tensor(np.asarray(Image.open(f).convert('L').resize((256, 256), Image.BILINEAR)))[None] for f in files])

def rows_of(loader): return [batch.rows.tolist() for batch in loader]

def same(a, b):
    return (a.texts == b.texts and a.rows.tolist() == b.rows.tolist() and torch.equal(a.images, b.images) and (a.epoch, a.step, a.global_step) == (b.epoch, b.step, b.global_step))


# ---------------------------------------------------------------- the loader

def test_batches_hold_the_rows_they_name(store):
    loader = PairLoader(store, 8, seed=1)
    for batch in loader:
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (8, 1, 32, 32)
        np.testing.assert_array_equal(batch.images[:, 0].numpy(), np.stack([store.images[row] for row in batch.rows]))
        assert batch.texts == [store.index['text'][row] for row in batch.rows]
    assert len(loader) == 50//8

def test_rows_without_text_are_left_out_and_counted(store):
    loader = PairLoader(store, 10, drop_last=False)
    seen = sum(rows_of(loader), [])
    assert loader.left_out == 3 and sorted(seen) == [i for i in range(53) if i not in (5, 17, 40)]
    everything = PairLoader(store, 10, drop_last=False, require_text=False)
    assert everything.left_out == 0 and sorted(sum(rows_of(everything), [])) == list(range(53))
    assert all(isinstance(text, str) for batch in everything for text in batch.texts)

def test_text_function_may_leave_out_rows(store):
    loader = PairLoader(store, 4, text_fn=lambda text: None if 'number 7.' in text else text.upper(), drop_last=False)
    batches = list(loader)
    assert loader.left_out == 4 and not any(7 in batch.rows for batch in batches) and all(text.isupper() for batch in batches for text in batch.texts)

def test_text_function_of_reports(store):
    reports = pytest.importorskip('g2d.data.reports', exc_type=ImportError)
    loader = PairLoader(store, 4, text_fn=partial(reports.clean_report, min_tokens=3))
    assert 'Image number' in next(iter(loader)).texts[0]

def test_sentences_are_shuffled_by_seed_and_epoch(store):
    pytest.importorskip('g2d.data.reports', exc_type=ImportError)
    plain = next(iter(PairLoader(store, 32, shuffle=False)))
    shuffled = PairLoader(store, 32, shuffle=False, sentence_shuffle=True)
    first, again, later = shuffled.batch(0, 0).texts, shuffled.batch(0, 0).texts, shuffled.batch(1, 0).texts
    assert first == again and first != later and first != plain.texts
    assert [sorted(a.replace('.', '').split()) for a in first] == [sorted(b.replace('.', '').split()) for b in plain.texts]

def test_split_and_selection(store):
    whole, part = PairLoader(store, 4, split='test', seed=3), PairLoader(store.select('test'), 4, seed=3)
    for a, b in zip(whole, part, strict=True):
        assert a.texts == b.texts and torch.equal(a.images, b.images)
        assert (store.index['split'][a.rows] == 'test').all()
    assert len(PairLoader(store, 4, split='all')) == len(PairLoader(store, 4))

def test_second_run_is_identical(store):
    a, b = PairLoader(store, 8, seed=4), PairLoader(store, 8, seed=4)
    for _ in range(2):
        for x, y in zip(a, b, strict=True): assert same(x, y)
    assert rows_of(PairLoader(store, 8, seed=4)) != rows_of(PairLoader(store, 8, seed=5))

@pytest.mark.parametrize('workers', [1, 2, 5])
def test_workers_do_not_change_anything(store, workers):
    plain, ahead = PairLoader(store, 8, seed=4), PairLoader(store, 8, seed=4, workers=workers)
    for _ in range(2):
        for x, y in zip(plain, ahead, strict=True): assert same(x, y)

def test_an_error_in_a_worker_reaches_the_caller(store):
    loader = PairLoader(store, 8, workers=2)
    loader.texts = loader.texts[:10]
    with pytest.raises(IndexError): list(loader)

def test_no_thread_is_left(store):
    import threading
    before = threading.active_count()
    for batch in PairLoader(store, 4, workers=3): break
    import gc; gc.collect()
    assert threading.active_count() <= before

def test_epochs_differ_unless_told_otherwise(store):
    loader = PairLoader(store, 8, seed=1)
    first, second = rows_of(loader), rows_of(loader)
    assert first != second and loader.epoch == 2
    loader.set_epoch(0)
    assert rows_of(loader) == first
    released = PairLoader(store, 8, seed=1, reshuffle=False)
    assert rows_of(released) == rows_of(released)
    ordered = sum(rows_of(PairLoader(store, 8, shuffle=False)), [])
    assert ordered == sorted(ordered)

@pytest.mark.parametrize('drop_last', [True, False])
@pytest.mark.parametrize('world,size', [(2, 4), (3, 5)])
def test_ranks_share_the_epoch(store, world, size, drop_last):
    "Disjoint, together the epoch of one process with the joint batch, step by step and in its order."
    ranks = [PairLoader(store, size, seed=2, rank=r, world_size=world, drop_last=drop_last) for r in range(world)]
    one = PairLoader(store, size*world, seed=2, drop_last=drop_last)
    for epoch in range(2):
        parts = list(zip(*map(list, ranks), strict=True))
        for joint, share in zip(one, parts, strict=True):
            assert joint.rows.tolist() == sum((part.rows.tolist() for part in share), [])
            assert {part.step for part in share} == {joint.step}
            assert max(map(len, share)) - min(map(len, share)) <= 1
        if not drop_last: assert sum(len(part) for share in parts for part in share) == 50

def test_a_rest_smaller_than_the_ranks_is_dropped():
    "An empty batch on one rank would block the others; so the rest goes."
    assert steps_an_epoch(17, 4, 4, drop_last=False) == 1 and steps_an_epoch(20, 4, 4, drop_last=False) == 2
    assert [len(step_share(np.arange(20), 1, 4, r, 4)) for r in range(4)] == [1, 1, 1, 1]

@pytest.mark.parametrize('workers_then', [0, 2])
@pytest.mark.parametrize('workers_now', [0, 2])
@pytest.mark.parametrize('stop', [0, 1, 3, 6, 8])
def test_resume_in_the_middle(store, stop, workers_then, workers_now):
    "What was handed out before plus what comes after equals an uninterrupted run over two epochs, whatever was read ahead."
    wanted = [batch for _ in range(3) for batch in (lambda l: (l.set_epoch(_), list(l))[1])(PairLoader(store, 8, seed=6))][:12]
    loader, seen = PairLoader(store, 8, seed=6, workers=workers_then), []
    while len(seen) < stop:
        for batch in loader:
            seen.append(batch)
            if len(seen) == stop: break
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = PairLoader(store, 8, seed=6, workers=workers_now)
    resumed.load_state_dict(state)
    for epoch in range(resumed.epoch, 2):
        resumed.set_epoch(epoch)
        seen += list(resumed)
    assert len(seen) == len(wanted) and all(same(a, b) for a, b in zip(seen, wanted))

def test_an_epoch_starts_again_after_a_break(store):
    loader = PairLoader(store, 8, seed=1)
    assert next(iter(loader)).rows.tolist() == next(iter(loader)).rows.tolist()

def test_resume_with_other_processes_but_the_same_joint_batch(store):
    one = PairLoader(store, 8, seed=6)
    seen = [batch.rows.tolist() for _, batch in zip(range(3), one)]
    ranks = [PairLoader(store, 4, seed=6, rank=r, world_size=2) for r in range(2)]
    for loader in ranks: loader.load_state_dict(one.state_dict())
    rest = [a.rows.tolist() + b.rows.tolist() for a, b in zip(*ranks)]
    assert seen + rest == rows_of(PairLoader(store, 8, seed=6))

def test_state_of_another_order_is_refused(store):
    state = PairLoader(store, 8, seed=6).state_dict()
    for other, what in [(dict(seed=7), 'seed is 6 there and 7 here'), (dict(batch_size=4), 'batch_size x world_size is 8 there and 4'),
                        (dict(shuffle=False), 'shuffle'), (dict(split='train'), 'pairs'), (dict(drop_last=False), 'drop_last')]:
        with pytest.raises(G2DError, match=what): PairLoader(store, **(dict(batch_size=8, seed=6) | other)).load_state_dict(state)
    with pytest.raises(G2DError, match='list of rows'): PairLoader(store, 8, seed=6).load_state_dict(state | dict(rows='abc'))

def test_mistakes_are_one_sentence(store):
    for kwargs, what in [(dict(batch_size=51), '50 pairs with text .3 rows without., fewer than one batch of 51'), (dict(batch_size=0), 'batch_size is 0'),
                         (dict(batch_size=4, rank=2, world_size=2), 'rank is 2 of 2'), (dict(batch_size=4, split='valid'), "no row of split \"valid\"; it has \\['test', 'train'\\]"),
                         (dict(batch_size=20, world_size=3), 'each of 3 processes'), (dict(batch_size=4, text_fn=lambda text: None, drop_last=False), '0 pairs')]:
        with pytest.raises(G2DError, match=what): PairLoader(store, **kwargs)
    assert [len(b) for b in PairLoader(store, 64, drop_last=False)] == [50]

def test_the_order_is_written_down():
    "A change of the order would make every interrupted run continue with other pairs: these numbers must not change."
    assert epoch_order(10, seed=1, epoch=2).tolist() == ORDER
    np.testing.assert_allclose([draw(2, step=3, seed=4)[k][1] for k in ('angle', 'sigma')], DRAWN, rtol=1e-12)

ORDER, DRAWN = [5, 1, 6, 7, 3, 8, 2, 9, 0, 4], [0.7293039400714958, 0.5153667668197586]


# ---------------------------------------------------------------- geometry and intensity against references

def reference_affine(x, angle, shear, mode, scale=1.0, translate=(0.0, 0.0)):
    return TF.affine(x, angle=float(angle), translate=list(map(float, translate)), scale=float(scale), shear=[float(shear), 0.0], interpolation=mode)

def warp(x, matrices, size, mode='bilinear'):
    return F.grid_sample(x, sampling_grid(matrices, x.shape[-2:], size), mode=mode, align_corners=False)

def check_affine(images):
    n, side = len(images), images.shape[-1]
    x, rng = images/255, np.random.default_rng(0)
    angle, shear, scale, shift = rng.uniform(-15, 15, n), rng.uniform(-15, 15, n), rng.uniform(.8, 1.2, n), rng.uniform(-9, 9, (n, 2))
    matrices = affine_matrices(angle, shear, scale, shift, (side, side))
    for mode, ours in [(InterpolationMode.BILINEAR, warp(x, matrices, side)), (InterpolationMode.NEAREST, warp(x, matrices, side, 'nearest'))]:
        theirs = torch.stack([reference_affine(*values) for values in zip(x, angle, shear, [mode]*n, scale, shift)])
        different = (ours - theirs).abs() > 1e-3
        assert different.float().mean() < (1e-3 if mode == InterpolationMode.NEAREST else 1e-5)  # nearest: ties; bilinear: the outermost edge

def check_perspective(images):
    n, side = len(images), images.shape[-1]
    x, corners = images/255, moved_corners(draw(n, step=1), (side, side), 0.5)
    ours = warp(x, perspective_matrices(corners, (side, side)), side)
    start = [[0, 0], [side - 1, 0], [side - 1, side - 1], [0, side - 1]]
    theirs = torch.stack([TF.perspective(xi, start, c.astype(int).tolist(), interpolation=InterpolationMode.BILINEAR) for xi, c in zip(x, corners)])
    assert ((ours - theirs).abs() > 2e-3).float().mean() < 1e-4

def test_affine_equals_torchvision(): check_affine(smooth_images(6))
def test_affine_equals_torchvision_on_real_images(real_images): check_affine(real_images)
def test_perspective_equals_torchvision(): check_perspective(smooth_images(6))
def test_perspective_equals_torchvision_on_real_images(real_images): check_perspective(real_images)

def test_perspective_equals_kornia():
    import kornia
    x, corners = smooth_images(4, 64)/255, moved_corners(draw(4, step=1), (64, 64), 0.5)
    # kornia counts from pixel centres, torchvision (and so we) from the edge: shift by half a pixel
    half = np.array([[1, 0, -.5], [0, 1, -.5], [0, 0, 1.]])
    forward = half @ np.linalg.inv(perspective_matrices(corners, (64, 64))) @ np.linalg.inv(half)
    theirs = kornia.geometry.transform.warp_perspective(x.double(), torch.tensor(forward), (64, 64), align_corners=False)
    edge = F.max_pool2d((theirs == 0).float(), 3, 1, 1) > 0
    assert ((warp(x, perspective_matrices(corners, (64, 64)), 64) - theirs).abs()[~edge] < 2e-3).all()

def test_corners_are_drawn_like_torchvision():
    "Same range for every corner as RandomPerspective, both ends reached."
    from torchvision.transforms.v2 import RandomPerspective
    torch.manual_seed(0)
    ours = moved_corners(draw(3000, step=0), (40, 60), 0.5)
    theirs = np.array([RandomPerspective(p=1).make_params([torch.zeros(1, 40, 60)])['coefficients'] for _ in range(20)])
    assert theirs.shape == (20, 8) and np.isfinite(perspective_matrices(ours, (40, 60))).all()
    assert (ours[:, 0].min(0).tolist(), ours[:, 0].max(0).tolist()) == ([0, 0], [15, 10])
    assert (ours[:, 2].min(0).tolist(), ours[:, 2].max(0).tolist()) == ([60 - 16, 40 - 11], [59, 39])

def check_jitter(images):
    x, u = images/255, draw(len(images), step=2)
    ours = intensity_(x.clone(), RECIPES['as_released'], u)
    for i, image in enumerate(x):
        b, c = _between(u['brightness'], .8, 1.2)[i], _between(u['contrast'], .8, 1.2)[i]
        steps = [partial(TF.adjust_brightness, brightness_factor=b), partial(TF.adjust_contrast, contrast_factor=c)]
        for step in steps[::-1] if u['contrast_first'][i] < 0.5 else steps: image = step(image)
        torch.testing.assert_close(ours[i], image, atol=2e-6, rtol=0)

def test_jitter_equals_torchvision(): check_jitter(smooth_images(12))
def test_jitter_equals_torchvision_on_real_images(real_images): check_jitter(real_images)

def test_autocontrast_equals_torchvision():
    x, u = smooth_images(12)/510 + 0.2, draw(12, step=2)
    x[3] = 0.7
    ours = intensity_(x.clone(), RECIPES['as_paper'], u)
    chosen = u['autocontrast'] < 0.5
    assert 0 < chosen.sum() < 12
    torch.testing.assert_close(ours, torch.stack([TF.autocontrast(image) if yes else image for image, yes in zip(x, chosen)]), atol=1e-6, rtol=0)

def test_gamma_equals_torchvision():
    recipe, x, u = RECIPES['recommended'], smooth_images(6)/255, draw(6, step=2)
    from dataclasses import replace
    ours = intensity_(x.clone(), replace(recipe, brightness=0, contrast=0, blur=0), u)
    gamma = np.exp(_between(u['gamma'], np.log(.8), np.log(1.25)))
    torch.testing.assert_close(ours, torch.stack([TF.adjust_gamma(image, g) for image, g in zip(x, gamma)]), atol=1e-6, rtol=0)
    assert (gamma > .8).all() and (gamma < 1.25).all()

def test_blur_equals_kornia():
    import kornia
    x, sigma = smooth_images(5)/255, np.array([.3, .5, .7, .9, 1.])
    theirs = kornia.filters.gaussian_blur2d(x, (5, 5), torch.tensor(sigma, dtype=torch.float32)[:, None].repeat(1, 2), 'reflect')
    torch.testing.assert_close(gaussian_blur(x, sigma), theirs, atol=1e-6, rtol=0)

def pil_released(image, angle, shear, b, c, contrast_first):
    "The released chain on one PIL image with given parameters, as PRETRAIN/utils/dataset.py: affine (nearest), jitter, [0, 1]."
    image = TF.affine(Image.fromarray(image), angle=angle, translate=[0, 0], scale=1.0, shear=[shear, 0.0], interpolation=InterpolationMode.NEAREST)
    steps = [partial(TF.adjust_brightness, brightness_factor=b), partial(TF.adjust_contrast, contrast_factor=c)]
    for step in steps[::-1] if contrast_first else steps: image = step(image)
    return np.asarray(image)/255

def check_released(images):
    "PIL rounds to whole grey values after each step and counts ties otherwise: 2.5 grey values, 1 % of the pixels may differ."
    n, side, u = len(images), images.shape[-1], draw(len(images), step=5, seed=1)
    ours, _ = Augment('as_released', size=side, seed=1)(images, step=5)
    theirs = np.stack([pil_released(image, *values) for image, *values in zip(images[:, 0].numpy(), _between(u['angle'], -15, 15), _between(u['shear'], -15, 15),
                                                                             _between(u['brightness'], .8, 1.2), _between(u['contrast'], .8, 1.2), u['contrast_first'] < .5)])
    assert (np.abs(ours[:, 0].numpy() - theirs) > 2.5/255).mean() < 0.01

def test_as_released_equals_pil(): check_released(smooth_images(8))
def test_as_released_equals_pil_on_real_images(real_images): check_released(real_images)

def check_tables(images):
    "Whole numbers and tables (uint8) against `grid_sample` and a pass for each operation (float); ties may fall the other way."
    for films in (images, images[..., :70]): # a square; a window in the middle of a tall film
        a, b = (Augment('as_released', films.shape[-1], seed=3)(x, step=2)[0] for x in (films, films/255))
        assert ((a - b).abs() > 1e-5).float().mean() < 1e-3, films.shape

def test_released_tables_equal_pixels(): check_tables(smooth_images(40))
def test_released_tables_equal_pixels_on_real_images(real_images): check_tables(real_images)

def test_released_tables_take_the_mean_of_cut_values():
    "A bright film is cut by brightness before contrast turns about its mean."
    images = smooth_images(24)//4 + 190
    a, b = (Augment('as_released', 128, seed=1)(x, step=2)[0] for x in (images, images/255))
    u = draw(24, 2, 1)
    assert ((_between(u['brightness'], .8, 1.2) > 1.05) & (u['contrast_first'] >= .5)).any()
    assert ((a - b).abs() > 1e-5).float().mean() < 1e-3

def test_as_paper_equals_torchvision_as_a_whole(real_images):
    "Resize (none needed), centre crop 224, perspective, auto-contrast, one image at a time."
    u = draw(8, step=7, seed=3)
    ours, _ = Augment('as_paper', size=224, seed=3)(real_images, step=7)
    corners = moved_corners(u, (224, 224), 0.5)
    start = [[0, 0], [223, 0], [223, 223], [0, 223]]
    for i, image in enumerate(real_images/255):
        image = TF.center_crop(image, [224, 224])
        if u['perspective'][i] < 0.5: image = TF.perspective(image, start, corners[i].astype(int).tolist())
        if u['autocontrast'][i] < 0.5: image = TF.autocontrast(image)
        assert ((ours[i] - image).abs() > 3e-3).float().mean() < 1e-4

@pytest.mark.parametrize('shape', [(300, 300), (256, 256), (320, 280), (128, 160)])
def test_resize_and_crop_equal_torchvision(shape):
    image = F.interpolate(smooth_images(3)/255, shape, mode='bilinear')
    ours, _ = Augment('as_paper', size=112)(image, 0, train=False)
    torch.testing.assert_close(ours, TF.center_crop(TF.resize(image, [128], antialias=True), [112, 112]).clamp(0, 1), atol=1e-5, rtol=0)

def test_stored_size_equal_to_the_output_is_left_alone():
    images = smooth_images(3, 128)
    for name in ('none', *NAMES[:-1]): torch.testing.assert_close(Augment(name, 128)(images, 0, train=False)[0], images/255, atol=1e-6, rtol=0)

def test_mgcas_crop_always_has_a_margin_and_tests_cut_the_centre():
    "128 stored and 112 or 128 wanted: 128 or 146 after resizing; the random crop moves over the whole margin and keeps the scale."
    recipe, u = RECIPES['mgca_cls'], draw(500, step=0)
    assert frame_of((128, 128), 112, recipe, train=False) == ((128, 128), (8, 8, 112, 112)) and frame_of((128, 128), 128, recipe)[0] == (146, 146)
    matrices = geometry(recipe, u, (128, 128), 112)
    np.testing.assert_allclose(matrices[:, 0, 0], 1, atol=1e-9)
    assert matrices[:, 0, 2].min() < 1 and 15 < matrices[:, 0, 2].max() <= 16

def test_mgcas_segmentation_recipe_moves_half_of_the_films():
    matrices = geometry(RECIPES['mgca_seg'], draw(4000, step=0), (128, 128), 128)
    still = np.abs(matrices - np.eye(3)).max((1, 2)) < 1e-9
    assert .47 < still.mean() < .53
    np.testing.assert_allclose((matrices @ [64, 64, 1])[:, :2], 64, atol=1e-9)           # no shift: the centre stays
    scale = np.sqrt(np.linalg.det(matrices[~still][:, :2, :2]))
    assert 1/1.1 - 1e-6 <= scale.min() < .93 and 1.08 < scale.max() <= 1/.9 + 1e-6

def test_a_stored_size_that_happens_to_equal_the_crop_is_still_resized():
    "224 stored and 196 wanted: resize to 224, cut 196; 224 stored and 224 wanted: as it is."
    assert frame_of((224, 224), 196, RECIPES['as_paper']) == ((224, 224), (14, 14, 196, 196))
    assert frame_of((224, 224), 224, RECIPES['as_paper']) == ((224, 224), (0, 0, 224, 224))
    images = smooth_images(2, 90)          # shorter than the output: enlarged to 128, cut to 112
    assert Augment('as_paper', 112)(images, 0)[0].shape == (2, 1, 112, 112)


# ---------------------------------------------------------------- the augmentation as a whole

def disc(size, x, y, r):
    yy, xx = np.mgrid[:size, :size] + 0.5
    return torch.tensor((xx - x)**2 + (yy - y)**2 < r*r)

@pytest.mark.parametrize('stored,size', [(128, 128), (256, 224), (96, 64)])
@pytest.mark.parametrize('name', NAMES)
def test_masks_follow_images(name, stored, size):
    "A bright disc and its mask stay together: IoU of mask and thresholded image."
    rng = np.random.default_rng(0)
    discs = torch.stack([disc(stored, *rng.uniform(.35, .65, 2)*stored, stored*.15) for _ in range(24)])[:, None]
    images, masks = discs.to(torch.uint8)*150 + 40, torch.cat([discs, ~discs], 1)
    for step in range(3):
        out, moved = Augment(name, size, seed=1)(images, step, masks)
        assert moved.dtype == torch.bool and moved.shape == (24, 2, size, size)
        seen = out[:, 0] > (out.flatten(1).median(1)[0] + out.amax((1, 2, 3)))[:, None, None]/2     # half way between background and disc
        inter, union = (seen & moved[:, 0]).sum((1, 2)), (seen | moved[:, 0]).sum((1, 2))
        assert (inter/union).min() > 0.93, (inter/union).min()
    wrong = torch.roll(moved[:, 0], 8, -1)
    assert ((seen & wrong).sum((1, 2))/(seen | wrong).sum((1, 2))).max() < 0.93       # the test would notice

@pytest.mark.parametrize('name', NAMES)
def test_float_masks_and_boxes_follow(name):
    images, mask = smooth_images(16, 128), disc(128, 60, 70, 14)
    augment = Augment(name, 112, seed=2)
    _, moved = augment(images, 4, mask.float().expand(16, 1, 128, 128))
    assert moved.dtype == torch.float32 and 0 <= moved.min() and moved.max() <= 1
    for m, matrix in zip(moved[:, 0] > 0.5, augment.matrices(16, 4, (128, 128))):
        corners = np.array([[60, 70, 1], [60 + 14, 70, 1]]) @ matrix.T           # centre and a point of the rim, as points
        y, x = np.nonzero(m.numpy())
        if min(x.min(), y.min()) > 0 and max(x.max(), y.max()) < 111:
            assert np.abs(corners[0, :2]/corners[0, 2] - [x.mean() + .5, y.mean() + .5]).max() < 2   # a perspective moves the centroid a little
            bx, by, bw, bh = move_boxes([[46, 56, 28, 28]], matrix, 112)[0]
            assert bx <= x.min() + 1.5 and by <= y.min() + 1.5 and bx + bw >= x.max() - .5 and by + bh >= y.max() - .5   # the box holds the disc
            assert bw*bh < 3*np.ptp(x)*np.ptp(y)

def test_boxes_are_exact_without_rotation():
    augment = Augment('none', 112)
    matrix = augment.matrices(1, 0, (256, 256))[0]
    np.testing.assert_allclose(move_boxes([[64, 80, 32, 48], [0, 0, 4, 4], [-50, 0, 20, 256]], matrix, 112), [[24, 32, 16, 24], [0, 0, 0, 0], [0, 0, 0, 112]], atol=1e-9)

@pytest.mark.parametrize('name', NAMES)
def test_nothing_is_mirrored(name):
    "Side words in the text would become false. Orientation is kept at every pixel: det of the derivative > 0, and x still grows to the right."
    matrices = geometry(RECIPES[name], draw(4000, step=0), (128, 128), 128)
    assert (np.linalg.det(matrices) > 0).all()
    places = np.array([[0, 0, 1], [128, 0, 1], [0, 128, 1], [128, 128, 1], [64, 64, 1]]).T
    low = (matrices @ places)[:, 2]
    assert (low > 0).all()                                       # no pixel lies behind the viewer
    left, right, top, bottom = [((matrices @ np.array(p))[:, :2]/(matrices @ np.array(p))[:, 2:]) for p in ([0, 64, 1], [128, 64, 1], [64, 0, 1], [64, 128, 1])]
    assert (right[:, 0] - left[:, 0] > 60).all() and (bottom[:, 1] - top[:, 1] > 60).all()

@pytest.mark.parametrize('name', NAMES)
def test_left_stays_left_in_pixels(name):
    left = torch.zeros(64, 1, 64, 64, dtype=torch.uint8)
    left[..., 24:40, 12:24] = 200
    out, _ = Augment(name, 64, seed=3)(left, 1)
    x = (out*torch.arange(64)).sum((1, 2, 3))/out.sum((1, 2, 3))
    assert (x < 32).all()

@pytest.mark.parametrize('name', ('none', *NAMES))
def test_range_type_and_no_nan(name):
    "Flat black, flat white, flat grey and one bright pixel, as uint8 and as float."
    images = torch.zeros(8, 1, 96, 96, dtype=torch.uint8)
    images[1] = 255; images[2] = 128; images[3, 0, 40, 40] = 255
    images[4:] = smooth_images(4)
    for step in range(4):
        a, b = (Augment(name, 84, seed=1)(x, step)[0] for x in (images, images/255))
        assert a.dtype == b.dtype == torch.float32 and a.shape == (8, 1, 84, 84)
        assert torch.isfinite(a).all() and a.min() >= 0 and a.max() <= 1
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)

@pytest.mark.parametrize('name', NAMES)
def test_repeats_bit_for_bit_and_steps_differ(name):
    images = smooth_images(10)
    before = images.clone()
    first, _ = Augment(name, 84, seed=1)(images, 5)
    torch.manual_seed(99); np.random.seed(99)
    augment = Augment(name, 84, seed=1)
    augment(images, 6)
    assert torch.equal(augment(images, 5)[0], first) and torch.equal(images, before)
    assert not torch.equal(augment(images, 6)[0], first) and not torch.equal(Augment(name, 84, seed=2)(images, 5)[0], first)
    as_float = images/255
    Augment(name, 96)(as_float, 5)
    assert torch.equal(as_float, before/255)                     # the caller's batch is not written to

@pytest.mark.parametrize('name', ('none', *NAMES))
def test_a_single_float_image_is_not_written_to(name):
    "One image is a piece that is not gathered by index; the result must still be a copy."
    image = smooth_images(1)/255*0.8
    before = image.clone()
    for step in range(6): assert Augment(name, 96)(image, step)[0].data_ptr() != image.data_ptr()
    assert torch.equal(image, before)

@pytest.mark.parametrize('name', NAMES)
def test_threads_and_inference_mode_do_not_matter(name):
    images, masks, results = smooth_images(40), torch.ones(40, 1, 96, 96, dtype=torch.bool), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(Augment(name, 84)(images, 5, masks))
        assert torch.get_num_threads() == threads
        with torch.inference_mode(): results.append(Augment(name, 84)(images, 5, masks))
    for out, moved in results[1:]: assert torch.equal(out, results[0][0]) and torch.equal(moved, results[0][1])

@pytest.mark.parametrize('name', NAMES)
def test_ranks_draw_blocks_of_the_joint_batch(name):
    images = smooth_images(24)
    joint, _ = Augment(name, 84, seed=1)(images, 5)
    parts = [Augment(name, 84, seed=1, rank=rank)(images[rank*12:rank*12 + 12], 5)[0] for rank in (0, 1)]
    torch.testing.assert_close(torch.cat(parts), joint, atol=1e-6, rtol=0)
    assert not torch.allclose(parts[0], Augment(name, 84, seed=1, rank=1)(images[:12], 5)[0], atol=1e-3)

def test_draws_fill_their_ranges():
    "Every random thing happens, and about as often as the recipe says."
    u = draw(4000, step=0)
    assert all(abs(v.mean() - .5) < .03 and v.min() < .01 and v.max() > .99 for v in u.values())
    assert len(u) == 26 and np.abs(np.corrcoef(list(u.values())) - np.eye(26)).max() < 0.08

def test_mistakes_in_a_batch_are_one_sentence():
    x, m = smooth_images(2), torch.zeros(2, 1, 96, 96, dtype=torch.bool)
    for call, what in [(lambda: Augment('as_papers'), 'Unknown augmentation "as_papers"; known are'), (lambda: Augment('none', 4), 'at least 8'),
                       (lambda: Augment('none')(x[:, 0], 0), r'expected \[batch, 1'), (lambda: Augment('none')(x.repeat(1, 3, 1, 1), 0), r'\(2, 3, 96, 96\)'),
                       (lambda: Augment('none')(x.float(), 0), r'expected \[0, 1\]'), (lambda: Augment('none')(x.int(), 0), 'expected uint8 or float'),
                       (lambda: Augment('none')(x, 0, m[:1]), 'Masks have shape'), (lambda: Augment('none')(x, 0, m[..., :90]), 'Masks have shape'),
                       (lambda: Augment('none')(x, 0, m.to(torch.uint8)), 'expected bool')]:
        with pytest.raises(G2DError, match=what): call()

def test_float_with_nan_is_refused():
    x = smooth_images(2)/255
    x[0, 0, 3, 3] = float('nan')
    with pytest.raises(G2DError, match='expected'): Augment('none')(x, 0)

def test_loader_and_augmentation_resume_together(store):
    "An interrupted run sees the same pixels: order and draws both depend on numbers only."
    def run(loader, n): return [Augment('recommended', 28, seed=9)(b.images, b.global_step)[0] for b, _ in zip(loader, range(n))]
    whole = run(PairLoader(store, 8, seed=9, workers=2), 6)
    first = PairLoader(store, 8, seed=9, workers=2)
    seen = [Augment('recommended', 28, seed=9)(b.images, b.global_step)[0] for _, b in zip(range(2), first)]
    second = PairLoader(store, 8, seed=9)
    second.load_state_dict(first.state_dict())
    assert all(map(torch.equal, seen + run(second, 6), whole))

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('name', NAMES)
def test_cpu_and_gpu_agree(name):
    images, masks = smooth_images(24, 128), disc(128, 60, 70, 20).expand(24, 1, 128, 128)
    for train in (True, False):
        a, m = Augment(name, 112, seed=1)(images, 3, masks, train)
        b, n = Augment(name, 112, seed=1)(images.cuda(), 3, masks.cuda(), train)
        assert b.is_cuda and ((a - b.cpu()).abs() > 1e-3).float().mean() < (2e-3 if name == 'as_released' else 1e-5)
        assert (m != n.cpu()).float().mean() < 1e-3

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_images_are_pinned(store):
    for workers in (0, 2): assert next(iter(PairLoader(store, 8, workers=workers))).images.is_pinned()
