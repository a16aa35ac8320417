"Zero-shot classification: numbers against scikit-learn, torchmetrics and brute force; prompts as data; what is refused; and the notebook."
import json
import numpy as np
import pandas as pd
import pytest
import torch
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import PHANTOM_FINDINGS, make_phantom_store
from g2d.data.store import RadiographStore, StoreWriter
from g2d.files import read_json
from g2d.models.g2d import G2D
from g2d.profiles import profile
from g2d.runs import run_notebook
from g2d.settings import G2DError
from g2d.tasks.training import patient_interval
from g2d.tasks.zero_shot import (PROMPTS, Prompts, auroc, best_threshold, choose_cuts, class_scores, cut_scores, degenerate, embed_images, embed_texts, evaluate, exclusive_rows, find_classes, find_model,
                                 from_counts, label_table, one_of_several, patient_weights, prompt_set, scores_table, similarity, spoken, trivial_scores, zscore_choice)

SMALL = profile('demo', image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=[32, 16, 16, 8])


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('zs')/'store', 90, size=64, seed=6, split=dict(train=.4, val=.3, test=.3))


@pytest.fixture(scope='module')
def net(): return find_model('untrained', SMALL, seed=3)[0]


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    import g2d.settings
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------ numbers
CASES = {'random': lambda r, n: (r.random(n) < .3, r.random(n)), 'ties': lambda r, n: (r.random(n) < .3, r.integers(0, 5, n)/5), 'one score': lambda r, n: (r.random(n) < .3, np.full(n, .5)),
         'one positive': lambda r, n: (np.arange(n) == 3, r.random(n)), 'perfect': lambda r, n: (np.arange(n) < 9, -np.arange(n)/n), 'worst': lambda r, n: (np.arange(n) < 9, np.arange(n)/n),
         'two films': lambda r, n: (np.array([True, False]), np.array([.2, .7]))}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('n', [12, 301])
def test_auroc_and_scores_equal_scikit_learn(case, n):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, roc_auc_score
    truth, scores = CASES[case](np.random.default_rng(n), n)
    assert auroc(truth, scores) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    for cut in (.1, .5, .9):
        found, said = cut_scores(truth, scores, cut), scores >= cut
        assert found['f1'] == pytest.approx(f1_score(truth, said, zero_division=0), abs=1e-12)
        assert found['acc'] == pytest.approx(accuracy_score(truth, said), abs=1e-12)
        assert found['mcc'] == pytest.approx(matthews_corrcoef(truth, said), abs=1e-9)


def test_auroc_equals_torchmetrics():
    from torchmetrics.functional.classification import multilabel_auroc
    rng = np.random.default_rng(5)
    truth, scores = rng.random((200, 4)) < .2, rng.integers(0, 40, (200, 4))/40
    expected = multilabel_auroc(torch.tensor(scores), torch.tensor(truth).long(), 4, average=None)
    assert [auroc(t, s) for t, s in zip(truth.T, scores.T)] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_class_that_is_absent_has_no_auroc():
    assert np.isnan(auroc(np.zeros(5, bool), np.arange(5))) and np.isnan(auroc(np.ones(5, bool), np.arange(5))) and np.isnan(auroc(np.zeros(0, bool), np.zeros(0)))


@pytest.mark.parametrize('by', ['f1', 'mcc', 'acc'])
@pytest.mark.parametrize('case', CASES)
def test_best_threshold_equals_brute_force(case, by):
    for seed in range(6):
        truth, scores = CASES[case](np.random.default_rng(seed), 40)
        values = {}
        for cut in [np.inf, *np.unique(scores)[::-1]]:
            said = scores >= cut
            values[cut] = float(from_counts((said & truth).sum(), (said & ~truth).sum(), (~said & truth).sum(), (~said & ~truth).sum())[by])
        cut, value = best_threshold(truth, scores, by)
        assert value == pytest.approx(max(values.values()), abs=1e-12) and np.isfinite(cut)
        assert float(cut_scores(truth, scores, cut)[by]) == pytest.approx(value, abs=1e-12)      # the cut gives what it promises
        best = [c for c, v in values.items() if v >= max(values.values()) - 1e-12]
        assert (scores >= cut).sum() == min((scores >= c).sum() for c in best)                    # the highest of several


