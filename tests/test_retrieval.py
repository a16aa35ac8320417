"Retrieval: ranks in blocks against the whole matrix, class measures against brute force and chance, an oracle, and the notebook."
import json
import numpy as np
import pandas as pd
import pytest
import torch
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import make_phantom_store
from g2d.data.store import RadiographStore, StoreWriter
from g2d.files import read_json
from g2d.metrics import retrieval_recall
from g2d.models.g2d import G2D
from g2d.profiles import profile
from g2d.runs import run_notebook
from g2d.settings import G2DError
from g2d.tasks.retrieval import (_blocks, _chance_by_class, class_precision, evaluate, films_figure, gallery_interval, merge_texts, miss, ranks, recall_metrics, reports_figure, top_hits)
from g2d.tasks.training import patient_interval
from g2d.tasks.zero_shot import find_model

SMALL = profile('demo', image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=[32, 16, 16, 8])


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('rt')/'store', 80, size=64, seed=6, split=dict(train=.5, val=.1, test=.4))


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    import g2d.settings
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    return tmp_path


def example(kind, n=83, m=31, seed=0):
    "Film embeddings, embeddings of different texts, number of each film's text."
    rng = np.random.default_rng(seed)
    own = np.concatenate([np.arange(m), rng.integers(0, m, n - m)]); rng.shuffle(own)
    texts = rng.normal(size=(m, 16 if kind == 'coarse' else 8))
    if kind == 'constant': return np.ones((n, 8)), np.ones((m, 8)), own
    if kind == 'perfect': return texts[own], texts, own
    if kind == 'coarse': return np.sign(rng.normal(size=(n, 16))), np.sign(texts), own      # many ties; length 4, so that they are exact
    return rng.normal(size=(n, 8)) + .5*texts[own], texts, own


@pytest.mark.parametrize('kind', ['random', 'perfect', 'constant', 'coarse'])
@pytest.mark.parametrize('memory', [1, 9*31*10, 2**28])
def test_ranks_equal_the_whole_matrix(kind, memory):
    images, texts, own = example(kind)
    of_image, of_text = ranks(images, texts, own, memory)
    known = retrieval_recall(images, texts[own], own, ks=(1, 2, 5, 10, 20))
    found, _ = recall_metrics(of_image, of_text, own, (1, 2, 5, 10, 20))
    assert {k: found[k] for k in known if k in found} == pytest.approx({k: v for k, v in known.items() if k in found}, abs=1e-12)
    unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
    s = unit(images) @ unit(texts).T
    right = own[:, None] == np.arange(31)
    for got, matrix, good in ((of_image, s, right), (of_text, s.T, right.T)):
        best = np.where(good, matrix, -np.inf).max(1, keepdims=True)
        assert got.tolist() == ((matrix >= best - 1e-9) & ~good).sum(1).tolist()


def test_blocks_cover_all_rows_and_stay_small():
    for rows, columns, memory in ((10, 7, 1), (100_000, 100_000, 2**28), (5, 0, 9)):
        parts = _blocks(rows, columns, memory)
        assert sum(p.stop - p.start for p in parts) == rows and parts[0].start == 0 and all(a.stop == b.start for a, b in zip(parts, parts[1:]))
        assert all((p.stop - p.start)*columns*9 <= max(memory, columns*9) for p in parts)


def test_memory_does_not_grow_with_the_matrix():
    import tracemalloc
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4000, 8)), rng.normal(size=(4000, 8))
    tracemalloc.start(); ranks(a, b, np.arange(4000), memory=2**22); peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 20*2**20 < 4000*4000*8      # the whole matrix has 128 MB


