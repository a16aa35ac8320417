"Questions: exact answers of phantoms, balance, respondents who do not look, a network that must look, folds, the real set, and the notebook."
import json
from collections import Counter
import numpy as np
import pandas as pd
import pytest
import torch
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import PHANTOM_FINDINGS, _plan, _told_of, make_phantom_store, phantom_questions
from g2d.data.store import RadiographStore, StoreWriter
from g2d.models.comparators import build_model, comparator
from g2d.models.text_encoder import pool_tokens
from g2d.profiles import profile
from g2d.runs import run_notebook
from g2d.settings import G2DError
from g2d.tasks.protocols import protocol
from g2d.tasks.training import find_start, patient_interval
from g2d.tasks.vqa import (Majority, VQANet, WAYS, accuracy_figure, confusion_figure, evaluate, films_figure, finetune, fold_views, fusion_model, known_answers, load_net, normal_answer, pooled,
                           questions_of, save_net, vqa_metrics)

TINY = dict(image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=[32, 16, 16, 8],
            report_decoder=[64, 2, 4], memory_slots=64, memory_topk=8)
SMALL = profile('demo', **TINY)


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('vqa')/'store', 60, size=64, seed=6, split=dict(train=.5, val=.2, test=.3))


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    import g2d.settings
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    return tmp_path


def plans(seed, n):
    "(extra as a store keeps it, view, id) of phantoms that are not drawn."
    for i in range(n):
        _, shot, findings, _, _ = _plan(seed, i)
        yield dict(findings=[_told_of(f) for f in findings], devices=shot.devices), shot.view, f'phantom-{seed}-{i:06d}'


def truth(q, extra, view):
    "The answer to a question, read from its words."
    text, findings = q['question'].lower(), extra['findings']
    if 'pa' in text.rstrip('?').split() or 'ap' in text.split(): return view
    if 'number of findings' in text or 'how many' in text: return str(len(findings))
    name = next((l for l in sorted([*PHANTOM_FINDINGS, 'ecg leads', 'central line', 'pacemaker', 'sternal wires'], key=len, reverse=True) if l in text))
    if q['type'] in ('PRES', 'DEVICE'): return 'yes' if name in [f['label'] for f in findings] + [d.lower() for d in extra['devices']] else 'no'
    f, = [f for f in findings if f['label'] == name]
    if 'mm' in text: return 'yes' if f['size_mm'] > int(''.join(c for c in text if c.isdigit())) else 'no'
    return f['side'] if 'side' in text or 'left' in text else f['zone'] if 'zone' in text else f['size'] if 'large' in text or 'size' in text else f['severity']


def test_answers_of_phantoms_are_true():
    kinds = Counter()
    for extra, view, name in plans(21, 700):
        for q in phantom_questions(extra, view, name):
            assert q['answer'] == truth(q, extra, view), (q, extra)
            kinds[q['type']] += 1
    assert set(kinds) == {'PRES', 'SIDE', 'ZONE', 'SIZE', 'COUNT', 'PLANE', 'DEVICE'} and min(kinds.values()) > 100


def test_questions_cannot_be_answered_without_the_film():
    rows = pd.DataFrame([q for extra, view, name in plans(22, 2000) for q in phantom_questions(extra, view, name)])
    for text, answers in rows.groupby('question')['answer']:
        share = answers.value_counts(normalize=True)
        if len(answers) >= 200: assert share.iloc[0] < 1/len(share) + .1, (text, share.to_dict())
    assert (rows[rows['answer_type'] == 'CLOSED']['answer'] == 'yes').mean() < .45      # sides and views are closed, too
    first = list(plans(22, 1))[0]
    assert phantom_questions(*first) == phantom_questions(*first) and any(phantom_questions(*p) != phantom_questions(*p, seed=1) for p in plans(22, 5))


def test_normal_answers():
    for text, plain in (('Yes', 'yes'), ('no.', 'no'), (' The  right lung', 'right lung'), ('Three', '3'), ('1.5 x 1.8 cm', '1.5 x 1.8 cm'), ('X-ray', 'x-ray'), ('AP/PA?', 'ap/pa')): assert normal_answer(text) == plain


