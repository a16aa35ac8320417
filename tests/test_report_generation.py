"Report generation: overlap against nltk and rouge_score, rules against the truth of phantoms, mask filling against a loop, a model that must look, and the notebook."
import json
from collections import Counter
from functools import lru_cache
import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import PHANTOM_FINDINGS, make_phantom_store, phantom
from g2d.data.store import StoreWriter
from g2d.models.comparators import comparator
from g2d.models.g2d import G2D
from g2d.models.mpma import MPMA
from g2d.profiles import profile
from g2d.runs import run_notebook
from g2d.settings import G2DError
from g2d.tasks.report_generation import (WAYS, bleu, bleu_counts, common_words, evaluate, examples_figure, fill_masks, fixed_report, hidden_words_figure, label_f1, memory_use, named_findings,
                                         report_metrics, report_words, rouge_l, scores_figure, write_reports)

TINY = dict(image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=[32, 16, 16, 8],
            report_decoder=[64, 2, 4], memory_slots=64, memory_topk=8)
SMALL = comparator('mpma', 'demo', **TINY)


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('rg')/'store', 60, size=64, seed=6, split=dict(train=.5, val=.1, test=.4))


@pytest.fixture(scope='module')
def untrained():
    torch.manual_seed(0)
    return MPMA(SMALL).eval()


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    import g2d.settings
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    return tmp_path


def texts(n, seed, least=1, words='the heart is large no effusion in left lung right clear 18 mm'.split()):
    rng = np.random.default_rng(seed)
    return [' '.join(rng.choice(words, rng.integers(least, 30))) for _ in range(n)]


def test_bleu_equals_nltk():
    nltk = pytest.importorskip('nltk.translate.bleu_score', exc_type=ImportError)
    a, b = texts(40, 0, 4), texts(40, 1, 4)      # nltk counts one 4-gram in a text of three words
    a[:12] = [' '.join(t.split()[::-1][:9] + t.split()) for t in b[:12]]      # some real overlap, also of 4-grams
    for one, two in ((a, b), (b, a), (a[:12], b[:12])):
        ours = bleu(sum(bleu_counts(x, y) for x, y in zip(one, two)))
        for n in range(1, 5):
            want = nltk.corpus_bleu([[report_words(y)] for y in two], [report_words(x) for x in one], [1/n]*n)
            assert ours[n-1] == pytest.approx(want, abs=1e-9)


def test_bleu_by_hand():
    # "the cat the cat" against "the cat sat": clipped 2 of 4 words, 1 of 3 pairs, no triple; long enough
    found = bleu(bleu_counts('the cat the cat', 'the cat sat'))
    assert found[0] == pytest.approx(.5) and found[1] == pytest.approx((.5*1/3)**.5) and found[2] == found[3] == 0
    assert bleu(bleu_counts('the cat', 'the cat sat on'))[0] == pytest.approx(np.exp(1 - 4/2))     # two of two words, but short
    assert bleu(bleu_counts('', 'the cat')).tolist() == [0]*4 and bleu(np.zeros((3, 10))).shape == (3, 4)


def test_rouge_equals_rouge_score():
    scorer = pytest.importorskip('rouge_score.rouge_scorer', exc_type=ImportError).RougeScorer(['rougeL'])
    for a, b in zip(texts(60, 2), texts(60, 3)): assert rouge_l(a, b, beta=1.) == pytest.approx(scorer.score(b, a)['rougeL'].fmeasure, abs=1e-9)


def longest(a, b):
    "The length of the longest common subsequence, by its definition."
    @lru_cache(None)
    def f(i, j): return 0 if i == len(a) or j == len(b) else 1 + f(i + 1, j + 1) if a[i] == b[j] else max(f(i + 1, j), f(i, j + 1))
    return f(0, 0)


