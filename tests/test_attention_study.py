"Where attention looks: every measure against loops, edge cases, epochs of a run, correlation of masks and gains, and the experiment notebook."
import copy
import numpy as np, pandas as pd, pytest, torch
from scipy import stats
from g2d.data.phantom import make_phantom_store
from g2d.metrics import mask_agreement, pointing_game
from g2d.models.comparators import build_model, comparator
from g2d.notebooks import find_notebook, run_notebook
from g2d.pretrain import pretrain
from g2d.pseudo_mask import body_mask, PseudoMask
from g2d.settings import G2DError
from g2d.tasks import attention as A
from g2d.tasks.grounding import _crop, top_share
from g2d.tasks.training import films, patient_interval
from g2d.validation import truth_masks, with_report_texts

TINY = dict(image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=[32, 16, 16, 8])


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return make_phantom_store(tmp_path_factory.mktemp('phantoms')/'store', 40, size=64, seed=5, split=dict(train=.4, val=.2, test=.4))


@pytest.fixture(scope='module')
def net(store):
    "Random attention is a constant; statistics of the films, no positions and sharper keys make maps differ between films."
    torch.manual_seed(1)
    net = build_model(comparator('g2d', **TINY)).train()
    with torch.no_grad():
        for _ in range(25): net.encode_image(films(store, range(32))/255)
        net.pool.k_proj.weight *= 3; net.pool.q_proj.weight *= 3; net.pool.positions.zero_()
    return net.eval()


@pytest.fixture(scope='module')
def result(store, net): return A.evaluate(store, net, draws=60)


def loops(maps, truth, body, masks):
    "Every measure of `map_measures`, pixel by pixel."
    found = {k: [] for k in ('pointing', 'energy_inside', 'energy_outside_body', 'entropy', 'iou')}
    for m, t, b, k in zip(maps, truth, body, masks):
        size, total, inside, outside, hits, best, both, either, entropy = m.size, 0., 0., 0., 0, 0, 0, 0, 0.
        for v, in_t, in_b, in_k in zip(m.ravel(), t.ravel(), b.ravel(), k.ravel()):
            e = max(v, 0.); total += e; inside += e*in_t; outside += e*(not in_b)
            best += v == m.max(); hits += v == m.max() and in_t
            both += in_t and in_k; either += in_t or in_k
        for v in m.ravel():
            if total and v > 0: entropy -= v/total*np.log(v/total)/np.log(size)
        sick, some = t.any(), total > 0
        for name, v in dict(pointing=hits/best if sick else np.nan, energy_inside=inside/total if sick and some else np.nan, energy_outside_body=outside/total if some else np.nan,
                            entropy=entropy if some else np.nan, iou=both/max(either, 1) if sick else np.nan).items(): found[name].append(v)
    return found


def test_measures_against_loops():
    rng = np.random.default_rng(0)
    maps, truth, body, masks = rng.normal(size=(6, 9, 9)), rng.random((6, 9, 9)) < .2, rng.random((6, 9, 9)) < .7, rng.random((6, 9, 9)) < .3
    truth[0] = False; maps[1] = 0; maps[2] = 4; maps[3] = -1; maps[4].flat[[3, 70]] = 9; masks[5] = False
    found = A.map_measures(maps, truth, body, masks)
    for name, expected in loops(maps, truth, body, masks).items(): np.testing.assert_allclose(found[name], expected, atol=1e-12, err_msg=name)
    assert np.isnan(found['pointing'][0]) and found['entropy'][2] == pytest.approx(1) and found['pointing'][2] == pytest.approx(truth[2].mean()) and np.isnan(found['entropy'][3])


def test_cells_of_the_maximum():
    cells = np.zeros((5, 3, 3)); cells[0, 1, 1] = cells[1, 1, 1] = cells[2, 0, 2] = 1; cells[3] = 7          # a flat one counts as the first cell, an empty one not at all
    distinct, share, has, counts = A.commonest_cell(cells)
    assert (distinct, share) == (3, .5) and has[:4].tolist() == [1, 1, 0, 0] and np.isnan(has[4]) and counts[1, 1] == 2 and counts.sum() == 4
    rng = np.random.default_rng(3)
    drawn = [np.bincount(rng.integers(0, 9, 20), minlength=9) for _ in range(4000)]
    assert A.cells_by_chance(20, 9) == pytest.approx((np.mean([(c > 0).sum() for c in drawn]), np.mean([c.max()/20 for c in drawn])), abs=.05)