def test_best_threshold_costs_a_sort():
    import time
    rng = np.random.default_rng(0)
    def seconds(n):
        s = rng.random(n); t = s + rng.normal(size=n) > 1
        return min(_timed(lambda: best_threshold(t, s), time) for _ in range(3))
    small, large = seconds(20_000), seconds(640_000)
    assert large < 32*8*max(small, 1e-3)     # n squared would be 1024 times


def _timed(f, time): began = time.perf_counter(); f(); return time.perf_counter() - began


def test_threshold_mistakes():
    with pytest.raises(G2DError, match='f1, mcc or acc, not "youden"'): best_threshold(np.array([True]), np.array([1.]), 'youden')
    with pytest.raises(G2DError, match='no film'): best_threshold(np.zeros(0, bool), np.zeros(0))


def test_intervals_equal_the_slow_way():
    from sklearn.metrics import f1_score, roc_auc_score
    rng = np.random.default_rng(1)
    patients = rng.integers(0, 60, 200)
    truth, scores = rng.random((200, 2)) < .3, rng.integers(0, 30, (200, 2))/30
    weights = patient_weights(patients, 150)
    metrics, intervals = scores_table(truth, scores, ['a', 'b'], {'': dict(a=.6, b=.4), '_test_chosen': choose_cuts(truth, scores, ['a', 'b'])}, weights)
    assert intervals['auroc/a'] == pytest.approx(patient_interval(patients, lambda r: roc_auc_score(truth[r, 0], scores[r, 0]), draws=150), abs=1e-12)
    assert intervals['f1/b'] == pytest.approx(patient_interval(patients, lambda r: f1_score(truth[r, 1], scores[r, 1] >= .4), draws=150), abs=1e-12)
    macro = lambda r: np.mean([roc_auc_score(truth[r, k], scores[r, k]) for k in (0, 1)])
    assert intervals['auroc_macro'] == pytest.approx(patient_interval(patients, macro, draws=150), abs=1e-12)
    assert metrics['f1_macro_test_chosen'] >= metrics['f1_macro'] and {'f1_test_chosen/a', 'mcc_macro', 'acc/b'} <= set(metrics)


def test_trivial_scores_are_those_of_constant_answers():
    from sklearn.metrics import accuracy_score, f1_score
    truth = np.random.default_rng(2).random((80, 3)) < [.1, .5, .8]
    found = trivial_scores(truth, list('abc'))
    assert found['trivial_f1_macro'] == pytest.approx(np.mean([f1_score(t, np.ones(80)) for t in truth.T]))
    assert found['trivial_acc_macro'] == pytest.approx(np.mean([max(accuracy_score(t, np.ones(80)), accuracy_score(t, np.zeros(80))) for t in truth.T]))


def test_similarity_by_hand():
    rng = np.random.default_rng(0)
    unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
    images, texts = unit(rng.normal(size=(7, 5))), unit(rng.normal(size=(3, 5)))
    cosines = np.array([[i @ t for t in texts] for i in images])
    assert similarity(images, texts, 'mean') == pytest.approx(cosines.mean(1)) and similarity(images, texts, 'max') == pytest.approx(cosines.max(1))
    centre = texts.mean(0)/np.linalg.norm(texts.mean(0))
    assert similarity(images, texts, 'embedding') == pytest.approx(images @ centre)
    asked = Prompts('x', '', dict(a=['p', 'q']), dict(a=['n']))
    vectors = dict(p=texts[0], q=texts[1], n=texts[2])
    both = np.stack([cosines[:, :2].mean(1), cosines[:, 2]], 1)/.07
    assert class_scores(images, asked, vectors, 'mean', temperature=.07)[:, 0] == pytest.approx(torch.softmax(torch.tensor(both), 1)[:, 0].numpy(), abs=1e-12)
    assert class_scores(images, asked, vectors, 'mean', 'cosine')[:, 0] == pytest.approx(both[:, 0]*.07)
    for bad in (dict(ensemble='median'), dict(score='logit')):
        with pytest.raises(G2DError, match='expected'): class_scores(images, asked, vectors, **bad)
    with pytest.raises(G2DError, match='no negative sentence for "a"; use score "cosine"'): class_scores(images, Prompts('x', '', dict(a=['p'])), vectors)