def test_median_rank_and_chance():
    images, texts, own = example('random')
    of_image, of_text = ranks(images, texts, own)
    found, values = recall_metrics(of_image, of_text, own)
    assert found['image_to_text_median_rank'] == np.median(of_image) + 1 and found['distinct_texts'] == 31 and found['images'] == 83
    assert found['chance_image_to_text_R@5'] == 5/31
    rng, hits = np.random.default_rng(1), []
    for _ in range(4000): hits.append(np.isin(np.arange(31), own[rng.permutation(83)[:5]]).mean())
    assert found['chance_text_to_image_R@5'] == pytest.approx(np.mean(hits), abs=.01)
    assert values['text_to_image_R@1'].shape == (31,)


def test_ranks_refuse_what_does_not_fit():
    for own in (np.array([0, 5]), np.array([0]), np.array([-1, 0])):
        with pytest.raises(G2DError, match='do not fit together'): ranks(np.ones((2, 3)), np.ones((2, 3)), own)


def brute_precision(q, kind, c, of, k, draws=400):
    "Mean precision and hit over random orders of ties."
    unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
    s, rng, p, h = np.round(unit(q) @ unit(c).T, 9), np.random.default_rng(0), [], []
    for _ in range(draws):
        order = np.lexsort((rng.random(len(c))[None].repeat(len(q), 0), -s), axis=1)[:, :k]
        good = of[order] == kind[:, None]
        p.append(good.mean(1)); h.append(good.any(1))
    return np.mean(p, 0), np.mean(h, 0)


@pytest.mark.parametrize('ties', [False, True])
def test_class_precision_and_hit_by_brute_force(ties):
    rng = np.random.default_rng(3)
    q, c, kind, of = rng.normal(size=(9, 4)), rng.normal(size=(40, 4)), rng.integers(0, 3, 9), rng.integers(0, 3, 40)
    if ties: q, c = np.sign(q), np.sign(c)
    for memory in (1, 2**27):
        found = class_precision(q, kind, c, of, (1, 5, 10, 40, 41), memory)
        assert sorted(found) == [1, 5, 10, 40]
        for k in (1, 5, 10, 40):
            p, h = brute_precision(q, kind, c, of, k)
            assert found[k][0] == pytest.approx(p, abs=.06 if ties else 1e-9) and found[k][1] == pytest.approx(h, abs=.08 if ties else 1e-9)
    assert found[40][0] == pytest.approx([(of == x).mean() for x in kind])


def test_a_model_with_one_answer_gets_chance():
    rng = np.random.default_rng(4)
    of = rng.integers(0, 4, 60)
    found, chance = class_precision(np.ones((60, 3)), of, np.ones((60, 3)), of, (1, 5, 10)), _chance_by_class(of, of, (1, 5, 10))
    for k in (1, 5, 10):
        assert found[k][0].mean() == pytest.approx(chance[k]['P']) and found[k][1].mean() == pytest.approx(chance[k]['H'])
        assert chance[k]['best'] == 1
    assert _chance_by_class(np.array([0]), np.array([0, 0, 1, 1]), (4,))[4]['best'] == .5
    assert miss(10, 0, 3) == 1 and miss(10, 10, 1) == 0 and miss(5, 2, 9) == 0


def test_gallery_interval_equals_drawing_the_films():
    rng = np.random.default_rng(5)
    q, c, kind, of, patients = rng.normal(size=(4, 6)), rng.normal(size=(45, 6)), np.arange(4) % 2, rng.integers(0, 2, 45), rng.integers(0, 20, 45)
    slow = patient_interval(patients, lambda rows: class_precision(q, kind, c[rows], of[rows], (7,))[7][0].mean(), draws=200)
    assert gallery_interval(q, kind, c, of, patients, 7, 200) == pytest.approx(slow, abs=1e-9)


def test_merging():
    assert merge_texts(['a', 'b', 'a'])[1].tolist() == [0, 1, 0] and merge_texts(['a', 'a'], False) == (['a', 'a'], pytest.approx([0, 1]))


