"Classification: metrics against scikit-learn and torchmetrics, features computed once against computed again, frozen means frozen, and what cannot be asked is refused."
import warnings
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import make_phantom_store
from g2d.data.store import RadiographStore, StoreWriter
from g2d.files import read_json
from g2d.models.g2d import G2D
from g2d.profiles import profile
from g2d.settings import G2DError
from g2d.tasks import classification as c, training
from g2d.tasks.protocols import protocol
from g2d.tasks.training import find_start, patient_interval, state_print

SMALL = profile('demo', image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=[32, 16, 16, 8])
QUICK = protocol('linear', 'demo', epochs=4)


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('cls')/'store', 90, size=64, seed=6, split=dict(train=.6, val=.2, test=.2))


@pytest.fixture(autouse=True)
def nothing_kept():
    "Features of one test must not help another."
    c._kept.clear(); yield; c._kept.clear()


def probe(store, p=QUICK, start='random', **options): return c.finetune(store, start, p, **dict(profile=SMALL, draws=0) | options)


def small_store(path, labels, size=32, extras=None, split=None):
    "A store of noise with given labels, one patient a film; every third film is in val, every third in test."
    rng = np.random.default_rng(0)
    with StoreWriter(path, size=size) as writer:
        for i, x in enumerate(labels):
            writer.add(rng.integers(0, 255, (size, size), dtype=np.uint8), image_id=f'f{i}', patient_id=f'p{i}', split=(split or ['train', 'train', 'val', 'test'])[i % 4], labels=x, extra=extras[i] if extras else None)
    return RadiographStore.open(path)


# metrics

def random_case(n, seed, ties):
    rng = np.random.default_rng(seed)
    y, s = (rng.random(n) < .35).astype(float), rng.random(n)
    s = np.clip(.7*s + .3*y*rng.random(n), 0, 1)
    return y, np.round(s, 1)*.97 + .01 if ties else s # off the borders of the bins


@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('seed', range(3))
def test_binary_metrics_equal_scikit_learn_and_torchmetrics(seed, ties):
    from sklearn import metrics as sk
    from torchmetrics.functional import classification as tm
    y, s = random_case(97, seed, ties)
    found = c.ranking_metrics(y, s) | c.cut_metrics(y, s, .5) | c.calibration_metrics(y, s)
    d = s > .5
    expected = dict(auroc=sk.roc_auc_score(y, s), auprc=sk.average_precision_score(y, s), accuracy=sk.accuracy_score(y, d), balanced_accuracy=sk.balanced_accuracy_score(y, d),
                    f1=sk.f1_score(y, d), mcc=sk.matthews_corrcoef(y, d), brier=sk.brier_score_loss(y, s))
    for name, value in expected.items(): assert found[name][0] == pytest.approx(value, abs=1e-9), name
    t, truth = torch.tensor(s), torch.tensor(y).long()
    others = dict(auroc=tm.binary_auroc, auprc=tm.binary_average_precision, accuracy=tm.binary_accuracy, f1=tm.binary_f1_score, mcc=tm.binary_matthews_corrcoef)
    for name, f in others.items(): assert found[name][0] == pytest.approx(float(f(t, truth)), abs=1e-6), name
    assert found['ece'][0] == pytest.approx(float(tm.binary_calibration_error(t, truth, n_bins=15)), abs=1e-6)


@pytest.mark.parametrize('ties', [False, True])
def test_weights_are_those_of_scikit_learn(ties):
    "A row of weights is what `sample_weight` is, also where whole films drop out."
    from sklearn import metrics as sk
    y, s = random_case(60, 5, ties)
    w = np.random.default_rng(1).integers(0, 4, (7, 60)).astype(float)
    found = c.ranking_metrics(y, s, w) | c.cut_metrics(y, s, .5, w) | c.calibration_metrics(y, s, w)
    functions = dict(auroc=(sk.roc_auc_score, s), auprc=(sk.average_precision_score, s), accuracy=(sk.accuracy_score, s > .5), balanced_accuracy=(sk.balanced_accuracy_score, s > .5), f1=(sk.f1_score, s > .5),
                     mcc=(sk.matthews_corrcoef, s > .5), brier=(sk.brier_score_loss, s))
    for name, (f, x) in functions.items():
        for k in range(7): assert found[name][k] == pytest.approx(f(y, x, sample_weight=w[k]), abs=1e-9), name