# ------------------------------------------------------------------------------------------------------------ prompts
def test_names():
    assert [spoken(x) for x in ('Pleural_Thickening', ' Lung  Opacity', 'COVID-19', 'ARDS', 'E.Coli')] == ['pleural thickening', 'lung opacity', 'COVID-19', 'ARDS', 'E.Coli']
    assert spoken('Infiltration', 'medklip') == 'infiltrate' and spoken('pleural_thickening', 'medklip') == 'thicken'
    assert spoken('Effusion', {'EFFUSION': 'fluid'}) == 'fluid'
    with pytest.raises(G2DError, match='no mapping of names "klingon"'): spoken('Edema', 'klingon')


@pytest.mark.parametrize('name', PROMPTS)
def test_prompt_sets_have_sentences_for_and_against(name):
    classes = [*PHANTOM_FINDINGS, 'Pleural_Thickening', 'COVID-19']
    found = prompt_set(name, classes)
    for c in classes:
        assert found.positive[c] and found.negative[c] and len(set(found.positive[c])) == len(found.positive[c])
        assert all(t == t.strip() and '  ' not in t and '_' not in t for t in found.positive[c] + found.negative[c])
        assert not set(found.positive[c]) & set(found.negative[c])
    assert found.source and set(found.texts()) == {t for part in (found.positive, found.negative) for ts in part.values() for t in ts}


def test_pair_is_chexzeros():
    found = prompt_set('pair', ['Edema', 'Pleural_Thickening'])
    assert (found.positive['Pleural_Thickening'], found.negative['Pleural_Thickening']) == (['pleural thickening'], ['no pleural thickening'])


def test_gloria_like_lists_are_a_product():
    found = prompt_set('gloria', ['atelectasis', 'Rare_Thing'])
    assert len(found.positive['atelectasis']) == 4*4*10 and 'mild linear atelectasis in the right lower zone' in found.positive['atelectasis']
    assert len(found.positive['Rare_Thing']) == 16 and 'severe rare thing in both lungs' in found.positive['Rare_Thing']
    drawn = found.draw(5)
    assert drawn.counts() == {'atelectasis': (5, 1), 'Rare_Thing': (5, 1)} and set(drawn.positive['atelectasis']) < set(found.positive['atelectasis'])
    assert drawn.positive == found.draw(5).positive != found.draw(5, seed=7).positive and 'seed 6' in drawn.source


def test_own_sentences_are_those_of_the_phantoms(store):
    mine = prompt_set('own', list(PHANTOM_FINDINGS)).positive
    said = [(f['label'], t) for extra in store.index['extra'] for e in [json.loads(extra)] for f, t in zip(e['findings'], e['prompts'])]
    same = [t in mine[label] for label, t in said if label not in ('nodule', 'mass', 'foreign object')]       # those name millimetres
    assert len(same) > 40 and all(same)


def test_files_of_ones_own(tmp_path):
    path = tmp_path/'mine.yml'
    path.write_text('pleural thickening: {positive: [Thick pleura., "{} seen"], negative: Thin pleura.}\n"*": ["signs of {}"]\n')
    found = prompt_set(path, ['Pleural_Thickening', 'Edema'], dict(edema='lung water'))
    assert found.positive == {'Pleural_Thickening': ['Thick pleura.', 'pleural thickening seen'], 'Edema': ['signs of lung water']} and found.negative == {'Pleural_Thickening': ['Thin pleura.']}
    (tmp_path/'mine.json').write_text(json.dumps({'Edema': ['wet lungs']}))
    assert prompt_set(tmp_path/'mine.json', ['Edema']).positive == {'Edema': ['wet lungs']}


