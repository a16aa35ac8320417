"Zero-shot grounding: maps against the model's own, scores against scikit-learn and brute force, queries, baselines, thresholds, and one sentence for what cannot be asked."
import json
import numpy as np
import pytest
import torch
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import make_phantom_store
from g2d.data.store import RadiographStore, StoreWriter
from g2d.metrics import pointing_baselines
from g2d.models.g2d import G2D
from g2d.profiles import profile
from g2d.settings import G2DError
from g2d.tasks import grounding
from g2d.tasks.grounding import (SHARES, _bodies, _crop, _truths, best_cut, contrast_to_noise, embed_words, enlarge_maps, evaluate, grounding_maps, grounding_table, heat_figure, iou_over_cuts,
                                 map_scores, patch_similarity, queries, score_maps, sweep_figure, top_share, unit_range)
from g2d.tasks.protocols import protocol

SMALL = profile('demo', image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=[32, 16, 16, 8])
DEMO = protocol('grounding', 'demo')


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('ground')/'store', 60, size=64, seed=6)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return G2D(SMALL).eval()


# ---------------------------------------------------------------- scores

def some(seed=0, n=6, size=20, density=.2):
    rng = np.random.default_rng(seed)
    truth = rng.random((n, size, size)) < density
    truth[:, 3, 4] = True; truth[:, 9, 9] = False
    return rng.normal(size=(n, size, size)), truth


@pytest.mark.parametrize('seed', range(4))
def test_cnr_and_miou_by_brute_force_and_scikit_learn(seed):
    from sklearn.metrics import jaccard_score
    maps, truth = some(seed)
    found = map_scores(maps, truth)
    for i in range(len(maps)):
        inside, outside = torch.tensor(maps[i][truth[i]]), torch.tensor(maps[i][~truth[i]])
        signed = (inside.mean() - outside.mean())/torch.sqrt(inside.var(correction=0) + outside.var(correction=0))
        assert found['cnr_signed'][i] == pytest.approx(float(signed), abs=1e-9) and found['cnr'][i] == abs(found['cnr_signed'][i])
        unit = (maps[i] - maps[i].min())/(maps[i].max() - maps[i].min())
        for name, m in (('miou', unit), ('miou_signed', 2*unit - 1), ('miou_raw', maps[i])):
            assert found[name][i] == pytest.approx(np.mean([jaccard_score(truth[i].ravel(), (m > c).ravel()) for c in (.1, .2, .3, .4, .5)]), abs=1e-9)
        assert found['pointing'][i] == truth[i].ravel()[maps[i].argmax()]


def test_edge_cases():
    maps = np.zeros((5, 8, 8)); truth = np.zeros((5, 8, 8), bool)
    truth[0, 2, 3] = True; maps[0, 2, 3] = 1                        # one pixel, hit
    truth[1] = True; maps[1, 0, 0] = 1                              # everything is true
    maps[2, 0, 0] = 1                                               # nothing is true
    truth[3, :2] = True                                             # a flat map: ties
    truth[4, 0, :2] = True; maps[4, 0, 1:3] = 1                     # two equal maxima, one of them inside
    found = map_scores(maps, truth)
    assert found['pointing'][[0, 1, 3, 4]].tolist() == [1, 1, .25, .5] and np.isnan(found['pointing'][2])
    assert np.isinf(found['cnr_signed'][0]) and np.isnan(found['cnr_signed'][[1, 2]]).all() and found['cnr_signed'][3] == 0
    assert found['miou'][0] == 1 and np.isnan(found['miou'][2]) and found['miou'][3] == 0
    assert not top_share(maps[3:4]).any() and top_share(maps[4:5], .1)[0].sum() == 2


def test_map_of_the_truth_wins_and_a_negative_one_loses():
    _, truth = some()
    good, bad = (map_scores(sign*truth + np.random.default_rng(1).normal(0, .05, truth.shape), truth) for sign in (1, -1))
    assert good['pointing'].mean() == 1 and bad['pointing'].mean() == 0 and (good['cnr_signed'] > 5).all() and (bad['cnr_signed'] < -5).all() and (bad['cnr'] > 5).all()


