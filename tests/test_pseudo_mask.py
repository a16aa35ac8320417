"The pseudo-mask against a plain film-by-film reference (scikit-image, numpy, kornia) on real films, phantoms and noise, and its rules for odd input."
import numpy as np, pandas as pd, pytest, torch
from torch.nn import functional as F
import g2d.pseudo_mask as room
from g2d.pseudo_mask import PseudoMask, bilateral_binary, body_mask, fill_enclosed, fit_mixture, gaussian_blur, kept_share, mixture_threshold, otsu_threshold, row_quantile
from g2d.settings import G2DError

@pytest.fixture(autouse=True)
def one_thread(clean_state): torch.set_num_threads(1)     # small tensors; a second thread only waits where the machine is busy


SETS = dict(nih='open_cxr/nih_cxr14', kermany='open_cxr/kermany_cxr', hannover='open_cxr/hannover_covid', covid='noncommercial/covid_ccbyncsa')


def read_set(root, name, limit=None, masks=False):
    "Films [N, 1, 256, 256] in [0, 1] spread over a data set; with `masks` only those with a lung mask, and the masks."
    from PIL import Image
    folder = root/SETS[name]
    table = pd.read_csv(next(folder.glob('*.csv')))
    if masks: table = table[table['mask'].notna()]
    if limit: table = table.iloc[np.linspace(0, len(table) - 1, limit).astype(int)]
    read = lambda file, how: np.asarray(Image.open(folder/file).convert('L').resize((256, 256), how))
    films = torch.from_numpy(np.stack([read(f, Image.BILINEAR) for f in table['image']]))[:, None]/255
    return (films, torch.from_numpy(np.stack([read(f, Image.NEAREST) for f in table['mask']])) > 127) if masks else films


@pytest.fixture(scope='module')
def real_films(data_root):
    "64 real films, 16 of each of four sets."
    return torch.cat([read_set(data_root, name, 16) for name in SETS])


@pytest.fixture(scope='module')
def phantoms():
    from g2d.data.phantom import phantom
    return torch.stack([torch.from_numpy(phantom(seed, 256).image) for seed in range(8)])[:, None]/255


def maps(n, heads=4, cells=8, seed=0):
    return (2*torch.randn(n, heads, cells*cells, generator=torch.manual_seed(seed))).softmax(-1).view(n, heads, cells, cells)


def plain_body(film):
    "The body of one film [256, 256] with loops: the rule of the notebook, written again."
    from skimage.filters import threshold_otsu
    grid = film[2::4, 2::4]
    mean = lambda *boxes: (lambda v: v[v > 0].mean() if (v > 0).any() else None)(np.concatenate([grid[t:b, l:r].ravel() for t, b, l, r in boxes]))
    mediastinum, lungs, middle, corners = mean((16, 48, 28, 35)), mean((16, 48, 12, 23), (16, 48, 40, 51)), mean((16, 48, 16, 48)), mean((0, 10, 0, 6), (0, 10, 57, 64))
    score = mediastinum - lungs + (middle - corners if corners is not None else 0)
    value = np.round(255*grid)
    if score < 0: value = np.where(grid > 0, 255 - value, 0)
    value = value.astype(np.uint8)
    seen = value > threshold_otsu(value[value > 0])//2
    body = np.zeros_like(seen)
    for y in range(64):
        for x in range(64): body[y, x] = seen[y, :x+1].any() and seen[y, x:].any() and seen[:y+1, x].any() and seen[y:, x].any()
    return np.kron(body, np.ones((4, 4), bool))


def plain_steps(attention, film, upsample='bilinear', over='image'):
    "All steps but the smoothing for one film with scikit-image and numpy."
    from skimage.transform import resize
    averaged = sum(attention)/len(attention)
    scores = resize(averaged, film.shape, order=1, mode='edge', anti_aliasing=False) if upsample == 'bilinear' else np.kron(averaged, np.ones((32, 32), np.float32))
    body = plain_body(film)
    masked = np.where(body, scores, 0)
    binary = body & (masked >= np.quantile(masked if over == 'image' else masked[body], .85)) & (masked > 0)
    return dict(averaged=averaged, upsampled=scores, body=body, masked=masked, binary=binary)