@pytest.mark.parametrize('text, says', [('a: [1, 2]', 'must be sentences'), ('a: {positive: [" "]}', 'must be sentences'), ('a: {negative: [x]}', 'must have positive'), ('a: {positive: [x], neutral: [y]}', 'must have positive'),
    ('[a, b]', 'must map classes'), ('', 'must map classes'), ('a: [x', 'is not valid'), ('a: !!python/object/apply:os.getcwd []', 'is not valid'), ('b: [x]', 'no prompts for the class "a"; it has b'), ('a: []', 'has no positive'), ('a: null', 'must be sentences')])
def test_files_that_are_wrong(tmp_path, text, says):
    path = tmp_path/'p.yaml'
    path.write_text(text)
    with pytest.raises(G2DError, match=says): prompt_set(path, ['a'])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(G2DError, match='cannot be read'): prompt_set(tmp_path/'none.json', ['a'])
    (tmp_path/'b.json').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(G2DError, match='cannot be read|is not valid'): prompt_set(tmp_path/'b.json', ['a'])
    with pytest.raises(G2DError, match='There is no prompt set ".*x.txt"; there is pair'): prompt_set(tmp_path/'x.txt', ['a'])
    with pytest.raises(G2DError, match='no class'): prompt_set('pair', [])


# ------------------------------------------------------------------------------------------------------------ the task
def test_embeddings_are_those_of_the_model_in_evaluation_mode(store, net):
    net.train()
    found = embed_texts(net, ['edema', 'no edema', 'edema'])
    assert net.training and np.array_equal(found[0], found[2]) and np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)
    a, b = embed_images(net, store, batch_size=7), embed_images(net, store)
    assert a == pytest.approx(b, abs=1e-5) and len(a) == len(store)
    net.eval()
    from g2d.data.loading import Augment
    from g2d.tasks.training import films
    images, _ = Augment(SMALL.augment, 64)(films(store, [4]), step=0, train=False)
    with torch.no_grad(): expected = torch.nn.functional.normalize(net.encode_image(images)[0])[0]
    assert b[4] == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_model_that_gives_nan_is_refused(store, net):
    import copy
    broken = copy.deepcopy(net)
    with torch.no_grad(): next(broken.image_projector.parameters()).fill_(float('nan'))
    with pytest.raises(G2DError, match='embeddings of films that are not finite'): embed_images(broken, store)


class Oracle(G2D):
    "Reads the film's number from its first pixels and knows the truth: the task must then find AUROC 1."
    def setup(self, store, classes):
        self.known, self.classes = {store.images[i].tobytes(): label_table(store.index, classes)[i] for i in range(len(store))}, classes
        return self
    def encode_image(self, images):
        rows = [self.known[(x[0].numpy()*255).round().astype(np.uint8).tobytes()] for x in images]
        return (torch.tensor(np.array(rows), dtype=torch.float32)*2 - 1, None, None)
    def encode_text(self, texts):
        out = torch.zeros(len(texts), len(self.classes))
        for k, t in enumerate(texts):
            for c, name in enumerate(self.classes):
                if t in (name, f'no {name}'): out[k, c] = -1 if t.startswith('no ') else 1
        return out


def test_an_oracle_scores_one_and_its_opposite_zero(store):
    classes = ['consolidation', 'nodule', 'pleural effusion', 'cardiomegaly']
    oracle = Oracle(SMALL).setup(store, classes)
    found = evaluate(store, oracle, 'fixed', classes, draws=50)
    assert all(found.metrics[f'{m}_macro'] == 1 for m in ('auroc', 'f1', 'acc', 'mcc')) and found.intervals['auroc_macro'] == (1, 1)
    assert found.predictions['score/nodule'].groupby(found.predictions['truth/nodule']).mean().diff().iloc[1] > 0
    oracle.known = {k: ~v for k, v in oracle.known.items()}
    assert evaluate(store, oracle, 'fixed', classes, draws=0).metrics['auroc_macro'] == 0