def test_thresholds():
    maps, truth = some(3)
    maps = maps + 2*truth
    cut = best_cut(maps, truth)
    dice = lambda c: np.mean([2*((m > c) & t).sum()/max((m > c).sum() + t.sum(), 1) for m, t in zip(maps, truth)])
    assert dice(cut) >= max(dice(c) for c in np.linspace(maps.min(), maps.max(), 60)) - .01
    scores, at, why, sweep = score_maps(maps, truth, 'validation', lambda: (maps[:3], truth[:3]))
    assert at == best_cut(maps[:3], truth[:3]) and why == 'validation' and set(sweep) == set(SHARES)
    assert score_maps(maps, truth, 'test')[1] == cut and 'optimistic' in score_maps(maps, truth, 'test')[2] and score_maps(maps, truth, .5)[1] == .5
    top = score_maps(maps, truth, 'top15')
    assert top[1] != top[1] and np.allclose(top_share(maps).mean((1, 2)), .15, atol=.01) and top[0]['dice'].mean() == pytest.approx(sweep[.15])
    with pytest.raises(G2DError, match='threshold "best" is not known'): score_maps(maps, truth, 'best')


def test_unit_range_and_cuts_of_a_flat_map():
    maps, truth = some()
    u = unit_range(maps, -1.)
    assert np.allclose(u.min((1, 2)), -1) and np.allclose(u.max((1, 2)), 1) and (unit_range(np.full((1, 4, 4), 3.)) == 0).all()
    assert iou_over_cuts(np.ones((1, 20, 20)), truth[:1])[0] == pytest.approx(truth[0].mean())


# ---------------------------------------------------------------- maps

def test_maps_equal_the_models_own(store, model):
    "Bilinear and not blurred, patches are `G2D.similarity_map`, that is value and output projection of each cell; attention is the mean over heads."
    from g2d.tasks.training import films
    asked = queries(store)[:7]
    crop = _crop(SMALL)
    images = torch.cat([crop(films(store, [q.row]), step=0, train=False)[0] for q in asked])
    own = model.similarity_map(images, [q.words[0] for q in asked]).numpy()
    np.testing.assert_allclose(grounding_maps(model, store, asked, batch_size=2), own, atol=1e-5)
    with torch.no_grad(): _, patches, attention = model.encode_image(images)
    words = embed_words(model, asked)
    i, y, x = 3, 1, 2
    with torch.no_grad(): x_cell = model.image_projector(model.image_encoder(images)[-1])
    u = model.pool.tokens(x_cell)[i, 1 + y*patches.shape[-1] + x]
    by_hand = model.pool.last(model.pool.out_proj(model.pool.v_proj(u)))
    cosine = torch.nn.functional.cosine_similarity(by_hand.detach(), words[i], dim=0)
    assert float(patch_similarity(patches, words)[i, y, x]) == pytest.approx(float(cosine), abs=1e-5)
    np.testing.assert_allclose(grounding_maps(model, store, asked, 'attention', enlarge='nearest'), enlarge_maps(attention.mean(1), 64, how='nearest').numpy(), atol=1e-6)


def test_blur_and_enlarging():
    from scipy.ndimage import gaussian_filter
    cells = torch.rand(2, 5, 5)
    np.testing.assert_allclose(enlarge_maps(cells, 5, blur=1.5)[1], gaussian_filter(cells[1].numpy(), 1.5), atol=1e-6)
    assert torch.equal(enlarge_maps(cells, 20, how='nearest'), cells.repeat_interleave(4, 1).repeat_interleave(4, 2))
    with pytest.raises(G2DError, match='nearest or bilinear'): enlarge_maps(cells, 20, how='bicubic')


def test_several_texts_are_averaged(store, model):
    a, b, both = (embed_words(model, queries(store, {'nodule': words})[:1])[0] for words in ('nodule', 'a round opacity', ['nodule', 'a round opacity']))
    torch.testing.assert_close(both, torch.nn.functional.normalize(a + b, dim=0))


# ---------------------------------------------------------------- queries

def make(path, rows, size=32):
    "A store from (boxes, masks, prompts, labels); boxes are (label, x)."
    with StoreWriter(path, size=size) as writer:
        for i, (boxes, masks, prompts, labels) in enumerate(rows):
            outline = {l: np.pad(np.ones((4, 4), bool), ((2, size - 6), (x, size - 4 - x))) for l, x in masks or []}
            writer.add(np.random.default_rng(i).integers(20, 230, (size, size)).astype(np.uint8), image_id=str(i), patient_id=str(i), split=['train', 'val', 'test'][i % 3], labels=labels,
                       boxes=[dict(label=l, x=float(x), y=2., w=6., h=6.) for l, x in boxes] if boxes is not None else None, masks=outline or None, extra=dict(prompts=prompts) if prompts else None)
    return RadiographStore.open(path)