def iou(a, b):
    a, b = np.asarray(a) > .5, np.asarray(b) > .5
    return (a & b).sum()/max(1, (a | b).sum())


def compare(films, upsample='bilinear', over='image'):
    attention = maps(len(films), seed=len(films))
    processor = PseudoMask(upsample=upsample, over=over)
    ours, result = processor.steps(attention, films), processor(attention, films)
    for i, (a, f) in enumerate(zip(attention.numpy(), films[:, 0].numpy())):
        plain = plain_steps(a, f, upsample, over)
        for name in ('averaged', 'upsampled', 'masked'): np.testing.assert_allclose(ours[name][i, 0], plain[name], atol=2e-6, err_msg=f'{name} of film {i}')
        for name in ('body', 'binary'): assert iou(ours[name][i, 0], plain[name]) >= .999, f'{name} of film {i}'
    from kornia.filters import bilateral_blur    # of our own binary masks, so that no pixel at the threshold comes between
    torch.set_num_threads(1)                     # its 81 small steps a film suffer from a busy second core
    for binary, smooth in zip(ours['binary'], ours['smooth']):
        np.testing.assert_allclose(smooth[None], bilateral_blur(binary[None], (9, 9), 1., (3., 3.)), atol=1e-5)
    assert torch.equal(result, ours['smooth'])        # the call, which reuses memory and works in pieces, gives the same bits


def test_equals_plain_loop_on_64_real_films(real_films): compare(real_films)

@pytest.mark.parametrize('upsample', ['bilinear', 'nearest'])
@pytest.mark.parametrize('over', ['image', 'body'])
def test_equals_plain_loop_on_phantoms(phantoms, upsample, over): compare(phantoms, upsample, over)

def test_equals_plain_loop_on_noise(): compare(torch.rand(3, 1, 256, 256, generator=torch.manual_seed(5)))


def test_otsu_equals_scikit_image(phantoms):
    from skimage.filters import threshold_otsu
    noise = torch.randint(0, 256, (6, 1, 256, 256), generator=torch.manual_seed(0))//torch.arange(1, 7).view(6, 1, 1, 1)
    for values in ((255*phantoms).round().long(), noise, (noise > 100)*200):
        ours = otsu_threshold(values.flatten(1))
        assert ours.tolist() == [threshold_otsu(v.numpy().astype(np.uint8)) if len(v.unique()) > 1 else 0 for v in values]
    valid = torch.rand(noise.flatten(1).shape) > .5
    assert otsu_threshold(noise.flatten(1), valid).tolist() == [threshold_otsu(v[k].numpy().astype(np.uint8)) for v, k in zip(noise.flatten(1), valid)]


def test_fill_is_a_superset_of_filled_holes():
    from scipy.ndimage import binary_fill_holes
    masks = torch.rand(20, 30, 41, generator=torch.manual_seed(0)) > .6
    filled = fill_enclosed(masks)
    for m, f in zip(masks.numpy(), filled.numpy()): assert (f >= binary_fill_holes(m)).all()
    assert not fill_enclosed(torch.zeros(1, 5, 5, dtype=torch.bool)).any()


@pytest.mark.parametrize('share', [.001, .01, .2, .9])
def test_fill_by_whole_numbers_equals_looking_in_four_directions(share):
    masks = torch.rand(30, 64, 64, generator=torch.manual_seed(1)) < share
    masks[0], masks[1], masks[2, :, [0, 63]] = False, True, True
    seen = torch.stack([masks.flip(d).int().cumsum(d).flip(d) > 0 if back else masks.int().cumsum(d) > 0 for d in (1, 2) for back in (False, True)]).all(0)
    assert (fill_enclosed(masks) == seen).all()
    assert (fill_enclosed(masks[..., :63]) == torch.stack([(m.flip(d).int().cumsum(d).flip(d) if back else m.int().cumsum(d)) > 0
                                                           for m in [masks[..., :63]] for d in (1, 2) for back in (False, True)]).all(0)).all()