def test_common_words_is_a_longest_common_subsequence():
    for a, b in zip(texts(50, 4), texts(50, 5)):
        a, b = report_words(a), report_words(b)
        places = common_words(a, b)
        assert places == sorted(set(places)) and len(places) == longest(tuple(a), tuple(b))
        left = iter(b)
        assert all(a[i] in left for i in places)                                                   # in this order in b
    assert common_words([], ['a']) == common_words(['a'], []) == []
    p, r, beta = 2/3, 2/4, 1.2
    assert rouge_l('lungs are bad', 'the lungs are clear') == pytest.approx((1 + beta**2)*p*r/(r + beta**2*p))


def test_rules_read_the_reports_of_phantoms():
    wrong = [(i, p.labels, named_findings(p.text)) for i in range(120) if set((p := phantom(31, 64, i)).labels) != named_findings(p.text)]
    assert not wrong, wrong[:3]


@pytest.mark.parametrize('text, found', [
    ('No pleural effusion or pneumothorax.', ''), ('Neither effusion nor pneumothorax is seen, but there is a nodule.', 'nodule'), ('The heart is not enlarged.', ''), ('Lungs are clear without consolidation.', ''),
    ('Small left pleural effusion without pneumothorax.', 'pleural effusion'), ('The right lower zone nodule has resolved and the left pleural effusion has increased.', 'pleural effusion'),
    ('Likely pulmonary edema. Edema cannot be excluded.', 'edema'), ('A 5.0 cm mass in the left upper zone.', 'mass'), ('The cardiac silhouette is mildly enlarged.', 'cardiomegaly'), ('', '')])
def test_denials(text, found): assert named_findings(text) == set(filter(None, [found]))


def test_labels_without_a_rule_are_found_by_their_words():
    assert named_findings('Pleural thickening, no fracture.', ['Pleural_Thickening', 'Fracture', 'Mass']) == {'Pleural_Thickening'}


def test_label_f1_equals_scikit_learn():
    rng = np.random.default_rng(0)
    named, true = rng.random((50, 5)) < .4, rng.random((50, 5)) < .3
    true[:, 4] = False                                                                             # a class without truth is in no mean
    micro, macro = label_f1(named, true)
    assert macro[0] == pytest.approx(f1_score(true[:, :4], named[:, :4], average='macro')) and micro[0] == pytest.approx(f1_score(true, named, average='micro'))
    rows = rng.integers(0, 50, 50)
    assert label_f1(named, true, np.bincount(rows, minlength=50)[None].astype(float))[0] == pytest.approx(label_f1(named[rows], true[rows])[0])
    assert np.isnan(label_f1(named[:3], np.zeros((3, 5)))[0][0]) and label_f1(true, true)[1][0] == 1


def test_intervals_resample_films():
    written, true, labels = texts(20, 6), texts(20, 7), np.random.default_rng(1).random((20, 2)) < .5
    patients = np.array([f'p{i//2}' for i in range(20)])
    metrics, intervals, _ = report_metrics(written, true, labels, ['nodule', 'mass'], patients, draws=200)
    assert metrics['bleu1'] == pytest.approx(bleu(sum(bleu_counts(a, b) for a, b in zip(written, true)))[0]) and metrics['distinct'] == len(set(written))/20
    assert all(low <= metrics[k] <= high for k, (low, high) in intervals.items() if metrics[k] == metrics[k])
    perfect = report_metrics(true, true, labels, [], patients, draws=0)[0]
    assert perfect['bleu4'] == pytest.approx(1) or perfect['bleu4'] > .99
    assert perfect['rouge_l'] == 1 and not any(k.startswith('label') for k in perfect)


def one_by_one(logits_of, ids, mask, forbidden, steps):
    "Mask-predict of one text, place by place."
    ids, slots = list(ids), [i for i, t in enumerate(ids) if t == mask]
    sure = {}
    for t in range(steps):
        n = len(slots) if t == 0 else len(slots)*(steps - t)//steps
        again = slots if t == 0 else sorted(slots, key=lambda i: (sure[i], i))[:n]
        for i in again: ids[i] = mask
        p = logits_of(torch.tensor([ids]))[0].masked_fill(forbidden, -torch.inf).softmax(-1)
        for i in again: sure[i], ids[i] = float(p[i].max()), int(p[i].argmax())
        if not n: break
    return ids