def test_end_to_end_on_phantoms(store, net):
    found = evaluate(store, net, 'demo', draws=100)
    assert 0 < found.metrics['auroc_macro'] < 1 and len(found.predictions) == len(store.select('test')) == found.about['test_films']
    assert set(found.about) >= {'start', 'weights', 'protocol', 'scheme', 'leaks', 'seconds', 'thresholds', 'prompts', 'degenerate', 'positives'}
    assert found.about['prompts']['name'] == 'own' and found.about['protocol']['threshold'] == 'validation'
    assert not any('test_chosen' in m for m in found.metrics)
    by_hand = np.mean([auroc(found.predictions[f'truth/{c}'].to_numpy(), found.predictions[f'score/{c}'].to_numpy()) for c in found.about['classes'] if f'auroc/{c}' in found.metrics])
    assert found.metrics['auroc_macro'] == pytest.approx(by_hand)
    val = evaluate(store, net, 'demo', draws=0, cache={})
    assert val.metrics == pytest.approx(found.metrics)          # a cache, and no draws, change nothing
    assert {f'roc/{c}' for c in found.about['classes'] if f'auroc/{c}' in found.metrics} <= set(found.curves)
    low, high = found.intervals['auroc_macro']
    assert low < found.metrics['auroc_macro'] < high


def test_thresholds_come_from_validation_unless_it_says_test(store, net):
    fixed, paper = evaluate(store, net, 'fixed', draws=0), evaluate(store, net, 'as_paper', draws=0)
    assert {k: v for k, v in paper.metrics.items() if 'test_chosen' not in k} == pytest.approx(fixed.metrics)
    assert paper.metrics['f1_macro_test_chosen'] > fixed.metrics['f1_macro'] and set(paper.about['thresholds']) == {'', '_test_chosen'}
    mcc = evaluate(store, net, 'as_paper', draws=0, cut_by='mcc')
    assert mcc.metrics['mcc_macro_test_chosen'] >= paper.metrics['mcc_macro_test_chosen']
    assert evaluate(store, net, 'as_medklip', ['Pleural_Thickening', 'nodule'], draws=0).about['protocol']['names'] == 'medklip'


def test_the_cache_saves_a_pass(store, net, monkeypatch):
    import g2d.tasks.zero_shot as room
    calls, cache = [], {}
    real = room.embed_images
    monkeypatch.setattr(room, 'embed_images', lambda *a, **k: calls.append(1) or real(*a, **k))
    first = [evaluate(store, net, 'demo', draws=0, prompts=p, cache=cache).metrics['auroc_macro'] for p in ('pair', 'own', 'gloria')]
    assert len(calls) == 2 and first == pytest.approx([evaluate(store, net, 'demo', draws=0, prompts=p).metrics['auroc_macro'] for p in ('pair', 'own', 'gloria')], abs=1e-6)


def test_degenerate_classes_are_named(store, net):
    found = evaluate(store, net, 'demo', ['nodule', 'hernia'], draws=0)
    assert found.about['degenerate'] == {'never positive in test': ['hernia']} and found.metrics['auroc_macro'] == found.metrics['auroc/nodule'] and 'auroc/hernia' not in found.metrics
    with pytest.raises(G2DError, match='No class can be tested: hernia, ptx are never positive in test'): evaluate(store, net, 'demo', ['hernia', 'ptx'])
    assert degenerate(np.array([[1, 0, 1], [1, 0, 0]], bool), list('abc')) == {'never positive in test': ['b'], 'always positive in test': ['a']}