def asked(rows): return pd.DataFrame(rows, columns=['row', 'patient_id', 'question', 'answer', 'type', 'answer_type']).assign(image_id=lambda d: d['row'].astype(str))


def test_known_answers_and_majorities():
    a = asked([(0, 'p', 'Is it?', 'yes', 'PRES', 'CLOSED'), (1, 'q', 'Is it?', 'no', 'PRES', 'CLOSED'), (2, 'q', 'Is that?', 'no', 'PRES', 'CLOSED'), (3, 'r', 'Is it?', 'yes', 'PRES', 'CLOSED'), (3, 'r', 'Has it?', 'no', 'PRES', 'CLOSED'),
               (4, 'r', 'Where?', 'left', 'POS', 'OPEN'), (5, 's', 'Where?', 'right', 'POS', 'OPEN'), (6, 's', 'Where?', 'right', 'POS', 'OPEN')])
    assert known_answers(a, 2) == ['no', 'right', 'yes'] or known_answers(a, 2) == ['no', 'yes', 'right']
    assert 'left' not in known_answers(a, 2) and 'left' in known_answers(a, 1)
    m = Majority(a)
    new = asked([(0, 'p', 'is IT?', 'no', 'PRES', 'CLOSED'), (1, 'p', 'Never asked?', 'yes', 'PRES', 'CLOSED'), (2, 'p', 'Where now?', 'left', 'POS', 'OPEN'), (3, 'p', 'What?', 'x', 'COLOR', 'OPEN')])
    assert m.by_type(new) == ['no', 'no', 'right', 'right'] and m.by_question(new) == ['yes', 'no', 'right', 'right']
    again = Majority(tables=json.loads(json.dumps(m.tables)))
    assert again.by_question(new) == m.by_question(new)
    with pytest.raises(G2DError, match='expected at least two'): known_answers(a[:1])


def test_metrics_against_counting():
    rng = np.random.default_rng(0)
    a = asked([(i, f'p{i//3}', 'q', ('yes', 'no', 'left')[k := rng.integers(3)], 'PRES' if k < 2 else 'SIDE', 'CLOSED' if k < 2 else 'OPEN') for i in range(60)])
    for name in ('said', 'said_majority', 'said_question_only'): a[name] = rng.choice(['yes', 'no', 'left'], 60)
    metrics, intervals = vqa_metrics(a, draws=100)
    for column, prefix in (('said', ''), ('said_majority', 'majority_'), ('said_question_only', 'question_only_')):
        right = a['answer'] == a[column]
        assert metrics[prefix + 'accuracy'] == pytest.approx(right.mean()) and metrics[prefix + 'accuracy_closed'] == pytest.approx(right[a['answer_type'] == 'CLOSED'].mean()) and metrics[prefix + 'accuracy/SIDE'] == pytest.approx(right[a['type'] == 'SIDE'].mean())
        assert metrics[prefix + 'balanced_yes_no'] == pytest.approx(np.mean([right[a['answer'] == x].mean() for x in ('yes', 'no')]))
    assert metrics['gain'] == pytest.approx(metrics['accuracy'] - metrics['question_only_accuracy']) and 'gain_over_shuffled' not in metrics
    assert intervals['gain_closed'] == patient_interval(a['patient_id'][a['answer_type'] == 'CLOSED'], ((a['answer'] == a['said']).astype(float) - (a['answer'] == a['said_question_only']))[a['answer_type'] == 'CLOSED'], 100)


def test_films_are_encoded_once_and_equal_fuse():
    torch.manual_seed(0)
    net = VQANet(find_start('random', SMALL), ['yes', 'no', 'left']).eval()
    images, questions, of = torch.rand(2, 1, 64, 64), ['Is it?', 'Where is the heart now?', 'Which?'], torch.tensor([1, 0, 1])
    with torch.no_grad():
        hidden, mask = net.mpma.fuse(images[of], questions)
        assert torch.allclose(net(images, questions, of), net.head(pool_tokens(hidden, mask, 'mean')), atol=1e-5)
        blind = VQANet(find_start('random', SMALL), ['yes', 'no'], sees=False).eval()
        assert torch.equal(blind(images[:1], ['Is it?']), blind(images[1:], ['Is it?'])) and not torch.equal(net(images[:1], ['Is it?']), net(images[1:], ['Is it?']))