def test_edge_cases():
    "All positive, none positive, all scores equal, one film."
    from sklearn import metrics as sk
    ones, scores = np.ones(5), np.array([.1, .9, .4, .6, .6])
    assert np.isnan(c.ranking_metrics(ones, scores)['auroc'][0]) and c.ranking_metrics(ones, scores)['auprc'][0] == sk.average_precision_score(ones, scores) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = c.cut_metrics(ones, scores, .5)
        for name, f in dict(accuracy=sk.accuracy_score, balanced_accuracy=sk.balanced_accuracy_score, f1=sk.f1_score, mcc=sk.matthews_corrcoef).items():
            assert found[name][0] == pytest.approx(f(ones, scores > .5)), name
    none = c.ranking_metrics(0*ones, scores) | c.cut_metrics(0*ones, scores, .5)
    assert all(np.isnan(none[m][0]) for m in ('auroc', 'auprc', 'f1')) and none['accuracy'][0] == pytest.approx(.4)
    y = np.array([1., 0, 0, 1, 0])
    assert c.ranking_metrics(y, 0*y)['auroc'][0] == .5 and c.ranking_metrics(y, 0*y)['auprc'][0] == pytest.approx(sk.average_precision_score(y, 0*y))
    assert c.cut_metrics(y, 0*y, .5)['mcc'][0] == sk.matthews_corrcoef(y, 0*y > .5) == 0 and np.isnan(c.ranking_metrics([1.], [.3])['auroc'][0])


@pytest.mark.parametrize('seed', range(3))
def test_multiclass_metrics_equal_scikit_learn_and_torchmetrics(seed):
    from sklearn import metrics as sk
    from torchmetrics.functional import classification as tm
    rng = np.random.default_rng(seed)
    y, s = rng.integers(0, 4, 80), rng.dirichlet(np.ones(4), 80)
    s[np.arange(0, 80, 2), y[::2]] += .5; s /= s.sum(1, keepdims=True)
    q = c.Question('multiclass', list('abcd'), '')
    found = {k: v[0] for k, v in c.score_table(q, y[:, None].astype(float), s).items()}
    said = s.argmax(1)
    expected = dict(auroc=sk.roc_auc_score(y, s, multi_class='ovr'), auprc=sk.average_precision_score(np.eye(4)[y], s), accuracy=sk.accuracy_score(y, said), balanced_accuracy=sk.balanced_accuracy_score(y, said),
                    f1=sk.f1_score(y, said, average='macro'), mcc=sk.matthews_corrcoef(y, said), brier=((s - np.eye(4)[y])**2).sum(1).mean())
    for name, value in expected.items(): assert found[name] == pytest.approx(value, abs=1e-9), name
    assert found['auroc/c'] == pytest.approx(sk.roc_auc_score(y == 2, s[:, 2])) and found['f1/c'] == pytest.approx(sk.f1_score(y, said, average=None)[2])
    t, truth = torch.tensor(s), torch.tensor(y)
    assert found['auroc'] == pytest.approx(float(tm.multiclass_auroc(t, truth, 4)), abs=1e-6) and found['ece'] == pytest.approx(float(tm.multiclass_calibration_error(t, truth, 4, n_bins=15)), abs=1e-6)


def test_an_absent_class_is_named_and_not_averaged():
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    truth, s = (rng.random((40, 4)) < .4).astype(float), rng.random((40, 4))
    truth[:, 1], truth[:, 3] = 0, 1
    q = c.Question('multilabel', list('abcd'), '')
    found = c.score_table(q, truth, s, [.5]*4)
    assert c.constant_classes(truth, q) == ['b', 'd'] and not any(k.endswith(('/b', '/d')) for k in found)
    assert found['auroc'][0] == pytest.approx(np.mean([roc_auc_score(truth[:, k], s[:, k]) for k in (0, 2)]))
    y = rng.choice([0, 2], 40)
    m = c.score_table(c.Question('multiclass', list('abc'), ''), y[:, None].astype(float), rng.dirichlet(np.ones(3), 40))
    assert c.constant_classes(y[:, None].astype(float), c.Question('multiclass', list('abc'), '')) == ['b'] and 'auroc/b' not in m and np.isfinite(m['f1'][0])


