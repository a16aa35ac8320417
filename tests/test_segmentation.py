"Segmentation: Dice against torchmetrics and by hand, frozen means frozen, and what cannot be trained is refused."
import numpy as np
import pytest
import torch
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import make_phantom_store
from g2d.models.g2d import G2D
from g2d.profiles import profile
from g2d.settings import G2DError
from g2d.tasks.segmentation import SegmentationNet, dice_scores, finetune

SMALL = profile('demo', image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64)


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('seg')/'store', 60, size=64, seed=6)


def test_dice_equals_torchmetrics_on_positives():
    from torchmetrics.functional.segmentation import dice_score
    rng = np.random.default_rng(0)
    predicted, truth = rng.random((9, 12, 12)) < .4, rng.random((9, 12, 12)) < .3
    found = dice_scores(predicted, truth)
    expected = dice_score(torch.tensor(predicted)[:, None].long(), torch.tensor(truth)[:, None].long(), num_classes=1, include_background=True, average='micro', input_format='one-hot', aggregation_level='samplewise').mean()
    assert found['dice_positives'] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize('predicted, truth, published', [('empty', 'empty', 1), ('one', 'empty', 0), ('empty', 'one', 0), ('full', 'full', 1), ('one', 'full', 2/17)])
def test_dice_by_hand(predicted, truth, published):
    make = dict(empty=np.zeros((1, 4, 4), bool), full=np.ones((1, 4, 4), bool), one=np.eye(16, dtype=bool)[:1].reshape(1, 4, 4))
    assert dice_scores(make[predicted], make[truth])['dice_published'] == pytest.approx(published)


def test_all_empty_on_mgcas_siim_composition():
    truth = np.zeros((1903, 2, 2), bool); truth[:476] = True
    found = dice_scores(np.zeros_like(truth), truth)
    assert round(100*found['dice_all_empty'], 1) == round(100*found['dice_published'], 1) == 75.0 and found['dice_positives'] == 0


def test_same_seed_same_result_and_parts_are_loaded(store):
    torch.manual_seed(0)
    net = G2D(SMALL)
    c = Checkpoint.of(net)
    a, _ = finetune(store, c, ('encoder', 'decoder'), .5, steps=2)
    b, _ = finetune(store, c, ('encoder', 'decoder'), .5, steps=2)
    assert a == b
    fresh = SegmentationNet(SMALL, c, ('encoder',))
    assert torch.equal(fresh.image_encoder.net.conv1.weight, net.image_encoder.net.conv1.weight)
    assert not torch.equal(fresh.decoder.segmentation_head[0].weight, net.decoder.segmentation_head[0].weight)


def test_frozen_encoder_does_not_move(store):
    metrics, net = finetune(store, None, fraction=.5, profile=SMALL, freeze=True, steps=3)
    torch.manual_seed(0)
    start = SegmentationNet(SMALL, freeze=True)
    assert all(torch.equal(v, start.image_encoder.state_dict()[k]) for k, v in net.image_encoder.state_dict().items())
    assert not all(torch.equal(v, start.decoder.state_dict()[k]) for k, v in net.decoder.state_dict().items())


def test_checkpoint_that_does_not_fit(store):
    c = Checkpoint.of(G2D(SMALL.replace(decoder_channels=(16, 16, 8, 8))))
    with pytest.raises(G2DError, match='decoder of the checkpoint does not fit'): finetune(store, c, fraction=.5, profile=SMALL, steps=1)


def test_store_without_masks_is_refused(tmp_path):
    from g2d.data.store import RadiographStore, StoreWriter
    with StoreWriter(tmp_path/'s', size=64) as writer:
        for i in range(6): writer.add(np.full((64, 64), 5*i + 5, np.uint8), image_id=str(i), patient_id=str(i), split=['train', 'val', 'test'][i % 3])
    with pytest.raises(G2DError, match='hold no mask'): finetune(RadiographStore.open(tmp_path/'s'), fraction=1., profile=SMALL, steps=1)