def test_a_class_without_validation_positives_has_no_threshold(store, net):
    keep = (store.index['split'] != 'val') | ~store.index['labels'].map(lambda l: 'nodule' in l)
    found = evaluate(store.select(where=keep.to_numpy(bool)), net, 'as_paper', ['nodule', 'pleural effusion'], draws=0)
    assert found.about['no_threshold'] == ['nodule'] and 'f1/nodule' not in found.metrics and 'f1_test_chosen/nodule' in found.metrics and 'auroc/nodule' in found.metrics
    assert found.metrics['f1_macro'] == found.metrics['f1/pleural effusion']


def small_store(path, labels, split=('val', 'test')):
    with StoreWriter(path, size=64) as writer:
        for i, l in enumerate(labels): writer.add(np.full((64, 64), 5*i + 5, np.uint8), image_id=str(i), patient_id=str(i), split=split[i % len(split)], labels=l)
    return RadiographStore.open(path)


def test_bad_input_is_refused_in_a_sentence(store, net, tmp_path):
    with pytest.raises(G2DError, match='has no labels: zero_shot needs'): evaluate(small_store(tmp_path/'a', [None]*6, ('train', 'val', 'test')), net)
    with pytest.raises(G2DError, match='no label that names a finding'): evaluate(small_store(tmp_path/'b', [['No Finding'], []]*3, ('train', 'val', 'test')), net)
    with pytest.raises(G2DError, match='expected validation or test'): evaluate(store, net, threshold='best')
    with pytest.raises(G2DError, match='part is "train"'): evaluate(store, net, part='train')
    with pytest.raises(G2DError, match='no setting "prompt"'): evaluate(store, net, prompt='own')
    with pytest.raises(G2DError, match='There is no prompt set "best"'): evaluate(store, net, prompts='best')
    with pytest.raises(G2DError, match='need a G2D checkpoint'): find_model('imagenet')
    path = tmp_path/'weights.safetensors'; path.write_bytes(b'broken')
    with pytest.raises(G2DError, match='weights.safetensors'): evaluate(store, path)


def test_films_of_the_pre_training_are_refused(store, tmp_path):
    from g2d.data.splits import fingerprints
    checkpoint = Checkpoint.of(find_model('untrained', SMALL)[0])
    train = store.select('train')
    checkpoint.seen = torch.as_tensor(fingerprints(train.index, store.manifest.get('source', '')))
    checkpoint.save(tmp_path/'c.safetensors')
    assert evaluate(store, tmp_path/'c.safetensors', 'demo', draws=0).about['start'] == 'G2D'
    with pytest.raises(G2DError, match='pre-training'): evaluate(store, tmp_path/'c.safetensors', 'demo', draws=0, part='rest')
    assert evaluate(store, find_model('untrained', SMALL)[0], 'demo', draws=0, part='rest').about['test_films'] == len(store) - len(store.select('val'))