@pytest.mark.parametrize('name', ['kermany', 'hannover', 'covid'])
def test_body_keeps_the_lungs(data_root, name):
    films, lungs = read_set(data_root, name, None if name != 'kermany' else 150, masks=True)
    share = kept_share(body_mask(films), lungs)
    print(f'{name}: {share.mean():.4f} of the lung pixels kept on average over {len(films)} films, at least {share.min():.4f}')
    assert share.mean() > .98 and share.min() > .75
    inverted = kept_share(body_mask(1 - films), lungs)
    assert inverted.mean() > .98


def test_body_removes_black_borders_and_air(real_films):
    "Exactly black runs from the border (collimation, padding) are outside; the body covers what is left."
    black = (real_films[:, 0] <= 4/255)
    border = torch.zeros_like(black)
    for dim in (1, 2): border |= black.long().cumprod(dim).bool() | black.flip(dim).long().cumprod(dim).flip(dim).bool()
    body = body_mask(real_films)[:, 0]
    assert (border & ~body).sum()/border.sum() > .98
    assert .6 < body.float().mean() < .98


@pytest.mark.parametrize('invert', [False, True])
@pytest.mark.parametrize('edge', [0, 40])
def test_body_of_inverted_and_collimated_films(phantoms, invert, edge):
    films = 1 - phantoms if invert else phantoms.clone()
    if edge: films[..., :edge, :] = 0; films[..., -edge:] = 0
    body, expected = body_mask(films), body_mask(phantoms)
    for b in body:
        if edge: assert not b[..., :edge-4, :].any() and not b[..., -edge+4:].any()
    inner = (..., slice(edge, None), slice(None, 256 - edge))
    same = (body[inner] == expected[inner]).float().mean((1, 2, 3))
    assert same.mean() > .97, same


@pytest.mark.parametrize('level', [0., .5, 1.])
def test_body_is_never_empty(level):
    film = torch.full((2, 1, 96, 80), level)
    assert body_mask(film).all()
    film[1, 0, 10:60, 10:60] = 1 - level
    assert body_mask(film).flatten(1).any(1).all()


def test_quantile_equals_torch(phantoms):
    rows = torch.rand(5, 1001, generator=torch.manual_seed(0)).round(decimals=2)     # ties
    for q in (.01, .5, .75, .85, .999): torch.testing.assert_close(row_quantile(rows, q), rows.quantile(q, 1), atol=1e-6, rtol=0)
    count = torch.tensor([1001, 700, 500, 2, 1])
    part = [r.sort().values[-n:] for r, n in zip(rows, count)]
    zeroed = torch.stack([r.masked_fill(r.argsort().argsort() < 1001 - n, 0) for r, n in zip(rows, count)])
    for q in (.5, .85): torch.testing.assert_close(row_quantile(zeroed, q, count), torch.stack([p.quantile(q) for p in part]), atol=1e-6, rtol=0)


def test_quantile_of_the_gpu_equals_that_of_the_cpu():
    "The branch for other devices, run here by hand."
    class Elsewhere(torch.Tensor): device = torch.device('meta')
    rows, low = torch.rand(4, 500), torch.tensor([10, 400, 499, 0])
    ordered = rows.sort(1).values
    for ours, at in zip(room._neighbours(rows, low), (low, (low + 1).clamp(max=499))): torch.testing.assert_close(ours, ordered.gather(1, at[:, None])[:, 0])
    for a, b in zip(room._neighbours(rows.as_subclass(Elsewhere), low), room._neighbours(rows, low)): assert torch.equal(torch.Tensor(a), b)