def test_unknown_labels_do_not_count():
    rng = np.random.default_rng(0)
    truth, s = (rng.random((50, 2)) < .4).astype(float), rng.random((50, 2))
    hidden = truth.copy(); hidden[10:20, 0] = np.nan
    q, keep = c.Question('multilabel', list('ab'), ''), np.r_[0:10, 20:50]
    found, whole, less = (c.score_table(q, t, x, [.5]*2) for t, x in ((hidden, s), (truth, s), (truth[keep], s[keep])))
    for m in ('auroc', 'f1', 'ece', 'mcc'): assert found[f'{m}/a'][0] == pytest.approx(less[f'{m}/a'][0]) and found[f'{m}/b'][0] == whole[f'{m}/b'][0]


@pytest.mark.parametrize('seed', range(4))
def test_best_cut_by_brute_force(seed):
    from sklearn.metrics import f1_score
    y, s = random_case(40, seed, seed % 2)
    best = max(f1_score(y, s > t) for t in np.r_[-1, np.unique(s)])
    cut = c.best_cut(y, s)
    assert f1_score(y, s > cut) == pytest.approx(best) and not np.isin(cut, s).any()
    assert c.best_cut(0*y, s) == .5 and (s > c.best_cut(0*y + 1, s)).all()


def test_intervals_are_those_of_patient_interval():
    from sklearn.metrics import roc_auc_score, average_precision_score
    y, s = random_case(60, 2, True)
    patients = np.random.default_rng(0).integers(0, 25, 60)
    found = c.table_intervals(patients, lambda w: c.ranking_metrics(y, s, w), draws=100, seed=3)
    for name, f in dict(auroc=roc_auc_score, auprc=average_precision_score).items():
        assert found[name] == pytest.approx(patient_interval(patients, lambda rows: f(y[rows], s[rows]), draws=100, seed=3), abs=1e-9)


def test_curves_belong_to_the_areas():
    "The area under the step curve is the AUROC without half of the ties, and the band holds the curve."
    y, s = random_case(300, 1, False)
    found = c.curves(c.Question('binary', ['a'], ''), y[:, None], s[:, None], np.arange(300), [.5], 50)
    roc = found['roc/a']
    assert np.trapezoid(roc['y'], roc['x']) == pytest.approx(c.ranking_metrics(y, s)['auroc'][0], abs=.02)
    assert (np.diff(roc['y']) >= 0).all() and (roc['low'] <= roc['y'] + 1e-9).mean() > .9 and (roc['high'] >= roc['y'] - 1e-9).mean() > .9
    assert found['confusion/a']['counts'].sum() == 300 and found['reliability']['films'].sum() == 300


# loss and labels

def test_loss_masks_what_is_unknown():
    z, y = torch.randn(6, 3), (torch.rand(6, 3) < .5).float()
    assert torch.allclose(c.class_loss(z, y, 'multilabel'), F.binary_cross_entropy_with_logits(z, y))
    w = torch.tensor([2., 1., 5.])
    assert torch.allclose(c.class_loss(z, y, 'multilabel', w), F.binary_cross_entropy_with_logits(z, y, pos_weight=w))
    holes = y.clone(); holes[2:4, 1] = float('nan')
    z.requires_grad_()
    c.class_loss(z, holes, 'multilabel').backward()
    assert (z.grad[2:4, 1] == 0).all() and (z.grad[:, 0] != 0).all()
    assert float(c.class_loss(z, holes*float('nan'), 'multilabel').detach()) == 0
    k = torch.tensor([[0.], [2.], [float('nan')], [1.], [0.], [2.]])
    known = ~k[:, 0].isnan()
    assert torch.allclose(c.class_loss(z, k, 'multiclass'), F.cross_entropy(z[known], k[known, 0].long()))