def test_queries_by_hand(tmp_path):
    s = make(tmp_path/'s', [([('Edema', 1), ('Edema', 20)], None, ['Oedema on both sides.']*2, ['Edema']),   # two boxes, one sentence
                            ([('Mass', 3), ('Nodule', 12)], [('Mass', 3)], ['A mass.', 'A nodule.'], ['Mass', 'Nodule']),
                            ([('Left Lung', 3)], None, ['The left lung.'], []), ([], None, None, []), (None, None, None, ['Mass'])])
    asked = queries(s)
    assert [(q.row, q.words, q.label) for q in asked] == [(0, ('Oedema on both sides.',), 'Edema'), (1, ('A mass.',), 'Mass'), (1, ('A nodule.',), 'Nodule')]
    assert [int(q.truth(s.size).sum()) for q in asked] == [72, 16, 36]                       # joined boxes; the mask inside its box; the box
    assert [int(q.truth(s.size).sum()) for q in queries(s, boxes=True)] == [72, 36, 36]
    by_label = queries(s, 'labels', ['{}', 'there is {}'])
    assert [(q.row, q.words, int(q.truth(s.size).sum())) for q in by_label] == [(0, ('edema', 'there is edema'), 72), (1, ('mass', 'there is mass'), 16), (1, ('nodule', 'there is nodule'), 36)]
    known = [(q.row, bool(q.bits.any())) for q in queries(s, {'Mass': 'a mass'}, positives_only=False)]
    assert known == [(0, False), (1, True), (2, False), (3, False)]                          # row 4 is ill but not outlined: unknown
    assert queries(s.select(where=[False, False, False, True, True])) == []


# ---------------------------------------------------------------- the test as a whole

def test_baselines_equal_those_of_the_validation_and_the_model_is_scored_alike(store, model):
    result = evaluate(store, model, DEMO)
    test, train, crop = store.select('test'), store.select('train'), _crop(SMALL)
    asked = queries(test)
    expected = pointing_baselines(_truths(test, asked, crop), _bodies(test, asked, crop, 'cpu'), _truths(train, queries(train), crop))
    for ours, theirs in {'random point in the body': 'random point in the body', 'centre': 'centre point', 'average mask': 'average training mask'}.items():
        assert result.metrics[f'{ours}: pointing'] == pytest.approx(expected[theirs], abs=1e-6)
    maps, truth = grounding_maps(model, test, asked), _truths(test, asked, crop)
    for name, values in map_scores(maps, truth).items(): assert result.metrics[name] == pytest.approx(np.nanmean(values[~np.isinf(values)]), abs=1e-6)
    val = store.select('val')
    assert result.about['thresholds']['model']['cut'] == pytest.approx(best_cut(grounding_maps(model, val, queries(val)), _truths(val, queries(val), crop)), abs=1e-6)
    assert len(result.predictions) == result.about['queries'] == len(asked) and result.predictions['dice'].mean() == pytest.approx(result.metrics['dice'])
    assert result.intervals['dice'][0] <= result.metrics['dice'] <= result.intervals['dice'][1] and 'average mask of the label: iou' in result.metrics
    again = evaluate(store, model, DEMO)
    assert all(a == b or a != a for a, b in zip(result.metrics.values(), again.metrics.values()))


def test_a_model_that_knows_the_truth_is_perfect(store, model, monkeypatch, tmp_path):
    "What evaluate reports follows the maps: the truth as a map gives 1, the truths of other films do not."
    crop = _crop(SMALL)
    monkeypatch.setattr(grounding, 'grounding_maps', lambda model, view, asked, *more: _truths(view, asked, crop).astype(np.float32))
    perfect = evaluate(store, model, DEMO, baselines=False)
    assert perfect.metrics['pointing'] == perfect.metrics['dice'] == perfect.metrics['iou'] == perfect.metrics['miou'] == 1
    monkeypatch.setattr(grounding, 'grounding_maps', lambda model, view, asked, *more: np.roll(_truths(view, asked, crop), 5, 0).astype(np.float32))
    shuffled = evaluate(store, model, DEMO, baselines=False)
    assert shuffled.metrics['pointing'] < .5 and shuffled.metrics['dice'] < .5
    heat_figure(perfect).savefig(tmp_path/'a.png'); sweep_figure(shuffled).savefig(tmp_path/'b.png'); perfect.save(tmp_path/'r')
    assert json.loads((tmp_path/'r'/'result.json').read_text())['metrics']['dice'] == 1 and grounding_table(perfect).shape == (1, 6)