@pytest.mark.parametrize('kernel_size,color,space', [(9, 1., 3.), (5, .5, 1.5), (3, 5., 1.), (15, .3, 4.), (9, .05, 3.)])
def test_bilateral_equals_kornia(kernel_size, color, space):
    from kornia.filters import bilateral_blur
    mask = (torch.rand(2, 3, 61, 74, generator=torch.manual_seed(0)) > .5).float()
    mask[1, :, 10:50, 20:60] = 1
    ours = bilateral_binary(mask, kernel_size, color, space)
    exact = bilateral_blur(mask.flatten(0, 1)[:, None], (kernel_size, kernel_size), color, (space, space))    # kornia compares colours over all channels
    torch.testing.assert_close(ours, exact.view(mask.shape), atol=1e-5, rtol=0)
    assert ours.min() >= 0 and ours.max() <= 1 + 1e-6
    a, b = gaussian_blur(mask, kernel_size, space).flatten(0, 1), room._blur_shifts(mask.flatten(0, 1), kernel_size, space)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_blur_keeps_its_precision_when_matrix_products_may_not():
    mask = (torch.rand(2, 1, 64, 64, generator=torch.manual_seed(0)) > .5).float()
    exact = gaussian_blur(mask, 9, 3.)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        torch.testing.assert_close(gaussian_blur(mask, 9, 3.), exact, atol=1e-5, rtol=0)
    finally: torch.set_float32_matmul_precision(before)


def test_as_released_covers_nine_of_64_cells(phantoms):
    attention, released = maps(300, seed=3), PseudoMask.as_released()
    result = released(attention, torch.rand(300, 1, 64, 64))
    assert (result.mean((1, 2, 3)) == 9/64).all()
    big = released(attention[:8], phantoms)
    for a, ours in zip(attention.numpy(), big[:, 0].numpy()):
        scores = np.kron(a.sum(0)/4, np.ones((32, 32), np.float32))
        np.testing.assert_array_equal(ours, scores > np.quantile(scores, .85))
    tied = maps(1); tied[:] = tied.mean(1, keepdim=True).sort(descending=True).values; tied = tied.view(1, 4, 64); tied[..., :20] = 1
    assert released(tied.view(1, 4, 8, 8), phantoms[:1]).sum() == 0      # 20 cells tie with the tenth: none is above
    assert released(torch.ones(1, 4, 8, 8), phantoms[:1]).sum() == 0


def test_flat_map_keeps_the_body_and_zero_keeps_nothing(phantoms):
    flat, processor = torch.full((8, 4, 8, 8), 1/64), PseudoMask()
    steps = processor.steps(flat, phantoms)
    assert torch.equal(steps['binary'], steps['body'])
    assert processor(torch.zeros(8, 4, 8, 8), phantoms).sum() == 0


@pytest.mark.parametrize('over', ['image', 'body'])
@pytest.mark.parametrize('threshold', ['percentile', 'median', 'mean', 'gmm'])
def test_never_outside_the_body(over, threshold):
    "A small patient on a black film: more than 85 % of all scores are zeroed, so the percentile over the image is 0."
    film = torch.zeros(2, 1, 256, 256)
    film[:, :, 100:160, 100:170] = torch.rand(60, 70, generator=torch.manual_seed(0))*.5 + .4
    steps = PseudoMask(over=over, threshold=threshold).steps(maps(2), film)
    assert 0 < steps['body'].mean() < .15
    assert (steps['binary']*(1 - steps['body'])).sum() == 0 and steps['binary'].sum() > 0