def test_question_and_truth(tmp_path):
    labels = [['a'], ['a', 'b'], [], None, ['b'], ['c'], ['a'], []]
    store = small_store(tmp_path/'s', labels, extras=[dict(uncertain=['b'])] + [None]*7)
    q = c.find_question(store.index['labels'], min_positives=2)
    assert (q.kind, q.names) == ('multilabel', ['a', 'b']) and '1 of 7 films have several' in q.why
    truth = c.truth_of(store, q)
    assert truth[:3].tolist() == [[1, 0], [1, 1], [0, 0]] and np.isnan(truth[3]).all()
    assert np.isnan(c.truth_of(store, q, 'mask')[0, 1]) and c.truth_of(store, q, 'mask')[0, 0] == 1
    one = c.find_question([['a'], ['b'], []], min_positives=1)
    assert (one.kind, one.names) == ('multiclass', [c.NOTHING, 'a', 'b']) and c.find_question([['a'], ['b'], []], ['b', 'a']).names == ['b', 'a']
    assert c.truth_of(store.select(where=np.arange(8) != 1), one)[:, 0].tolist()[:2] == [1, 0]
    with pytest.raises(G2DError, match='exclude each other'): c.truth_of(store, one)
    for options, message in ((dict(classes=['z']), 'No training film has the label "z"; the labels are a, b, c'), (dict(min_positives=9), 'No label has 9 positive'), (dict(kind='binary'), 'A binary task has one class'),
                             (dict(kind='odd'), "kind is 'odd'"), (dict(kind='multiclass', min_positives=1), 'have several of')):
        with pytest.raises(G2DError, match=message): c.find_question(labels, **dict(min_positives=1) | options)


# features

def test_features_do_not_depend_on_what_was_asked_first(store):
    net = c.ClassNet(find_start('random', SMALL), c.Question('binary', ['mass'], ''), 'all')
    test = c.pooled_features(net, store.select('test'), 64, batch_size=7)
    whole = c.pooled_features(net, store, 64)
    c._kept.clear()
    assert np.array_equal(c.pooled_features(net, store, 64, batch_size=90), whole) and np.array_equal(whole[np.asarray(store.index['split'] == 'test')], test)
    from g2d.data.loading import Augment
    by_hand = net.eval().image_encoder(Augment('none', 64)(training.films(store, range(5)), 0, train=False)[0])[-1].mean((2, 3))
    assert np.allclose(by_hand.detach().numpy(), whole[:5], atol=1e-6)


def test_features_in_a_file(store, tmp_path, monkeypatch):
    start, question = find_start('random', SMALL), c.Question('binary', ['mass'], '')
    torch.manual_seed(0)
    net = c.ClassNet(start, question, 'all')
    part, calls, compute = store.select('val'), [], c._compute
    monkeypatch.setattr(c, '_compute', lambda net, view, *rest: calls.append(len(view)) or compute(net, view, *rest))
    first = c.pooled_features(net, part, 64, tmp_path)
    c._kept.clear()
    assert np.array_equal(c.pooled_features(net, part, 64, tmp_path), first) and calls == [len(part)]
    c._kept.clear(); c.pooled_features(net, store, 64, tmp_path)
    assert calls == [len(part), len(store) - len(part)] # only what was missing
    path, = tmp_path.glob('features_*.npy')
    assert not [p for p in tmp_path.iterdir() if p != path]
    path.write_bytes(path.read_bytes()[:-50]); c._kept.clear()
    assert np.array_equal(c.pooled_features(net, part, 64, tmp_path), first) and calls[-1] == len(part) # a damaged file is made again
    c.pooled_features(net, part, 32, tmp_path)
    with torch.no_grad(): net.image_encoder.net.bn1.running_mean += .1
    c.pooled_features(net, part, 64, tmp_path)
    assert len(list(tmp_path.glob('*.npy'))) == 3 # another size, other statistics: other files


@pytest.mark.parametrize('options', [dict(), dict(classes=['pleural effusion']), dict(fraction=.5, draw='seed')], ids=['multilabel', 'binary', 'half'])
def test_computed_once_equals_computed_in_every_epoch(store, options):
    once, again = probe(store, cache=True, **options), probe(store, cache=False, **options)
    assert once.about['features'] == 'computed once' and again.about['features'] == 'computed in every epoch'
    assert torch.allclose(once.net.head.linear.weight, again.net.head.linear.weight, atol=1e-5)
    assert once.metrics['auroc'] == pytest.approx(again.metrics['auroc'], abs=1e-4) and once.about['log'][-1]['val_loss'] == pytest.approx(again.about['log'][-1]['val_loss'], abs=1e-5)