def test_what_a_start_brings(tmp_path):
    torch.manual_seed(0)
    trained = build_model(comparator('mpma', SMALL))
    net, how = fusion_model(find_start(Checkpoint.of(trained)))
    mine, theirs = net.state_dict(), trained.state_dict()
    assert how == 'trained' and all(torch.equal(v, theirs[k]) for k, v in mine.items()) and any(k.startswith('report_decoder.memory') for k in mine) and not any(k.startswith(('text_', 'pool', 'decoder')) for k in mine)
    plain = build_model(comparator('global_only', SMALL))
    net, how = fusion_model(find_start(Checkpoint.of(plain)))
    assert how == 'fresh' and torch.equal(net.state_dict()['image_encoder.net.conv1.weight'], plain.state_dict()['image_encoder.net.conv1.weight']) and 'pre-training' in net.image_encoder.weights
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in mine.items()}             # the same module, so a fair baseline
    mute, how = fusion_model(find_start(Checkpoint.of(build_model(comparator('mpma', SMALL, word_weight=0.)))))
    assert how == 'fresh' and mute.report_decoder is not None


@pytest.fixture(scope='module')
def bright(tmp_path_factory):
    "Bright and dark films; whether a film is bright can only be seen, how the weather is can be known."
    path, rng = tmp_path_factory.mktemp('bright')/'store', np.random.default_rng(0)
    with StoreWriter(path, size=64, source='bright') as writer:
        for i in range(72):
            qa = [dict(question='Is it bright?', answer=('No', 'yes')[i % 2], type='PRES', answer_type='CLOSED'), dict(question='How is it?', answer='fine', type='OTHER', answer_type='OPEN'), dict(question='Who?', answer=f'only {i}', type='OTHER', answer_type='OPEN')]
            writer.add((rng.random((64, 64))*60 + 150*(i % 2)).astype(np.uint8), image_id=f'i{i}', patient_id=f'p{i}', split=('train', 'train', 'val', 'train', 'train', 'val', 'test', 'test')[i % 8], extra=dict(qa=qa))
    return RadiographStore.open(path)


def test_a_network_that_looks_beats_those_who_do_not(bright, tmp_path):
    p = protocol('vqa', 'demo', epochs=12, augment='none', lr=3e-3, dropout=0.)
    found = finetune(bright, 'random', p, profile=SMALL, steps=24, draws=100, out=tmp_path)
    m = found.metrics
    assert m['accuracy_closed'] == 1 and m['question_only_accuracy_closed'] <= .6 and m['majority_accuracy_closed'] <= .6 and m['shuffled_accuracy_closed'] < .6 and m['gain_closed'] >= .4
    assert m['accuracy_open'] == .5 and m['answerable'] == pytest.approx(2/3) and m['question_only_accuracy/OTHER'] == .5        # "only 17" cannot be known; "fine" needs no film
    assert 'caution' in found.about and found.about['learnt_questions'] == 2*found.about['train_questions']//3
    again = finetune(bright, 'random', p, profile=SMALL, steps=24, draws=0, out=tmp_path)                                     # continues after the last step
    assert again.predictions['said'].tolist() == found.predictions['said'].tolist() and again.about['steps'] == 24
    loaded = evaluate(bright, tmp_path, draws=0)
    assert loaded.predictions['said'].tolist() == found.predictions['said'].tolist() and loaded.predictions['probability'].tolist() == pytest.approx(found.predictions['probability'].tolist(), abs=1e-6)
    assert 'question_only_accuracy' not in loaded.metrics and 'lookup_accuracy' in loaded.metrics
    with pytest.raises(G2DError, match='network from random'): evaluate(bright, tmp_path, part='all')


def test_frozen_means_frozen(store):
    found = finetune(store, 'random', protocol('vqa', 'demo', freeze='all'), profile=SMALL, steps=2, draws=0, blind=False)
    assert found.about['encoder_unchanged'] and 'question_only_accuracy' not in found.metrics and found.about['fusion'] == 'fresh'
    assert not finetune(store, 'random', 'demo', profile=SMALL, steps=2, draws=0, blind=False).about['encoder_unchanged']