def test_area_and_thresholds(phantoms):
    attention = maps(8)
    steps = {name: PseudoMask(**kw).steps(attention, phantoms) for name, kw in
             dict(image={}, body=dict(over='body'), p75=dict(percentile=.75), median=dict(threshold='median'), mean=dict(threshold='mean'), body_mean=dict(threshold='mean', over='body')).items()}
    body = steps['image']['body'].mean((1, 2, 3))
    # bilinear interpolation is constant in the 16 outermost pixels, so scores tie there and are kept together: up to 256 pixels of a corner
    area = {name: s['binary'].mean((1, 2, 3)) for name, s in steps.items()}
    torch.testing.assert_close(area['image'], torch.full((8,), .15), atol=.005, rtol=0)
    torch.testing.assert_close(area['p75'], torch.full((8,), .25), atol=.005, rtol=0)
    torch.testing.assert_close(area['median'], torch.full((8,), .5), atol=.005, rtol=0)
    torch.testing.assert_close(area['body'], .15*body, atol=.005, rtol=0)
    m = steps['mean']['masked']
    assert torch.equal(steps['mean']['binary'], (m >= m.mean((1, 2, 3), keepdim=True)).float()*(m > 0))
    inside = torch.stack([x[b > 0].mean() for x, b in zip(m, steps['mean']['body'])])
    assert iou(steps['body_mean']['binary'], m >= inside[:, None, None, None]) > .999


def test_mixture_equals_scikit_learn():
    from sklearn.mixture import GaussianMixture
    g = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.cat([a + s*torch.randn(6000, generator=g), b + t*torch.randn(2000, generator=g)]) for a, s, b, t in [(.2, .05, .6, .1), (1., .3, 3., .3), (.1, .02, .3, .05)]]).clamp(min=0)
    ours = mixture_threshold(rows, torch.ones_like(rows, dtype=torch.bool))
    for row, t in zip(rows.numpy(), ours.tolist()):
        scaled = (row - row.min())/(row.max() - row.min())
        model = GaussianMixture(2, random_state=0, tol=1e-6, max_iter=500).fit(scaled[:, None])
        bright = model.predict(scaled[:, None]) == model.means_[:, 0].argmax()
        assert ((row >= t) == (bright & (scaled > model.means_.min()))).mean() > .995
    histogram = torch.stack([torch.histc((r - r.min())/(r.max() - r.min()), 256, 0, 1) for r in rows])
    weight, mean, variance = fit_mixture(histogram, torch.arange(256)[None] < 100)
    torch.testing.assert_close(weight.sum(1), torch.ones(3)); assert (mean[:, 0] < mean[:, 1]).all() and (variance > 0).all()


def test_per_head_is_one_head_at_a_time(phantoms):
    attention = maps(3, heads=3)
    together = PseudoMask(per_head=True)(attention, phantoms[:3])
    assert together.shape == (3, 3, 256, 256)
    for k in range(3): assert torch.equal(together[:, k:k+1], PseudoMask()(attention[:, k:k+1], phantoms[:3]))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(phantoms, dtype):
    attention, images = maps(4).to(dtype), phantoms[:4].to(dtype)
    result = PseudoMask()(attention, images)
    assert result.dtype == torch.float32 and torch.equal(result, PseudoMask()(attention.float(), images.float()))
    with torch.autocast('cpu', dtype=torch.bfloat16): again = PseudoMask()(attention, images)
    assert torch.equal(again, result)


def test_layout_batch_channels_and_size(phantoms):
    attention, processor = maps(8), PseudoMask()
    result = processor(attention, phantoms)
    strided = attention.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), phantoms.repeat(1, 2, 1, 1)[:, ::2].transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    assert torch.equal(processor(*strided), result)
    assert torch.equal(processor(attention, phantoms.expand(-1, 3, -1, -1)), result)
    for i in range(8): assert iou(processor(attention[i:i+1], phantoms[i:i+1]), result[i:i+1]) > .9999
    for size, cells in (((224, 224), 7), ((200, 256), 8), ((128, 128), 8), ((50, 61), 4), ((512, 384), 8)):
        r = processor.steps(maps(2, cells=cells), F.interpolate(phantoms[:2], size))
        assert r['smooth'].shape == (2, 1, *size) and torch.equal(processor(maps(2, cells=cells), F.interpolate(phantoms[:2], size)), r['smooth'])
        assert (r['binary']*(1 - r['body'])).sum() == 0