# frozen, resumed

def test_frozen_means_frozen(store, monkeypatch):
    "Not a parameter and not a statistic of encoder and pool, in any way of training a probe; and the check can fail."
    torch.manual_seed(0)
    g2d = Checkpoint.of(G2D(SMALL))
    for p, options in ((QUICK, dict()), (QUICK, dict(cache=False)), (QUICK.replace(augment='recommended'), dict()), (QUICK.replace(pool='attention'), dict()), (QUICK.replace(pool='attention', augment='mgca_cls'), dict()), (QUICK.replace(solver='lbfgs'), dict())):
        r = probe(store, p, g2d, steps=2, **options)
        own = {k: v for k, v in r.net.state_dict().items() if k.startswith('image_encoder.')}
        assert r.about['encoder_unchanged'] and all(torch.equal(v, g2d.weights[k]) for k, v in own.items() if k in g2d.weights)
        if p.pool == 'attention': assert all(torch.equal(v, g2d.weights[k[7:]]) for k, v in r.net.state_dict().items() if k.startswith('pooler.')) and r.net.head.linear.in_features == SMALL.embed_dim
    assert probe(store, QUICK.replace(freeze='weights'), g2d, steps=2).about['encoder_unchanged'] is False
    assert probe(store, protocol('finetune', 'demo', batch_size=16), g2d, steps=2).about['encoder_unchanged'] is False


def test_training_mode_does_not_wake_a_frozen_network():
    "Whoever calls `train()`: encoder and attention pool stay as they are, and with freeze=\"weights\" they do not."
    torch.manual_seed(0)
    start = find_start(Checkpoint.of(G2D(SMALL)))
    for freeze, same in (('all', True), ('weights', False)):
        net = c.ClassNet(start, c.Question('binary', ['mass'], ''), freeze, 'attention').train()
        before = state_print(net.image_encoder), state_print(net.pooler)
        net(torch.rand(4, 1, 64, 64)).sum().backward()
        after = state_print(net.image_encoder), state_print(net.pooler)
        assert [a == b for a, b in zip(after, before)] == [same, same] and {n for n, x in net.named_parameters() if x.grad is not None} == {'head.linear.weight', 'head.linear.bias'}


def test_attention_pool_is_that_of_the_checkpoint(store):
    torch.manual_seed(1)
    model = G2D(SMALL).eval()
    net = c.ClassNet(find_start(Checkpoint.of(model), SMALL), c.Question('binary', ['mass'], ''), 'all', 'attention').eval()
    x = torch.rand(3, 1, 64, 64)
    assert torch.allclose(net.describe(x), model.encode_image(x)[0], atol=1e-5)


def test_a_killed_fine_tuning_ends_with_the_same_weights(store, tmp_path, monkeypatch):
    p = protocol('finetune', 'demo', batch_size=16)
    run = lambda out: probe(store, p, steps=8, out=out)
    whole = run(tmp_path/'whole')
    def one_epoch(self):
        self._epoch(type('Bar', (), dict(update=lambda bar: None))())
        self.epoch += 1; self._save()
        raise KeyboardInterrupt
    monkeypatch.setattr(training._Loop, 'run', one_epoch)
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'cut')
    monkeypatch.undo()
    resumed = run(tmp_path/'cut')
    assert state_print(resumed.net) == state_print(whole.net) and resumed.metrics == whole.metrics
    with pytest.raises(G2DError, match='belongs to another training'): probe(store, p, steps=8, out=tmp_path/'cut', seed=1)
    with pytest.raises(G2DError, match='belongs to another training'): probe(store, p, steps=8, out=tmp_path/'cut', classes=['mass'])


# solvers, thresholds, keeping