def test_folds(bright):
    parts = [fold_views(bright, k, 4) for k in range(4)]
    for train, val, test, about in parts:
        sets = [set(v.index['patient_id']) for v in (train, val, test)]
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2]) and sum(map(len, sets)) == 72 and about['test_films'] == len(test)
    assert sorted(i for p in parts for i in p[2].index['image_id']) == sorted(bright.index['image_id'])
    for k, n in ((0, 2), (4, 4), (0, 100)):
        with pytest.raises(G2DError, match='fold is'): fold_views(bright, k, n)
    results = [finetune(bright, 'random', 'demo', profile=SMALL, steps=1, draws=0, fold=(k, 3), blind=False) for k in range(3)]
    both = pooled(results, draws=20)
    assert both.metrics['films'] == 72 and both.metrics['accuracy'] == pytest.approx(np.average([r.metrics['accuracy'] for r in results], weights=[r.metrics['questions'] for r in results]))
    with pytest.raises(G2DError, match='test of two folds'): pooled([results[0], results[0]])


def test_questions_of_a_phantom_store(store):
    found = questions_of(store)
    row = found.iloc[0]
    extra = json.loads(store.index['extra'].iloc[row['row']])
    assert 'qa' not in extra and row['question'] == phantom_questions(extra, store.index['view'].iloc[row['row']], row['image_id'])[0]['question']     # made on reading; the store is as before
    assert (found['image_id'] == store.index['image_id'].to_numpy()[found['row']]).all()


def test_figures(store):
    found = finetune(store, 'random', 'demo', profile=SMALL, steps=1, draws=20)
    assert all(f.axes for f in (accuracy_figure(found), confusion_figure(found), films_figure(found, store, 2)))
    shuffled = found.predictions
    assert {'said', 'said_majority', 'said_lookup', 'said_question_only', 'said_shuffled', 'probability'} <= set(shuffled) and set(WAYS) == {'model', 'majority', 'lookup', 'question_only', 'shuffled'}


def test_bad_input(store, bright, tmp_path):
    with StoreWriter(tmp_path/'mute', size=64) as writer:
        for i in range(6): writer.add(np.full((64, 64), i, np.uint8), image_id=str(i), patient_id=str(i), split=('train', 'val', 'test')[i % 3])
    with pytest.raises(G2DError, match='has no questions'): finetune(RadiographStore.open(tmp_path/'mute'), 'random', 'demo', profile=SMALL)
    with pytest.raises(G2DError, match='freeze is'): finetune(store, 'random', protocol('vqa', 'demo', freeze='half'), profile=SMALL)
    with pytest.raises(G2DError, match='no question-answering network'): evaluate(store, tmp_path/'nothing')
    Checkpoint.of(build_model(SMALL)).save(tmp_path/'c.safetensors')
    with pytest.raises(G2DError, match='answers no questions'): load_net(tmp_path/'c.safetensors')
    (tmp_path/'broken.safetensors').write_bytes(b'no')
    with pytest.raises(G2DError, match='damaged'): load_net(tmp_path/'broken.safetensors')
    with pytest.raises(G2DError, match='has no findings'): phantom_questions({}, 'PA', 'film')


def test_real_questions(data_root, outputs):
    from g2d.tasks.stores import find_store
    data = find_store('real:vqa_rad', 64)
    found = questions_of(data)
    assert len(data) == 75 and set(data.schemes) == {'fixed', 'official'} and (found['answer_type'] == 'CLOSED').sum() == 575 and len(found) == 862
    assert {'yes', 'no'} <= set(found['answer']) and not found['answer'].str.contains('[A-Z]').any()
    split = data.index.groupby('patient_id')['split'].nunique()
    assert (split == 1).all() and set(data.index['split']) == {'train', 'val', 'test'}


def test_the_notebook_runs(outputs):
    folder = run_notebook('vqa', dict(store='phantoms:50', steps=2, draws=20), progress=False)
    metrics = json.loads((folder/'metrics.json').read_text())
    assert {'random, accuracy', 'random, question_only_accuracy', 'random, majority_accuracy_closed', 'random, gain'} <= set(metrics)
    assert {p.name for p in (folder/'figures').glob('*.png')} == {'accuracy_0.png', 'confusion.png', 'films.png', 'loss.png'}