class Oracle(G2D):
    "Film and report of the same row have the same random vector."
    def setup(self, store):
        from g2d.validation import with_report_texts
        texts, rng = with_report_texts(store, self.profile).index['text'].tolist(), np.random.default_rng(0)
        self.of_text = {t: rng.normal(size=16) for t in texts}
        self.of_film = {store.images[i].tobytes(): self.of_text[texts[i]] for i in range(len(store))}
        return self
    def encode_image(self, images): return torch.tensor(np.array([self.of_film[(x[0].numpy()*255).round().astype(np.uint8).tobytes()] for x in images])), None, None
    def encode_text(self, texts): return torch.tensor(np.array([self.of_text.get(t, np.ones(16)) for t in texts]))


def test_an_oracle_finds_everything(store):
    found = evaluate(store, Oracle(SMALL).setup(store), 'fixed', draws=50)
    for way in ('image_to_text', 'text_to_image'):
        assert all(found.metrics[f'{way}_R@{k}'] == 1 for k in (1, 5, 10)) and found.metrics[f'{way}_median_rank'] == 1 and found.intervals[f'{way}_R@1'] == (1, 1)
    assert found.metrics['image_to_text_P@1'] == found.metrics['image_to_text_H@1'] == 1 and (found.predictions['rank'] == 1).all()


def test_end_to_end_on_phantoms(store):
    net, _ = find_model('untrained', SMALL)
    found = evaluate(store, net, 'demo', part='all', draws=50)
    known = retrieval_recall(found.curves['images'], found.curves['texts'][found.curves['own']], [found.curves['words'][k] for k in found.curves['own']])
    assert {k: v for k, v in found.metrics.items() if k in known} == pytest.approx({k: v for k, v in known.items() if k != 'chance_R@1'}, abs=1e-9)
    assert len(found.predictions) == 80 and found.about['class_films'] and found.about['left_out_ks'] == [100] and len(found.about['queries']['nodule']) == 5
    for name in ('image_to_text_P@5', 'query_to_image_P@5', 'image_to_text_H@1'):
        low, high = found.intervals[name]
        assert low <= found.metrics[name] <= high and 0 < found.metrics[f'chance_{name}'] < 1
    assert 'query_to_image_H@1' in found.metrics and found.metrics['best_query_to_image_P@10'] <= 1
    plain = evaluate(store, net, 'demo', [], part='all', draws=0)
    assert not any('P@' in k for k in plain.metrics) and plain.metrics['image_to_text_R@5'] == found.metrics['image_to_text_R@5']
    one = evaluate(store, net, 'demo', ['nodule', 'hernia'], part='all', draws=0)
    assert one.about['by_class'].startswith('left out: Fewer than two of the classes nodule, hernia') and 'image_to_text_R@1' in one.metrics
    three = evaluate(store, net, 'demo', ['nodule', 'mass', 'hernia'], part='all', draws=0)
    assert three.about['left_out_classes'] == ['hernia'] and set(three.about['class_films']) == {'nodule', 'mass'}


def test_equal_reports_are_one(tmp_path):
    texts = ['FINDINGS: The lungs are clear today. IMPRESSION: Normal.']*4 + [f'FINDINGS: Effusion number {i} is seen. IMPRESSION: Effusion.' for i in range(4)]
    with StoreWriter(tmp_path/'s', size=64) as writer:
        for i, t in enumerate(texts): writer.add(np.random.default_rng(i).integers(0, 255, (64, 64)).astype(np.uint8), image_id=str(i), patient_id=str(i), split='test', text=t)
    data, net = RadiographStore.open(tmp_path/'s'), find_model('untrained', SMALL)[0]
    found = evaluate(data, net, 'demo', part='all', draws=0)
    assert (found.metrics['images'], found.metrics['distinct_texts']) == (8, 5) and found.metrics['chance_image_to_text_R@1'] == .2
    assert found.about['by_class'].startswith('left out')
    apart = evaluate(data, net, 'demo', part='all', draws=0, merge_same_text=False)
    assert apart.metrics['distinct_texts'] == 8
    with pytest.raises(G2DError, match='matches split|empty|no image|No image'): evaluate(data, net, 'demo')