@pytest.mark.parametrize('labels', ['multilabel', 'multiclass', 'two'])
def test_lbfgs_is_scikit_learn(tmp_path, labels):
    from sklearn.linear_model import LogisticRegression
    rng = np.random.default_rng(0)
    sets = dict(multilabel=[['a'], ['a', 'b'], ['b'], []], multiclass=[['a'], ['b'], ['c']], two=[['a'], ['b']])[labels]
    store = small_store(tmp_path/'s', [sets[i] for i in rng.integers(0, len(sets), 80)], split=['train', 'val', 'train', 'test'])
    r = probe(store, protocol('linear', 'demo', solver='lbfgs', size=32), min_positives=2)
    net, views = r.net, [store.select(s) for s in ('train', 'test')]
    scale = lambda x: ((torch.tensor(x) - net.head.centre)/net.head.scale).double().numpy()
    x, x_test = (scale(c.pooled_features(net, v, 32)) for v in views)
    truth = c.truth_of(views[0], r.net.question)
    for k in range(truth.shape[1]):
        expected = LogisticRegression(C=r.about['C'][k], max_iter=2000).fit(x, truth[:, k]).predict_proba(x_test)
        columns = [f'score/{n}' for n in net.question.names]
        got = r.predictions[columns].to_numpy()
        assert np.allclose(got if r.about['kind'] == 'multiclass' else got[:, k], expected if r.about['kind'] == 'multiclass' else expected[:, 1], atol=1e-4)


def test_lbfgs_where_training_lacks_a_class():
    q = c.Question('multiclass', list('abc'), '')
    net = c.ClassNet(find_start('random', SMALL), q, 'all').eval()
    x = np.random.default_rng(0).normal(size=(30, net.head.linear.in_features)).astype(np.float32)
    y = np.resize([0., 2.], 30)[:, None]
    c.solve_lbfgs(net, x, y, x[:6], np.array([[0.], [1.], [2.], [0.], [2.], [2.]]))
    p = net.head(torch.tensor(x)).softmax(1)
    assert (p[:, 1] < 1e-6).all() and (p.argmax(1).numpy() == y[:, 0]).mean() > .95
    q = c.Question('multilabel', list('ab'), ''); net = c.ClassNet(find_start('random', SMALL), q, 'all').eval()
    assert c.solve_lbfgs(net, x, np.stack([np.resize([0., 1.], 30), np.zeros(30)], 1), x[:6], np.full((6, 2), np.nan))[1] is None
    assert torch.allclose(net.head(torch.tensor(x))[:, 1].sigmoid(), torch.tensor(.5/31), atol=1e-6)


def test_test_chosen_thresholds_have_another_name(store):
    r = probe(store, protocol('linear', 'as_paper', size=64, epochs=2, scheme='column'), draws=20)
    assert {'f1', 'f1_test_chosen', 'accuracy_test_chosen'} <= set(r.metrics) and 'auroc_test_chosen' not in r.metrics and r.about['thresholds'] != r.about['thresholds_test_chosen']
    for n in r.about['classes']:
        if n not in r.about['left_out']: assert r.metrics[f'f1_test_chosen/{n}'] >= r.metrics[f'f1/{n}'] - 1e-9
    assert set(r.intervals) == set(r.metrics)
    fixed = probe(store)
    assert not any('test_chosen' in k for k in fixed.metrics)
    halves = probe(store, QUICK.replace(threshold=.5))
    assert set(halves.about['thresholds'].values()) == {.5} and halves.metrics['auroc'] == fixed.metrics['auroc']


def test_result_is_whole(store, tmp_path):
    r = probe(store, draws=30)
    rows = r.predictions
    assert len(rows) == r.about['test_films'] and set(rows['image_id']) == set(store.select('test').index['image_id'])
    assert {'start', 'weights', 'protocol', 'scheme', 'leaks', 'seconds', 'encoder_unchanged', 'kind', 'thresholds', 'left_out', 'train_films'} <= set(r.about) and r.about['weights'] == 'random'
    from sklearn.metrics import roc_auc_score
    n = next(n for n in r.about['classes'] if n not in r.about['left_out'])
    assert r.metrics[f'auroc/{n}'] == pytest.approx(roc_auc_score(rows[f'truth/{n}'], rows[f'score/{n}']))
    assert all(r.intervals[k][0] <= r.metrics[k] <= r.intervals[k][1] for k in ('brier', 'accuracy'))
    r.save(tmp_path)
    assert read_json(tmp_path/'result.json')['metrics']['auroc'] == r.metrics['auroc']
    for figure in (c.roc_pr_figure(r), c.reliability_figure(r), c.confusion_figure(r), c.films_figure(r, store), c.class_films_figure(r, store, n)): assert figure.axes