def test_agreement_against_loops():
    rng = np.random.default_rng(1)
    masks, patients = rng.random((7, 10, 10)) < rng.random((7, 1, 1)), ['a', 'a', 'b', 'c', 'd', 'e', 'f']
    masks[5:] = False                                                                                         # two empty ones are no pair
    ious, chances = {}, []
    for i in range(7):
        for j in range(7):
            union = (masks[i] | masks[j]).sum()
            if patients[i] != patients[j] and union:
                ious[i, j], (a, b) = (masks[i] & masks[j]).sum()/union, (masks[i].mean(), masks[j].mean())
                chances.append(a*b/(a + b - a*b))
    value, low, high, chance = A.pair_agreement(masks, patients, 400)
    assert value == pytest.approx(np.mean(list(ious.values()))) and chance == pytest.approx(np.mean(chances))
    def of(rows):
        pairs = [ious[i, j] for i in rows for j in rows if (i, j) in ious]
        return np.mean(pairs) if pairs else np.nan
    assert (low, high) == pytest.approx(patient_interval(patients, of, 400), abs=1e-9)
    assert A.pair_agreement(masks, range(7), 0)[0] == pytest.approx(mask_agreement(masks))
    assert np.isnan(A.pair_agreement(masks[:1], ['a'], 10)).all() and np.isnan(A.pair_agreement(masks, ['a']*7, 10)).all()


def test_partners_and_blocks():
    assert A.partners(['a', 'a', 'b', 'c']).tolist() == [2, 2, 3, 0] and A.partners(['a', 'a']) is None and A.partners(['a']) is None
    cells = torch.arange(12.).view(1, 1, 3, 4)
    assert np.array_equal(A.blocks(cells.numpy(), 17), torch.nn.functional.interpolate(cells, (17, 17), mode='nearest').numpy())


def by_hand(store, net):
    "Images, cells, truth, body of the test films, one at a time."
    view = with_report_texts(store.select('test'), net.profile)
    out = []
    for i in range(len(view)):
        images, truth = _crop(net.profile)(films(view, [i]), step=0, masks=torch.from_numpy(truth_masks(view, [i]))[:, None], train=False)
        with torch.no_grad():
            _, patches, attention = net.encode_image(images)
            report = torch.nn.functional.cosine_similarity(patches, net.encode_text([view.index['text'].iloc[i]])[:, :, None, None], dim=1)
        out.append((images, torch.cat([attention.mean(1, keepdim=True), attention, report[:, None]], 1), truth[:, 0].numpy(), body_mask(images)[:, 0].numpy()))
    return view, out


def test_study_against_one_film_at_a_time(store, net, result):
    view, hand = by_hand(store, net)
    patients, m = view.index['patient_id'].tolist(), result.metrics
    other = A.partners(patients)
    maps = lambda kind, k: [dict(own=hand[i][1], other=hand[other[i]][1], mean=torch.stack([hand[j][1] for j in range(len(hand)) if j != i]).mean(0))[kind][:, k:k+1] for i in range(len(hand))]
    processor = PseudoMask(.85, 'bilinear', kernel_size=5, sigma_space=1.5, over=net.profile.over)
    n = hand[0][1].shape[1]
    for name, kind, k in (('attention', 'own', 0), ('attention head 2', 'own', 2), ('report', 'own', n - 1), ('attention', 'other', 0), ('attention', 'mean', 0)):
        tail = dict(own='', other=', another film', mean=', mean of the others')[kind]
        chosen, per_step = maps(kind, k), {}
        for (images, _, truth, body), cells in zip(hand, chosen):
            steps = processor.steps(cells.clamp(min=0), images)
            pictures = dict(cells=A.blocks(cells.numpy(), 64)[:, 0]) | ({} if 'head' in name else {s: steps[s][:, 0].numpy() for s in ('upsampled', 'masked', 'binary', 'smooth')})
            for step, picture in pictures.items():
                mask = picture > .5 if step in ('binary', 'smooth') else top_share(picture)
                scores = A.map_measures(picture, truth, body, mask)
                if step == 'cells': scores['entropy'] = A.map_entropy(cells[:, 0].numpy())
                for metric, v in scores.items(): per_step.setdefault((metric, step), []).append(v[0])
                if kind == 'own': per_step.setdefault(('agreement', step), []).append(mask[0])
        for (metric, step), v in per_step.items():
            value = A.pair_agreement(np.stack(v), patients, 0)[0] if metric == 'agreement' else np.nanmean(v)
            assert m[f'{metric}, {name}, {step}{tail}'] == pytest.approx(value, abs=2e-3 if metric in ('iou', 'agreement') or step in ('binary', 'smooth') else 1e-4), (metric, name, step, tail)
    low, high = result.intervals['pointing, attention, cells']
    assert (low, high) == pytest.approx(patient_interval(patients, result.predictions['pointing, attention, cells'], 60), abs=1e-9)