@pytest.mark.parametrize('steps', [1, 3, 7, 20])
def test_filling_masks_equals_a_loop(steps):
    torch.manual_seed(steps)
    table, forbidden = torch.randn(30, 30, 12), torch.arange(12) < 3
    logits_of = lambda ids: (torch.randn(12, generator=torch.Generator().manual_seed(1)) + torch.stack([table[ids[:, k], (k + ids.sum(1)) % 30] for k in range(ids.shape[1])], 1))
    ids = torch.full((3, 14), 2); ids[:, 0] = 1; ids[0, 9:] = 0; ids[1, 4] = 7                      # [MASK] = 2; padding, and a word that is given
    found, sure, history = fill_masks(logits_of, ids, 2, forbidden, 'confidence', steps, True)
    for k in range(3): assert found[k].tolist() == one_by_one(lambda x: logits_of(x), ids[k].tolist(), 2, forbidden, steps)
    given = ids != 2
    assert (found[given] == ids[given]).all() and not (forbidden[found[~given]]).any() and (sure[given] == 1).all()


def test_left_to_right_fills_one_place_a_round():
    seen = []
    def logits_of(ids): seen.append((ids == 2).sum(1).tolist()); return torch.nn.functional.one_hot(ids.cumsum(1) % 9 + 3, 12)*9.
    ids = torch.full((2, 6), 2); ids[1, 4:] = 0
    found, _, _ = fill_masks(logits_of, ids, 2, torch.arange(12) < 3, 'left_to_right')
    assert seen == [[6, 4], [5, 3], [4, 2], [3, 1], [2, 0], [1, 0]] and not (found == 2).any() and (found[1, 4:] == 0).all()
    with pytest.raises(G2DError, match='decode is'): fill_masks(logits_of, ids, 2, torch.arange(12) < 3, 'beam')


@pytest.mark.parametrize('decode', ['confidence', 'left_to_right'])
def test_written_reports_have_their_lengths_and_do_not_depend_on_the_batch(untrained, decode):
    images = torch.rand(3, 1, 64, 64)
    _, ids, sure, _ = write_reports(untrained, images, [5, 12, 9], decode, 3)
    special = untrained.special[ids]
    assert (~special).sum(1).tolist() == [5, 12, 9] and ids.shape == (3, 14) and (sure > 0).all()
    alone = write_reports(untrained, images[:1], [5], decode, 3)[1]
    assert alone[0, 1:6].tolist() == ids[0, 1:6].tolist()


def test_a_model_that_looks_writes_two_reports(tmp_path):
    "Bright and dark films with two reports: after a minute of steps, the report follows the film, and not the film of another patient."
    rng, said = np.random.default_rng(0), ('no lung effusion there', 'the left heart opacity')
    with StoreWriter(tmp_path/'store', size=64, source='two') as writer:
        for i in range(40): writer.add((rng.random((64, 64))*60 + 150*(i % 2)).astype(np.uint8), image_id=f'i{i}', patient_id=f'p{i}', split='train' if i < 24 else 'val' if i < 28 else 'test', text=said[i % 2])
    from g2d.data.store import RadiographStore
    data = RadiographStore.open(tmp_path/'store')
    torch.manual_seed(0)
    model = MPMA(SMALL.replace(word_mask_ratio=1., image_mask_ratio=0., pixel_weight=0., local='none')).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    films = torch.from_numpy(np.stack([data.images[i] for i in range(12)]))[:, None]/255.
    for _ in range(45):
        extra = model(films, [said[i % 2] for i in range(12)]).extra
        loss = torch.nn.functional.cross_entropy(extra['word_logits'], extra['word_labels'])
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    found = evaluate(data, model, 'demo', draws=50, length='own')
    assert found.metrics['rouge_l'] > .9 and found.metrics['shuffled_rouge_l'] < .4 and found.metrics['gain_rouge_l'] > .5 and found.metrics['distinct'] <= .5
    assert evaluate(data, model, 'demo', draws=0, length='own', decode='left_to_right').metrics['rouge_l'] > .9