def test_same_seed_same_result_other_seed_other_films(store):
    a, b = probe(store, fraction=.5), probe(store, fraction=.5)
    assert a.metrics == b.metrics and state_print(a.net) == state_print(b.net)
    other = probe(store, fraction=.5, seed=3)
    assert other.about['classes'] == a.about['classes'] == probe(store).about['classes']


def test_evaluate_on_file_and_other_store(store, tmp_path):
    r = probe(store, out=tmp_path/'run', draws=10)
    again = c.evaluate(store, tmp_path/'run', draws=10)
    assert again.metrics == pytest.approx(r.metrics, abs=1e-6) and again.about['thresholds'] == pytest.approx(r.about['thresholds'])
    assert c.evaluate(store, r, draws=0).metrics['f1'] == pytest.approx(r.metrics['f1'])
    with pytest.raises(G2DError, match='has seen .* of these'): c.evaluate(store, r, part='train', draws=0)
    assert c.evaluate(store, r, part='train', draws=0, allow_seen=True).about['part'] == 'train'
    other = make_phantom_store(tmp_path/'other', 40, size=64, seed=99, split=dict(test=1.))
    assert c.evaluate(other, r, draws=0).about['test_films'] == 40
    with pytest.raises(G2DError, match='none of the classes'): c.evaluate(small_store(tmp_path/'gout', [['gout'], []]*6), r)
    (tmp_path/'run'/'net.safetensors').write_bytes(b'x'*100)
    with pytest.raises(G2DError, match='damaged'): c.evaluate(store, tmp_path/'run')
    with pytest.raises(G2DError, match='There is no classifier'): c.evaluate(store, tmp_path/'nowhere')
    Checkpoint.of(G2D(SMALL)).save(tmp_path/'pretrained.safetensors')
    with pytest.raises(G2DError, match='is no classifier of this suite'): c.evaluate(store, tmp_path/'pretrained.safetensors')


def test_exclusive_classes_end_to_end(tmp_path):
    rng = np.random.default_rng(0)
    labels = [[['bacterial'], ['viral'], []][i] for i in rng.integers(0, 3, 60)]
    store = small_store(tmp_path/'s', labels)
    for p in (protocol('linear', 'demo', size=32, epochs=3), protocol('linear', 'demo', size=32, epochs=3, positive_weight='balanced'), protocol('finetune', 'demo', size=32, batch_size=16)):
        r = probe(store, p, steps=3)
        assert r.about['kind'] == 'multiclass' and r.about['classes'] == [c.NOTHING, 'bacterial', 'viral'] and r.about['thresholds'] == 'largest probability'
        assert r.predictions[[f'score/{n}' for n in r.about['classes']]].sum(1).to_numpy() == pytest.approx(1) and (r.predictions['answer'] == r.predictions['truth']).mean() == pytest.approx(r.metrics['accuracy'])
        assert c.confusion_figure(r).axes and c.films_figure(r, store).axes
    binary = probe(store, protocol('linear', 'demo', size=32, epochs=2), classes=['viral'])
    assert binary.about['kind'] == 'binary' and not any('/' in m for m in binary.metrics)


# bad input