def test_chance_values_and_shape_of_the_table(result):
    looks, m, tidy = result.curves['looks'], result.metrics, result.curves['tidy']
    sick = looks.truth.any((1, 2))
    assert 0 < sick.sum() < len(sick)                                                                         # films without a finding are among them
    assert m['energy_inside, uniform, cells'] == pytest.approx(looks.truth[sick].mean()) and m['entropy, uniform, cells'] == pytest.approx(1)
    assert m['energy_inside, truth, cells'] > m['energy_inside, uniform, cells'] and np.isnan(m['iou, uniform, cells'])
    assert m['energy_outside_body, attention, masked'] == 0 and m['distinct_cells, attention, cells'] > 1
    assert list(tidy.columns) == ['map', 'head', 'shown', 'step', 'metric', 'value', 'low', 'high', 'films'] and len(m) == len(tidy)
    assert {'attention', 'report', 'sentence', 'attention, one finding', 'prediction', 'uniform', 'truth'} <= set(tidy['map'])
    assert tidy.query('metric == "pointing" and map == "attention"')['films'].eq(sick.sum()).all() and tidy.query('metric == "entropy" and map == "attention"')['films'].eq(len(sick)).all()
    ok = tidy.dropna(subset=['low'])
    assert ((ok['low'] <= ok['value'] + 1e-9) & (ok['value'] <= ok['high'] + 1e-9)).all()


def test_sentences_and_prediction(store, net, result):
    "The map of a sentence against the outline of its own finding, and the decoder's mask."
    from g2d.tasks.grounding import queries
    view, hand = by_hand(store, net)
    hits, asked = [], queries(view)
    for q in asked:
        with torch.no_grad(): patches, words = net.encode_image(hand[q.row][0])[1], net.encode_text(list(q.words))
        cosine = torch.nn.functional.cosine_similarity(patches, words[:, :, None, None], dim=1).numpy()
        hits.append(pointing_game(A.blocks(cosine, 64), q.truth(view.size)[None])[0])
    assert result.metrics['pointing, sentence, cells'] == pytest.approx(np.mean(hits), abs=1e-6) and result.about['sentences'] == len(asked)
    mask = np.concatenate([net.predict_mask(images)[:, 0].numpy() > .5 for images, *_ in hand])
    truth = np.concatenate([t for _, _, t, _ in hand])
    sick = truth.any((1, 2))
    assert result.metrics['iou, prediction, binary'] == pytest.approx(((mask & truth).sum((1, 2))/(mask | truth).sum((1, 2)))[sick].mean(), abs=1e-6)
    plain = A.evaluate(store, build_model(comparator('global_only', **TINY)).eval(), limit=6, draws=0)
    assert not any('prediction' in k for k in plain.metrics) and plain.about['test_films'] == 6 and np.isnan(plain.intervals['pointing, attention, cells']).all()


def test_a_map_that_is_the_truth_and_one_that_never_changes(store, net, monkeypatch):
    look = A.look
    def told(kind):
        def changed(*args, **options):
            looks, said, predicted = look(*args, **options)
            pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(looks.truth).float()[:, None], looks.cells.shape[-2:]).numpy()
            looks.cells = np.repeat(pooled, looks.cells.shape[1], 1) if kind == 'truth' else np.broadcast_to(looks.cells[:1], looks.cells.shape).copy()
            return looks, said, predicted
        return changed
    monkeypatch.setattr(A, 'look', told('truth'))
    m = A.evaluate(store, net, draws=0).metrics
    for metric in ('pointing', 'energy_inside', 'iou', 'agreement', 'distinct_cells'): assert m[f'{metric}, attention, cells'] == m[f'{metric}, truth, cells']
    assert m['energy_inside, attention, cells'] > m['energy_inside, attention, cells, another film']
    monkeypatch.setattr(A, 'look', told('constant'))
    m = A.evaluate(store, net, draws=0).metrics
    assert m['agreement, attention, cells'] == m['commonest_cell, attention, cells'] == m['distinct_cells, attention, cells'] == 1
    for metric in ('pointing', 'iou'): assert m[f'{metric}, attention, cells'] == m[f'{metric}, attention, cells, another film'] == pytest.approx(m[f'{metric}, attention, cells, mean of the others'])


