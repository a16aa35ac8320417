"Validation: the pass collects what it says, named findings find their own truth, and nothing is invented where truth is missing."
import numpy as np
import pytest
import torch
from g2d.data.phantom import make_phantom_store
from g2d.data.store import StoreWriter, RadiographStore
from g2d.models.g2d import G2D
from g2d.profiles import profile
from g2d.settings import G2DError
from g2d.validation import collect_pass, findings_with_words, pointing_table, summarise, text_ids, truth_masks, with_report_texts

SMALL = dict(image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64)


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('v')/'store', 30, size=64, seed=4)


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return G2D(profile('demo', **SMALL))


def test_pass_equals_the_model_on_single_images(store, net):
    c = collect_pass(net, store, batch_size=7)
    assert len(c.rows) == len(c.texts) == len(c.pseudo) == 30 and net.training
    net.eval()
    with torch.no_grad():
        for i in (0, 13, 29):
            out = net(torch.from_numpy(store.images[i].copy())[None, None]/255, [c.texts[i]])
            np.testing.assert_allclose(c.image_emb[i], out.image_emb[0], atol=1e-5)
            np.testing.assert_allclose(c.predicted[i], out.mask_logits[0, 0].sigmoid(), atol=1e-5)
    net.train()
    truth = np.stack([store.mask(i) if len(store.boxes(i)) else np.zeros((64, 64), bool) for i in range(30)])
    assert np.array_equal(c.truth, truth) and np.array_equal(truth_masks(store), truth)


def test_named_findings(store, net):
    c = collect_pass(net, store, batch_size=7)
    expected = sum(len(store.boxes(i)) for i in range(30))
    assert len(c.named) == expected > 10
    for position, prompt, mask, similarity in c.named:
        assert mask.any() and not (mask & ~c.truth[position]).any() and similarity.shape == (64, 64) and prompt.endswith('.')
    i = next(i for i in range(30) if len(store.boxes(i)) == 2)
    words = [w for w, _ in findings_with_words(store, i)]
    assert len(set(words)) == 2


def test_table_has_models_and_baselines(store, net):
    c = collect_pass(net, store)
    table = pointing_table(c, c, truth_masks(store))
    assert list(table.index) == ['attention, trained', 'text similarity, trained', 'attention, untrained', 'text similarity, untrained',
                                 'random point in the body', 'centre point', 'average training mask']
    assert table[['any finding', 'named finding']].notna().all().all() and table[['any finding', 'named finding']].stack().between(0, 1).all()


def test_without_truth_no_figure_is_invented(tmp_path, net):
    with StoreWriter(tmp_path/'s', size=64) as writer:
        for i in range(6): writer.add(np.random.default_rng(i).integers(0, 255, (64, 64), dtype=np.uint8), image_id=f'i{i}', patient_id=f'p{i}', text=None if i == 2 else f'A note about film {i}.')
    bare = RadiographStore.open(tmp_path/'s')
    figures = summarise(collect_pass(net, bare))
    assert figures['images'] == 5 and 'image_to_text_R@1' in figures and 'mask_agreement' in figures
    assert not [k for k in figures if 'pointing' in k or 'iou' in k]
    with pytest.raises(G2DError, match='no held-out pairs'): collect_pass(net, bare.select(where=np.arange(6) == 2))


def test_anatomy_and_devices_are_no_findings(tmp_path):
    lung = np.zeros((64, 64), bool); lung[10:50, 5:25] = True
    with StoreWriter(tmp_path/'s', size=64) as writer:
        writer.add(np.full((64, 64), 9, np.uint8), image_id='a', patient_id='a', text='x', masks={'Left Lung': lung, 'Cardiomediastinum': lung, 'Endotracheal Tube': lung}, boxes=[dict(label='Left Lung', x=5, y=10, w=20, h=40)])
    s = RadiographStore.open(tmp_path/'s')
    assert not truth_masks(s).any() and findings_with_words(s, 0) == []


def test_texts_follow_the_profile(store):
    report = store.index['text'].iloc[0]
    assert 'FINDINGS' in report
    ours = with_report_texts(store, profile('recommended')).index['text'].iloc[0]
    released = with_report_texts(store, profile('as_released')).index['text'].iloc[0]
    assert 'FINDINGS' not in ours and ours != released
    assert store.index['text'].iloc[0] == report                                      # the store itself is untouched
    assert with_report_texts(store, profile('recommended', min_text_tokens=1000)).index['text'].isna().all()


def test_text_ids_are_stable():
    assert text_ids(["a", "b", "a"])[0] == text_ids(["a"])[0] == text_ids(["a", "c"])[0]
    assert text_ids(['a', 'b']).unique().numel() == 2 and (text_ids(['a', 'b']) >= 0).all()