def test_what_cannot_be_asked(store, tmp_path):
    cases = [('hold no positive of pneumothorax; take a larger fraction', dict(classes=['pneumothorax'], fraction=.02)), ('No training film has the label "gout"', dict(classes=['gout'])), ('There is no start', dict(start='nowhere.safetensors')),
             ('expected validation, test or a number', dict(p=QUICK.replace(threshold='best'))), ('needs a G2D checkpoint', dict(p=QUICK.replace(pool='attention'))), ('needs a frozen encoder', dict(p=QUICK.replace(solver='lbfgs', augment='recommended'))),
             ('knows linear and finetune', dict(p=protocol('segmentation', 'demo')))]
    for message, options in cases:
        with pytest.raises(G2DError, match=message) as error: probe(store, **options)
        assert '\n' not in str(error.value)
    wrong = Checkpoint.of(G2D(SMALL))
    wrong.weights['image_encoder.net.conv1.weight'] = torch.zeros(1)
    with pytest.raises(G2DError, match='does not fit'): probe(store, start=wrong)
    for name, labels, options, message in (('nolabels', [None]*12, {}, 'has no labels'), ('nopositive', [[]]*12, {}, 'No label has 5 positive'), ('constant', [['a'], ['a'], ['a'], []]*6, dict(classes=['a']), 'are all positive for a'),
                                           ('test', [['a'], [], ['a'], []]*6, dict(classes=['a']), 'nothing to measure')):
        with pytest.raises(G2DError, match=message): probe(small_store(tmp_path/name, labels), protocol('linear', 'demo', size=32, epochs=1), **options)


def test_test_films_of_the_pre_training_are_refused(store):
    from g2d.data.splits import fingerprints
    seen = Checkpoint.of(G2D(SMALL))
    seen.seen = torch.from_numpy(fingerprints(store.select('test').index.iloc[:2], store.manifest['source']))
    with pytest.raises(G2DError, match='has seen'): probe(store, start=seen)


# experiments

@pytest.fixture
def outputs(tmp_path, monkeypatch):
    "An output root of the test's own, also for the kernels that papermill starts."
    import g2d.settings
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    return tmp_path


def check_run(folder):
    import pandas as pd
    table = pd.read_csv(folder/'results.csv')
    assert {'start', 'task', 'fraction', 'seed', 'metric', 'value', 'low', 'high'} <= set(table.columns) and {'auroc', 'auprc', 'accuracy', 'f1', 'mcc', 'ece'} <= set(table['metric'])
    assert {f'{n}.png' for n in ('auroc', 'curves', 'reliability', 'confusion', 'films', 'scores')} <= {p.name for p in (folder/'figures').iterdir()}
    return read_json(folder/'metrics.json')


def test_experiment_on_phantoms(outputs, tmp_path):
    from g2d.runs import run_notebook
    Checkpoint.of(G2D(SMALL)).save(tmp_path/'g2d.safetensors')
    metrics = check_run(run_notebook('classification', dict(store='phantoms:60', checkpoint=str(tmp_path/'g2d.safetensors'), fraction=[.5, 1.], steps=4, draws=20), progress=False))
    assert metrics['encoders_unchanged'] and metrics['kind'] == 'multilabel' and {'random, 1: auroc', 'G2D encoder, 0.5: auroc'} <= set(metrics)


def test_experiment_on_real_films(outputs, data_root):
    from g2d.runs import run_notebook
    metrics = check_run(run_notebook('classification', dict(store='real:nih', steps=4, draws=20), progress=False))
    assert (metrics['kind'], metrics['classes']) == ('multilabel', 14) and metrics['encoders_unchanged']


def test_real_exclusive_classes(outputs, data_root):
    "Kermany: normal, bacterial, viral. Far above chance with random features, which says that the set is easy and the code right."
    from g2d.tasks.stores import find_store
    r = c.finetune(find_store('real:kermany', 64), 'random', protocol('linear', 'demo', solver='lbfgs'), profile=SMALL, draws=100)
    assert (r.about['kind'], r.about['classes']) == ('multiclass', ['no finding', 'bacterial pneumonia', 'viral pneumonia']) and r.intervals['auroc'][0] > .55


@pytest.mark.parametrize('name, kind', [('chexpert', 'multilabel'), ('rsna', 'binary'), ('covidx', 'multiclass')])
def test_layouts(outputs, name, kind):
    "The phantom copies of public sets, through their own splits."
    from g2d.tasks.stores import find_store
    store = find_store(f'layout:{name}', 64, n=40)
    r = c.finetune(store, 'random', protocol('linear', 'fixed', size=64, epochs=2), profile=SMALL, min_positives=2, draws=0)
    assert r.about['kind'] == kind and r.about['scheme'] == 'fixed'