def test_one_film_and_bad_input(store, net):
    test = store.select('test')
    one = test.select(where=np.arange(len(test)) == int(truth_masks(test).any((1, 2)).argmax())) # no film in train or val either
    m = A.evaluate(one, net, draws=20).metrics
    assert m['pointing, attention, cells'] == m['pointing, attention, cells'] and not any('another film' in k for k in m) and m['commonest_cell, attention, cells'] == 1
    assert np.isnan(m['agreement, attention, cells'])
    with pytest.raises(G2DError, match='both a text and an outlined finding'): A.evaluate(store.select(where=~truth_masks(store).any((1, 2))), net)


def test_over_training(store, tmp_path):
    p = comparator('g2d', **TINY, epochs=2, batch_size=8, global_only_steps=0, precision='fp32')
    checkpoint = pretrain(store, p, tmp_path, device='cpu', progress=False, keep_epochs=True, val_images=4)
    course = A.over_training(store, tmp_path, limit=6, draws=0)
    assert sorted(course['epoch'].unique()) == [0, 1, 2]
    last, start = A.evaluate(store, checkpoint, limit=6, draws=0).metrics, A.evaluate(store, 'untrained', p.seed, 6, draws=0, profile=p).metrics
    for epoch, m in ((2, last), (0, start)):
        rows = course[course['epoch'] == epoch]
        assert {A.metric_name(r): r['value'] for r in rows.to_dict('records')} == pytest.approx(m, nan_ok=True)
    assert last != start
    figure = A.measures_figure(course[course['step'] == 'cells'], 'epoch')
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ['0', '1', '2']
    with pytest.raises(G2DError, match='keep_epochs=True'): A.over_training(store, tmp_path/'nothing')
    leaky = copy.copy(store)
    leaky.index = store.index.assign(split=store.index['split'].replace({'train': 'test', 'test': 'train'}))
    with pytest.raises(G2DError, match='pre-training'): A.evaluate(leaky, checkpoint)


def test_figures(result):
    figure = A.attention_figure(result, 3)
    assert len(figure.axes) == 3*5 and 'mean map' in figure.axes[0].get_title()
    assert len(A.measures_figure(result.curves['tidy']).axes) == len(A.MEASURES)


def test_masks_and_gains():
    rng = np.random.default_rng(2)
    frame = pd.DataFrame(dict(method=np.repeat(list('abcde'), 3), seed=[0, 1, 2]*5, quality=rng.random(15), gain=rng.random(15)))
    found = A.mask_quality_vs_gain(frame, draws=100).set_index(['of', 'statistic'])
    means = frame.groupby('method')[['quality', 'gain']].mean()
    assert found.loc[('runs', 'spearman'), 'value'] == pytest.approx(stats.spearmanr(frame.quality, frame.gain)[0]) and found.loc[('runs', 'pearson'), 'value'] == pytest.approx(stats.pearsonr(frame.quality, frame.gain)[0])
    assert found.loc[('means of methods', 'pearson'), 'value'] == pytest.approx(stats.pearsonr(means.quality, means.gain)[0])
    within = [(q - frame.quality[frame.method == m].mean(), g - frame.gain[frame.method == m].mean()) for m, q, g in zip(frame.method, frame.quality, frame.gain)]
    assert found.loc[('within methods', 'pearson'), 'value'] == pytest.approx(stats.pearsonr(*zip(*within))[0])
    drawn, names = [], sorted(set(frame.method))
    draws = np.random.default_rng(0)
    for _ in range(100):
        rows = np.concatenate([np.flatnonzero(frame.method == names[k]) for k in draws.integers(0, 5, 5)])
        drawn.append(stats.pearsonr(frame.quality.iloc[rows], frame.gain.iloc[rows])[0])
    assert tuple(found.loc[('runs', 'pearson'), ['low', 'high']]) == pytest.approx(tuple(np.quantile(drawn, [.025, .975])))
    flat = A.mask_quality_vs_gain(frame.assign(gain=1.), draws=20)
    assert flat['value'].isna().all()
    for bad, words in ((frame.drop(columns='gain'), 'no column gain'), (frame[:2], 'at least three runs'), (frame.assign(seed=0), 'more than one row')):
        with pytest.raises(G2DError, match=words): A.mask_quality_vs_gain(bad)


def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    run_notebook(find_notebook('attention'), dict(size=64, limit=6, draws=20), tmp_path)
    folder = next(tmp_path.glob('attention/*/done.json')).parent
    from g2d.results import collect
    table = collect(tmp_path)
    assert table['task'].eq('attention').all() and table['method'].str.endswith('cells, untrained').all() and {'pointing, attention, cells', 'agreement, attention head 1, cells', 'iou, prediction, binary'} <= set(table['metric'])
    assert table.duplicated(['method', 'metric']).sum() == 0 and (folder/'figures'/'steps.png').exists() and (folder/'figures'/'attention.png').exists()