def test_untrained_is_seeded_and_leaves_the_generator_alone():
    torch.manual_seed(1); expected = torch.rand(3)
    torch.manual_seed(1)
    a, b, c = (find_model('untrained', SMALL, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    first = lambda m: m.image_projector.state_dict()
    assert all(torch.equal(v, first(b)[k]) for k, v in first(a).items()) and not all(torch.equal(v, first(c)[k]) for k, v in first(a).items())


# ------------------------------------------------------------------------------------------------------------ one of several
def test_zscore_and_exclusive_rows():
    rng = np.random.default_rng(0)
    s = rng.normal(size=(60, 3))*[1, 10, .1] + [0, 50, -3]
    expected = ((s - s.mean(0))/s.std(0)).argmax(1)
    assert np.array_equal(zscore_choice(s), expected) and len(set(expected)) == 3 and set(s.argmax(1)) == {1}
    assert zscore_choice(np.ones((4, 3))).tolist() == [0]*4
    labels = [['A']]*5 + [['A', 'B']] + [['b', 'No Finding']]*3 + [[], None, ['C']]
    rows, which = exclusive_rows(labels, ['A', 'B'], per_class=3)
    assert len(rows) == 6 and all(labels[r] in (['A'], ['b', 'No Finding']) for r in rows) and which.tolist() == [0]*3 + [1]*3
    with pytest.raises(G2DError, match='Fewer than two of the classes A, D'): exclusive_rows(labels, ['A', 'D'])


def test_one_of_several(store, net):
    classes = ['consolidation', 'nodule', 'pleural effusion', 'cardiomegaly']
    class Sure(Oracle):
        def encode_image(self, images): return (super().encode_image(images)[0].clamp(min=0), None, None)
    found = one_of_several(store, Sure(SMALL).setup(store, classes), 'fixed', classes, part='rest', draws=30)
    assert found.metrics['acc'] == found.metrics['f1_macro'] == 1 and found.metrics['chance_acc'] == .25 and np.array_equal(np.diag(found.curves['confusion']), list(found.about['films'].values()))
    other = one_of_several(store, net, 'fixed', prompts='gloria', sample=5, ensemble='max', part='rest', per_class=2, draws=0)
    assert max(other.about['films'].values()) <= 2 and other.curves['confusion'].sum() == len(other.predictions)
    assert other.metrics['acc'] == pytest.approx((other.predictions['truth'] == other.predictions['chosen']).mean())
    only = store.select(where=np.array([l == [] for l in store.index['labels']]) | (np.arange(len(store)) % 9 == 0))
    assert find_classes(only.index)


# ------------------------------------------------------------------------------------------------------------ the notebook
def test_notebook_on_phantoms(outputs, tmp_path, net):
    Checkpoint.of(net).save(tmp_path/'c.safetensors')
    (tmp_path/'mine.yaml').write_text('"*": {positive: ["{}"], negative: ["no {}"]}')
    folder = run_notebook('zero_shot', dict(store='phantoms:60', checkpoint=str(tmp_path/'c.safetensors'), protocol='as_paper', prompts=['pair', str(tmp_path/'mine.yaml')], ensembles=['embedding'], draws=50), progress=False)
    table, metrics = pd.read_csv(folder/'results.csv'), read_json(folder/'metrics.json')
    assert {'method', 'metric', 'value', 'low', 'high', 'protocol', 'store', 'seed'} <= set(table) and set(table.model) == {'G2D', 'untrained'}
    same = table[table.metric == 'auroc_macro'].set_index(['model', 'prompts']).value
    assert same['G2D', 'pair'] == pytest.approx(same['G2D', 'mine']) and same['G2D', 'pair'] != same['untrained', 'pair']
    assert {'auroc.png', 'curves.png', 'cases.png'} <= {p.name for p in (folder/'figures').iterdir()} and 'G2D, f1_macro_test_chosen' in metrics and 'trivial_f1_macro' in metrics
    assert read_json(folder/'zero_shot'/'result.json')['about']['protocol']['name'] == 'as_paper'


@pytest.mark.parametrize('name, part', [('real:covid', 'test'), ('real:nih', 'rest')])
def test_notebook_on_real_films(outputs, data_root, tmp_path, net, name, part):
    "A tiny model with random weights: the road is tested, not the model."
    Checkpoint.of(net).save(tmp_path/'c.safetensors')
    folder = run_notebook('zero_shot', dict(store=name, checkpoint=str(tmp_path/'c.safetensors'), protocol='fixed', part=part, prompts=['pair'], ensembles=['embedding'], draws=30), progress=False)
    metrics = read_json(folder/'metrics.json')
    assert 0 < metrics['G2D, auroc_macro'] < 1 and metrics['test_films'] >= (300 if 'nih' in name else 10)
    result = read_json(folder/'zero_shot'/'result.json')
    assert result['about']['classes'] == (result['about']['classes'] if 'covid' in name else sorted(result['about']['classes'], key=str.lower)) and 'No Finding' not in result['about']['classes']
    if 'covid' in name: assert metrics['left_out'] > 0