def test_pieces_give_the_same(phantoms, monkeypatch):
    attention, films = maps(24), phantoms.repeat(3, 1, 1, 1)
    whole = PseudoMask(over='body')(attention, films)
    monkeypatch.setattr(room, '_piece', 5)
    assert iou(PseudoMask(over='body')(attention, films), whole) > .9999


def test_no_state_no_gradient_no_change_of_input(phantoms):
    attention, images = maps(8).requires_grad_(), phantoms.clone().requires_grad_()
    processor = PseudoMask()
    before = attention.detach().clone(), images.detach().clone()
    steps = processor.steps(attention, images)
    assert not any(s.requires_grad for s in steps.values()) and not processor(attention, images).requires_grad
    assert torch.equal(attention.detach(), before[0]) and torch.equal(images.detach(), before[1])
    assert not processor.state_dict() and not list(processor.parameters()) and not list(processor.buffers())
    assert set(steps) == {'averaged', 'upsampled', 'body', 'masked', 'binary', 'smooth'}
    one_head = maps(8, heads=1)
    kept = one_head.clone()
    PseudoMask(per_head=True, upsample='nearest')(one_head, phantoms); assert torch.equal(one_head, kept)


def test_deterministic_for_any_number_of_threads(phantoms):
    attention, results = maps(8), []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(PseudoMask()(attention, phantoms))
    assert torch.equal(results[0], results[2]) and iou(results[0], results[1]) > .9999
    torch.use_deterministic_algorithms(True)
    assert torch.equal(PseudoMask()(attention, phantoms), results[1])


@pytest.mark.parametrize('change,message', [(dict(upsample='cubic'), 'nearest'), (dict(over='lungs'), 'image, body'), (dict(threshold='otsu'), 'percentile'), (dict(percentile=85), 'between 0 and 1'),
                                            (dict(kernel_size=4), 'odd'), (dict(sigma_color=0), 'positive')])
def test_settings_are_checked(change, message):
    with pytest.raises(G2DError, match=message): PseudoMask(**change)


def test_input_is_checked(phantoms):
    processor, attention = PseudoMask(), maps(8)
    for a, i, message in [(attention[0], phantoms, 'expected attention'), (attention[:3], phantoms, '3 attention maps for 8 images'), (attention, phantoms.repeat(1, 2, 1, 1), '2 channels'),
                          (attention, (255*phantoms).byte(), 'floating point'), (attention, 255*phantoms, r'expected \[0, 1\]'), (attention, (phantoms - .5)/.25, 'before any normalisation'),
                          (attention, phantoms*float('nan'), r'expected \[0, 1\]')]:
        with pytest.raises(G2DError, match=message): processor(a, i)
    with pytest.raises(G2DError, match='too large'): PseudoMask(kernel_size=33)(maps(1), torch.rand(1, 1, 16, 16))


@pytest.mark.cuda
@pytest.mark.parametrize('change', [{}, dict(over='body'), dict(upsample='nearest'), dict(threshold='gmm'), dict(per_head=True), dict(upsample='bicubic', threshold='median')])
def test_cuda_equals_cpu(phantoms, change):
    if not torch.cuda.is_available(): pytest.skip('no CUDA device')
    attention, processor = maps(8), PseudoMask(**change)
    here, there = processor.steps(attention, phantoms), processor.steps(attention.cuda(), phantoms.cuda())
    for name in ('averaged', 'upsampled', 'masked'): torch.testing.assert_close(there[name].cpu(), here[name], atol=1e-6, rtol=1e-5)
    for name in ('body', 'binary', 'smooth'): assert iou(there[name].cpu(), here[name]) > .999
    exact = bilateral_binary(there['binary'].cpu())
    torch.testing.assert_close(there['smooth'].cpu(), exact, atol=1e-5, rtol=0)
    torch.use_deterministic_algorithms(True); processor(attention.cuda(), phantoms.cuda())