def test_words_matter(store, model):
    "Other words, other map; attention is the same for all words."
    one, two = queries(store, {'nodule': 'a nodule in the left lung'})[:3], queries(store, {'nodule': 'no pleural effusion'})[:3]
    assert np.abs(grounding_maps(model, store, one) - grounding_maps(model, store, two)).max() > 1e-5 # an untrained text encoder tells them apart only just
    np.testing.assert_array_equal(grounding_maps(model, store, one, 'attention'), grounding_maps(model, store, two, 'attention'))


def test_protocols(store, model):
    medklip = evaluate(store, model, 'as_medklip', 'labels', baselines=True, limit=4)
    rules = medklip.about['thresholds']
    assert rules['model'] == dict(cut=.008, rule='given') and 'best 15 %' in rules['centre']['rule'] and medklip.about['films'] == 4   # a number fits one kind of map only
    assert 'optimistic' in evaluate(store, model, 'as_paper', baselines=False).about['thresholds']['model']['rule']
    everything = evaluate(store, model, DEMO.replace(threshold='top15', positives_only=False), {'nodule': 'nodule'}, split=None, baselines=False)
    assert everything.about['films'] == 60 and everything.predictions['pointing'].notna().sum() < 60


def test_films_of_the_pretraining_are_refused(store):
    from g2d.data.splits import fingerprints
    torch.manual_seed(0)
    c = Checkpoint.of(G2D(SMALL))
    assert evaluate(store, c, DEMO, baselines=False).about['start'] == 'G2D'
    c.seen = torch.as_tensor(fingerprints(store.select('test').index, store.manifest.get('source', '')))
    with pytest.raises(G2DError): evaluate(store, c, DEMO, baselines=False)


def test_bad_input_is_one_sentence(tmp_path, store, model):
    plain = make(tmp_path/'s', [(None, None, None, ['Mass'])]*6)
    with pytest.raises(G2DError, match='ask="labels"'): evaluate(plain, model, DEMO)
    with pytest.raises(G2DError, match='No tested film .* the outlines are none'): evaluate(plain, model, DEMO, 'labels')
    with pytest.raises(G2DError, match='choose top15 or a number'): evaluate(store, model, DEMO, split=('test', 'val'))
    with pytest.raises(G2DError, match='outline or box of hernia'): evaluate(store, model, DEMO, dict(hernia='a hernia'))
    with pytest.raises(G2DError, match='expected prompts, labels'): evaluate(store, model, DEMO, 'sentences')


# ---------------------------------------------------------------- the experiment

@pytest.fixture
def outputs(tmp_path, monkeypatch):
    import g2d.settings
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    return tmp_path


def test_experiment_on_phantoms_with_own_words(outputs, model):
    import pandas as pd
    from g2d.runs import run_notebook
    Checkpoint.of(model).save(outputs/'c.safetensors')
    folder = run_notebook('grounding', dict(checkpoint=str(outputs/'c.safetensors'), words=['cardiomegaly: an enlarged heart', 'cardiomegaly: cardiomegaly', 'consolidation: consolidation'], threshold='top15', blur=1.0), progress=False)
    table = pd.read_csv(folder/'results.csv')
    assert {'G2D (patches)', 'untrained net', 'average mask of the label', 'centre'} <= set(table['map']) and {'pointing', 'iou', 'dice', 'cnr', 'miou'} <= set(table['metric'])
    assert set(pd.read_csv(folder/'result'/'predictions.csv')['query']) == {'an enlarged heart / cardiomegaly', 'consolidation'}
    assert {'maps.png', 'cases.png'} == {p.name for p in (folder/'figures').iterdir()} and json.loads((folder/'metrics.json').read_text())['queries'] > 0


def test_experiment_on_real_lesions(outputs, data_root):
    from g2d.runs import run_notebook
    folder = run_notebook('grounding', dict(store='real:covid', ask='labels', split=[], threshold='top15', limit=12), progress=False)
    metrics = json.loads((folder/'metrics.json').read_text())
    assert metrics['films'] == 12 and metrics['queries'] >= 12 and 0 <= metrics['pointing'] <= 1
    assert 'ground glass opacities' in (folder/'result'/'predictions.csv').read_text()