def test_bad_input(store, tmp_path):
    net, _ = find_model('untrained', SMALL)
    with StoreWriter(tmp_path/'s', size=64) as writer:
        for i in range(6): writer.add(np.full((64, 64), 5*i + 5, np.uint8), image_id=str(i), patient_id=str(i), split=['train', 'val', 'test'][i % 3])
    bare = RadiographStore.open(tmp_path/'s')
    with pytest.raises(G2DError, match='has no text: retrieval needs'): evaluate(bare, net)
    with pytest.raises(G2DError, match='has no text: retrieval needs'): evaluate(bare, net, part='all')
    with pytest.raises(G2DError, match='part is "train"'): evaluate(store, net, part='train')
    with pytest.raises(G2DError, match='no setting "k"'): evaluate(store, net, k=3)
    with pytest.raises(G2DError, match='There is no prompt set "x"'): evaluate(store, net, queries='x')
    from g2d.data.splits import fingerprints
    checkpoint = Checkpoint.of(net)
    checkpoint.seen = torch.as_tensor(fingerprints(store.select('train').index, store.manifest.get('source', '')))
    checkpoint.save(tmp_path/'c.safetensors')
    with pytest.raises(G2DError, match='pre-training'): evaluate(store, tmp_path/'c.safetensors', part='all')
    assert evaluate(store, tmp_path/'c.safetensors', 'demo', draws=0).about['start'] == 'G2D'


def test_figures_frame_what_is_right(store):
    hits = top_hits(np.eye(3), np.eye(3)[[2, 0, 1, 0]], 2)
    assert hits.tolist() == [[1, 3], [2, 0], [0, 1]]
    figure = films_figure(store, ['a nodule', 'a mass'], np.array([[0, 1], [2, 3]]), np.array([[True, False], [False, True]]))
    from g2d.views import COLOURS
    from matplotlib.colors import to_hex
    frames = [[to_hex(ax.spines['left'].get_edgecolor()) == COLOURS['truth'] for ax in figure.axes[r*3+1:r*3+3]] for r in range(2)]
    assert frames == [[True, False], [False, True]]
    figure = reports_figure(store, [0, 1], ['one', 'two', 'three'], np.array([[0, 2], [1, 2]]), np.array([2, 0]), [2, 3])
    texts = [t for ax in figure.axes[1::2] for t in ax.texts]
    assert [t.get_color() == '#1e8449' for t in texts] == [False, True, False, False] and figure.axes[2].get_title() == 'own report: place 3'


def test_notebook_on_phantoms(outputs, tmp_path):
    Checkpoint.of(find_model('untrained', SMALL, seed=5)[0]).save(tmp_path/'c.safetensors')
    folder = run_notebook('retrieval', dict(store='phantoms:60', checkpoint=str(tmp_path/'c.safetensors'), part='all', draws=30), progress=False)
    table, metrics = pd.read_csv(folder/'results.csv'), read_json(folder/'metrics.json')
    assert set(table.method) == {'G2D', 'untrained'} and metrics['films'] == 60 and 'chance, image_to_text_R@1' in metrics
    assert {'ranks.png', 'reports.png', 'films.png'} <= {p.name for p in (folder/'figures').iterdir()}
    assert read_json(folder/'retrieval'/'result.json')['about']['part'] == 'all'


def test_notebook_on_the_real_notes(outputs, data_root, tmp_path):
    Checkpoint.of(find_model('untrained', SMALL, seed=5)[0]).save(tmp_path/'c.safetensors')
    folder = run_notebook('retrieval', dict(store='real:pairs', checkpoint=str(tmp_path/'c.safetensors'), protocol='fixed', part='all', draws=30), progress=False)
    metrics = read_json(folder/'metrics.json')
    assert 200 < metrics['films'] <= 248 and metrics['distinct_texts'] < metrics['films']       # several films share a note
    assert {'ranks.png', 'reports.png'} <= {p.name for p in (folder/'figures').iterdir()}