def test_end_to_end(store, untrained, tmp_path):
    found = evaluate(store, untrained, 'demo', draws=30, steps=2, limit=8)
    assert len(found.predictions) == 8 == found.metrics['films'] and found.metrics['reader_f1'] == 1 and found.about['label_truth'] == 'labels of the store'
    for prefix in WAYS.values():
        low, high = found.intervals[f'{prefix}bleu1']
        assert low <= found.metrics[f'{prefix}bleu1'] <= high
    train = set(store.select('train').index['text'])
    clean = {' '.join(report_words(t)) for t in train}
    assert all(any(' '.join(report_words(t)) in c.replace('findings ', '').replace('impression ', '') for c in clean) for t in found.predictions['nearest'])    # from the training films
    assert found.predictions['frequent'].nunique() == 1 and {'written', 'shuffled', 'random', 'certainty'} <= set(found.predictions)
    again = evaluate(store, untrained, 'demo', draws=30, steps=2, limit=8)
    assert again.predictions['written'].tolist() == found.predictions['written'].tolist()
    found.save(tmp_path); assert json.loads((tmp_path/'result.json').read_text())['about']['decode'] == 'confidence'
    view = store.select('test')
    for figure in (scores_figure(found), examples_figure(found, store, 2), hidden_words_figure(untrained, view, [0], view.index['text'].tolist()[:1])): assert figure.axes
    used = memory_use(untrained, view, range(5), view.index['text'].tolist()[:5])
    assert used['by_words'].sum() == pytest.approx(8*8) and used['by_patches'].sum() == pytest.approx(8*8) and len(used) == 64      # heads * k rows a query


def test_fixed_report():
    assert fixed_report(['a b', 'c d', 'c d']) == 'c d'
    assert fixed_report(['lungs are clear', 'lungs are clear now', 'something else entirely']) in ('lungs are clear', 'lungs are clear now')


def test_bad_input(store, untrained, tmp_path):
    with pytest.raises(G2DError, match='no report decoder'): evaluate(store, 'untrained', 'demo', profile=profile('demo', **TINY))
    Checkpoint.of(G2D(profile('demo', **TINY))).save(tmp_path/'g2d.safetensors')
    with pytest.raises(G2DError, match='no report decoder, so it cannot write'): evaluate(store, tmp_path/'g2d.safetensors', 'demo')
    with pytest.raises(G2DError, match='length is'): evaluate(store, untrained, 'demo', length='long')
    with pytest.raises(G2DError, match='at least one round'): write_reports(untrained, torch.rand(1, 1, 64, 64), [3], steps=0)
    with pytest.raises(G2DError, match='part is'): evaluate(store, untrained, 'demo', part='train')
    with StoreWriter(tmp_path/'mute', size=64) as writer:
        for i in range(6): writer.add(np.full((64, 64), i, np.uint8), image_id=str(i), patient_id=str(i), split=('train', 'val', 'test')[i % 3])
    from g2d.data.store import RadiographStore
    with pytest.raises(G2DError, match='has no text'): evaluate(RadiographStore.open(tmp_path/'mute'), untrained, 'demo')


def test_the_notebook_runs(outputs):
    folder = run_notebook('report_generation', dict(store='phantoms:60', pretrain_steps=2, steps=2, decode=['confidence'], limit=5, draws=20), progress=False)
    metrics = json.loads((folder/'metrics.json').read_text())
    assert 'nearest, rouge_l' in metrics and any('gain_rouge_l' in k for k in metrics)
    assert {p.name for p in (folder/'figures').glob('*.png')} == {'scores_0.png', 'examples.png', 'hidden_words.png', 'memory.png'}
    assert (folder/'results.csv').is_file() and (folder/'memory_use.csv').is_file()
