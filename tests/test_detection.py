"Detection: metrics against torchmetrics, losses against loops over boxes, frozen means frozen, and what cannot be trained is refused."
import math
import numpy as np
import pytest
import torch
from g2d.data.phantom import make_phantom_store
from g2d.data.store import RadiographStore, StoreWriter
from g2d.files import read_json
from g2d.profiles import profile
from g2d.settings import G2DError
from g2d.tasks import detection as d
from g2d.tasks import training
from g2d.tasks.protocols import protocol
from g2d.tasks.training import find_start, patient_interval, state_print

SMALL = profile('demo', image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=[32, 16, 16, 8])


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('det')/'store', 60, size=64, seed=6, split=dict(train=.6, val=.2, test=.2))


def film(boxes, labels=None, scores=None):
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    found = dict(boxes=boxes, labels=np.zeros(len(boxes), int) if labels is None else np.asarray(labels, int))
    return found if scores is None else found | dict(scores=np.asarray(scores, float))


def random_films(n, classes, seed, ties=False, most=12):
    "Films with 0 to 4 true boxes, and predictions that are jittered truth and noise; scores to 2 digits where ties are wanted."
    rng, predicted, truth = np.random.default_rng(seed), [], []
    for _ in range(n):
        g = rng.integers(0, 5)
        corner = rng.uniform(0, 80, (g, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (g, 2))], 1)
        labels = rng.integers(0, classes, g)
        k = rng.integers(0, most)
        noise = rng.uniform(0, 80, (k, 2))
        found = np.concatenate([boxes + rng.normal(0, 2, boxes.shape), np.concatenate([noise, noise + rng.uniform(5, 40, (k, 2))], 1)])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1) # jitter must not turn a box inside out
        kinds = np.concatenate([labels, rng.integers(0, classes, k)])
        keep = rng.random(len(found)) < .8
        scores = rng.random(len(found)).round(1 if ties else 6)
        truth.append(film(boxes.astype(np.float32), labels)); predicted.append(film(found[keep].astype(np.float32), kinds[keep], scores[keep].astype(np.float32)))
    return predicted, truth


def torchmetrics_map(predicted, truth, ious=None, max_boxes=100):
    from torchmetrics.detection import MeanAveragePrecision
    metric = MeanAveragePrecision(iou_thresholds=None if ious is None else list(ious), backend='faster_coco_eval', max_detection_thresholds=[1, 10, max_boxes])
    metric.warn_on_many_detections = False
    tensor = lambda x: {k: torch.tensor(v).long() if k == 'labels' else torch.tensor(v, dtype=torch.float32) for k, v in x.items()}
    metric.update([tensor(p) for p in predicted], [tensor(t) for t in truth])
    return {k: float(v) for k, v in metric.compute().items() if v.numel() == 1}


# ---------------------------------------------------------------- metrics

@pytest.mark.parametrize('classes, seed, ties', [(1, 0, False), (1, 1, True), (3, 2, False), (3, 3, True)])
def test_map_equals_torchmetrics_on_random_boxes(classes, seed, ties):
    predicted, truth = random_films(40, classes, seed, ties)
    m = d.match(predicted, truth, d.ALL_IOUS, classes)
    assert d.mean_ap(m, d.PAPER_IOUS) == pytest.approx(torchmetrics_map(predicted, truth, d.PAPER_IOUS)['map'], abs=1e-6)
    theirs = torchmetrics_map(predicted, truth)
    assert d.mean_ap(m, d.COCO_IOUS) == pytest.approx(theirs['map'], abs=1e-6)
    assert d.mean_ap(m, (.5,)) == pytest.approx(theirs['map_50'], abs=1e-6) and d.mean_ap(m, (.75,)) == pytest.approx(theirs['map_75'], abs=1e-6)
    kept = d.as_mgca(predicted, truth)
    assert d.Scores(predicted, truth, classes).metrics()['map_mgca'] == pytest.approx(torchmetrics_map(*kept[:2], d.PAPER_IOUS)['map'], abs=1e-6)


BOX = [10., 10, 30, 40]
EDGES = dict(nothing_predicted=([film([], scores=[])], [film([BOX])]),
             no_truth=([film([BOX], scores=[.9])], [film([])]),
             all_empty=([film([], scores=[])]*2, [film([])]*2),
             exact=([film([BOX], scores=[.9])], [film([BOX])]),
             one_pixel=([film([[3., 3, 4, 4]], scores=[.9])], [film([[3., 3, 4, 4]])]),
             whole_film=([film([[0., 0, 64, 64]], scores=[.2])], [film([[0., 0, 64, 64]])]),
             twice_the_same=([film([BOX, BOX], scores=[.9, .9])], [film([BOX])]),
             same_truth_twice=([film([BOX], scores=[.9])], [film([BOX, BOX])]),
             iou_exactly_half=([film([[0., 0, 10, 10]], scores=[.9])], [film([[0., 0, 10, 20]])]),
             tied_over_films=([film([[50., 50, 60, 60]], scores=[.5]), film([BOX], scores=[.5])], [film([BOX]), film([BOX])]),
             negatives=([film([BOX], scores=[.9]), film([BOX], scores=[.8])], [film([]), film([BOX])]),
             class_absent_in_truth=([film([BOX, BOX], [0, 1], [.9, .8])], [film([BOX], [0])]),
             class_never_predicted=([film([BOX], [0], [.9])], [film([BOX, BOX], [0, 1])]),
             wrong_class=([film([BOX], [1], [.9])], [film([BOX], [0])]))


@pytest.mark.parametrize('name', EDGES)
def test_map_equals_torchmetrics_on_edge_cases(name):
    predicted, truth = EDGES[name]
    ours, theirs = d.mean_ap(d.match(predicted, truth, d.COCO_IOUS, 2)), torchmetrics_map(predicted, truth)['map']
    assert (math.isnan(ours) and theirs == -1) or ours == pytest.approx(theirs, abs=1e-6)


def test_most_boxes_of_a_film_and_class():
    predicted, truth = random_films(25, 2, 5, most=60)
    for limit in (11, 20): assert d.mean_ap(d.match(predicted, truth, d.COCO_IOUS, 2, limit)) == pytest.approx(torchmetrics_map(predicted, truth, max_boxes=limit)['map'], abs=1e-6)


def test_weights_are_films_drawn_again_and_intervals_are_patient_intervals():
    predicted, truth = random_films(30, 2, 7)
    scores, rows = d.Scores(predicted, truth, 2), np.random.default_rng(1).integers(0, 30, 30)
    rows.sort()
    repeated = d.Scores([predicted[i] for i in rows], [truth[i] for i in rows], 2).metrics()
    weighted = scores.metrics(np.bincount(rows, minlength=30))
    assert weighted == pytest.approx(repeated, abs=1e-12)
    many, there = random_films(20, 1, 8, ties=True, most=80)
    m = d.match(many, there, (.5,))
    for w in (None, np.random.default_rng(2).integers(0, 3, 20)): # the short curve says the same
        short, long = d.froc(m, .5, w, 2), d.froc(m, .5, w)
        assert len(short[0]) < len(long[0]) and all(d.sensitivity_at(short, l) == d.sensitivity_at(long, l) for l in d.FROC_LEVELS)
    patients = [f'p{i//3}' for i in range(30)]
    slow = patient_interval(patients, lambda r: d.Scores([predicted[i] for i in r], [truth[i] for i in r], 2).metrics()['map_coco'], draws=20)
    assert d.intervals(patients, scores.metrics, draws=20)['map_coco'] == pytest.approx(slow, abs=1e-9)


def test_froc_and_cut_by_counting():
    predicted, truth = random_films(20, 1, 9, ties=True)
    m = d.match(predicted, truth, (.5,))
    total, best = sum(len(t['labels']) for t in truth), (0, .5)
    for false, sensitivity, score in zip(*d.froc(m)):
        hits = boxes = 0
        for p, t in zip(predicted, truth): # greedy matching from the surest box on does not depend on weaker boxes
            order = np.argsort(-p['scores'], kind='stable')
            strong = p['scores'][order] >= score
            hits += d.hits_of_film(p['boxes'][order][strong], t['boxes'], (.5,)).sum(); boxes += strong.sum()
        assert sensitivity == pytest.approx(hits/total) and false == pytest.approx((boxes - hits)/20)
        best = max(best, (2*hits/(boxes + total), score))
    assert d.best_cut(m) == best[1]


def test_matching_against_a_loop():
    rng = np.random.default_rng(3)
    for _ in range(30):
        make = lambda n: (lambda c: np.concatenate([c, c + rng.integers(1, 6, (n, 2))], 1).astype(float))(rng.integers(0, 6, (n, 2))) # small whole numbers: many ties
        boxes, truth, t = make(rng.integers(0, 7)), make(rng.integers(0, 5)), .4
        taken, expected = set(), []
        for b in boxes:
            best, which = t, None
            for g, x in enumerate(truth):
                w, h = min(b[2], x[2]) - max(b[0], x[0]), min(b[3], x[3]) - max(b[1], x[1])
                both = max(w, 0)*max(h, 0)
                iou = both/((b[2]-b[0])*(b[3]-b[1]) + (x[2]-x[0])*(x[3]-x[1]) - both)
                if g not in taken and iou >= best: best, which = iou, g
            expected.append(which is not None); taken.add(which)
        assert d.hits_of_film(boxes, truth, (t,))[0].tolist() == expected


def test_mgca_rewards_silence_and_forgives_false_alarms():
    truth = [film([BOX]), film([BOX]), film([])]
    predicted = [film([BOX], scores=[.9]), film([[0., 0, 3, 3]], scores=[.4]), film([BOX], scores=[.99])]
    found = d.Scores(predicted, truth).metrics()
    assert found['map_mgca'] == pytest.approx(1) and found['map'] < .3
    assert math.isnan(d.Scores([film([], scores=[])]*3, truth).metrics()['map_mgca']) and d.Scores([film([], scores=[])]*3, truth).metrics()['map'] == 0


# ---------------------------------------------------------------- loss

def a_batch(classes=2, seed=0):
    "Raw numbers for two films, and truths: three boxes, two of them in one slot, and none."
    g = torch.Generator().manual_seed(seed)
    s = d.slots([(8, 8), (4, 4), (2, 2)], (64, 64))
    flat = torch.randn(3, len(s.anchor), 5 + classes, generator=g)
    truths = [dict(boxes=torch.tensor([[4., 6, 30, 50], [40, 3, 46, 10], [20, 20, 63, 63], [40.5, 3, 46, 10.5]]), labels=torch.tensor([0, 1, 1, 0])),
              dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)),
              dict(boxes=torch.tensor([[50., 50, 64, 64], [0, 0, 64, 64]]), labels=torch.tensor([1, 0]))]
    return flat, truths, s


def sigmoid(x): return 1/(1 + math.exp(-x))
def bce(x, t): return -(t*math.log(sigmoid(x)) + (1 - t)*math.log(1 - sigmoid(x)))


def loop_slots():
    "All slots in order: scale, anchor, row, column, cell side, anchor sizes."
    for k, cells in enumerate((8, 4, 2)):
        for a in range(3):
            for j in range(cells):
                for i in range(cells): yield k, a, j, i, 64/cells, [v*64/416 for v in d.COCO_ANCHORS[k][a]]


def shape_overlap(w, h, aw, ah, extra=0):
    both = (min(w, aw) + extra)*(min(h, ah) + extra)
    return both/((w + extra)*(h + extra) + (aw + extra)*(ah + extra) - both)


def overlap(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0)*max(h, 0)
    return both/((a[2]-a[0])*(a[3]-a[1]) + (b[2]-b[0])*(b[3]-b[1]) - both)


def test_yolo_loss_against_a_loop_over_boxes():
    flat, truths, s = a_batch()
    slots, expected = list(loop_slots()), {'box': 0., 'object': 0., 'class': 0.}
    for raw, t in zip(flat.tolist(), truths):
        owner = {}
        for x0, y0, x1, y1, label in [[*b, l] for b, l in zip(t['boxes'].tolist(), t['labels'].tolist())]:
            k, a = max(((k, a) for k in range(3) for a in range(3)), key=lambda ka: shape_overlap(x1-x0, y1-y0, *(v*64/416 for v in d.COCO_ANCHORS[ka[0]][ka[1]])))
            cells = (8, 4, 2)[k]
            cell = (int((y0+y1)/2*cells/64), int((x0+x1)/2*cells/64))
            owner[(k, a, *cell)] = (x0, y0, x1, y1, label)
        for r, (k, a, j, i, side, (aw, ah)) in zip(raw, slots):
            if (k, a, j, i) in owner:
                x0, y0, x1, y1, label = owner[k, a, j, i]
                tx, ty, tw, th = (x0+x1)/2/side - i, (y0+y1)/2/side - j, math.log((x1-x0)/aw), math.log((y1-y0)/ah)
                expected['box'] += (2 - (x1-x0)*(y1-y0)/64**2)*(bce(r[0], tx) + bce(r[1], ty) + .5*(r[2]-tw)**2 + .5*(r[3]-th)**2)/3
                expected['object'] += bce(r[4], 1)/3
                expected['class'] += sum(bce(r[5+c], float(c == label)) for c in range(2))/3
            else:
                x, y, w, h = side*(i + sigmoid(r[0])), side*(j + sigmoid(r[1])), aw*math.exp(r[2]), ah*math.exp(r[3])
                if all(overlap((x-w/2, y-h/2, x+w/2, y+h/2), b) <= .5 for b in t['boxes'].tolist()): expected['object'] += bce(r[4], 0)/3
    found = d.yolo_loss(flat, truths, s, (64, 64))
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-5)


def test_mgca_loss_against_a_loop_over_boxes():
    flat, truths, s = a_batch(seed=4)
    slots, expected = list(loop_slots()), {'box': 0., 'object': 0., 'class': 0.}
    punished_although_chosen = 0
    for raw, t in zip(flat.tolist(), truths):
        owner, spared = {}, set()
        for x0, y0, x1, y1, label in [[*b, l] for b, l in zip(t['boxes'].tolist(), t['labels'].tolist())]:
            for k, cells in enumerate((8, 4, 2)):
                side, cell = 64/cells, (int((y0+y1)/2*cells/64), int((x0+x1)/2*cells/64))
                found = [shape_overlap((x1-x0)/side, (y1-y0)/side, *(v*64/416/side for v in d.COCO_ANCHORS[k][a]), extra=1) for a in range(3)]
                spared |= {(k, a, *cell) for a in range(3) if found[a] > .5}
                owner[(k, int(np.argmax(found)), *cell)] = (x0, y0, x1, y1, label)
        for r, (k, a, j, i, side, (aw, ah)) in zip(raw, slots):
            n = 3*3*(8, 4, 2)[k]**2 # films, anchors, cells: the mean is over all of them
            if (k, a, j, i) in owner:
                x0, y0, x1, y1, label = owner[k, a, j, i]
                tx, ty, tw, th = (x0+x1)/2/side - i, (y0+y1)/2/side - j, math.log((x1-x0)/aw), math.log((y1-y0)/ah)
                expected['box'] += 2.5*(bce(r[0], tx) + bce(r[1], ty) + (r[2]-tw)**2 + (r[3]-th)**2)/n
                expected['object'] += bce(r[4], 1)/n
                expected['class'] += sum(bce(r[5+c], float(c == label)) for c in range(2))/n/2
                punished_although_chosen += (k, a, j, i) not in spared
            if (k, a, j, i) not in spared: expected['object'] += .5*bce(r[4], 0)/n
    found = d.yolo_loss_mgca(flat, truths, s, (64, 64))
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-5)
    assert punished_although_chosen # the flaw that `best` does not have


def test_decode_inverts_encode_and_predicted_boxes_find_their_truth():
    _, truths, s = a_batch()
    boxes = truths[0]['boxes'][:3]
    slot = d.assign(boxes, s)
    flat = torch.zeros(1, len(s.anchor), 6)
    xy, wh = d.encode(boxes, slot, s)
    flat[0, slot, :2], flat[0, slot, 2:4] = torch.logit(xy), wh
    assert torch.allclose(d.decode(flat, s)[0, slot], boxes, atol=1e-4)


def test_a_film_without_boxes_has_a_loss_and_no_box_term():
    flat, _, s = a_batch()
    none = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))]*3
    for loss in (d.yolo_loss, d.yolo_loss_mgca):
        found = loss(flat.requires_grad_(), none, s, (64, 64))
        assert found['box'] == 0 and found['class'] == 0 and found['object'] > 0
        sum(found.values()).backward()


# ---------------------------------------------------------------- heads

def make(head, classes=('finding',), **overrides):
    torch.manual_seed(0)
    return d.DetectionNet(find_start('random', SMALL), protocol('detection', 'demo', head=head, **overrides), classes)


@pytest.mark.parametrize('head', ['yolov3', 'fcos', 'retinanet'])
@pytest.mark.parametrize('freeze', ['all', 'weights', 'no'])
def test_frozen_means_frozen(head, freeze):
    net = make(head, freeze=freeze).train()
    before, weights = state_print(net.image_encoder), [x.clone() for x in net.image_encoder.parameters()]
    truths = [dict(boxes=torch.tensor([[5., 5, 40, 40]]), labels=torch.tensor([0]))]*2
    optimizer = torch.optim.SGD([x for x in net.parameters() if x.requires_grad], lr=.01)
    loss = sum(net.loss(torch.rand(2, 1, 64, 64), truths).values())
    loss.backward(); optimizer.step()
    assert (state_print(net.image_encoder) == before) == (freeze == 'all')
    assert all(torch.equal(a, b) for a, b in zip(net.image_encoder.parameters(), weights)) == (freeze != 'no')


@pytest.mark.parametrize('head', ['fcos', 'retinanet'])
def test_torchvision_hands_the_film_on_as_it_is(head):
    "Its own normalisation and resize are switched off: the encoder sees what was given, one grey channel."
    net, seen = make(head).eval(), []
    net.image_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.rand(2, 1, 64, 64)
    net.boxes(images)
    assert torch.equal(seen[0], images)
    net.train().loss(images, [dict(boxes=torch.tensor([[5., 5, 40, 40]]), labels=torch.tensor([0]))]*2)
    assert torch.equal(seen[1], images)
    assert not [k for k in net.detector.state_dict() if 'image_encoder' in k] # the encoder is not part of the head


def test_boxes_are_thinned_and_sorted():
    net = make('yolov3', classes=('a', 'b')).eval()
    for found in net.boxes(torch.rand(3, 1, 64, 64), .001):
        assert (found['scores'].diff() <= 0).all() and len(found['scores']) <= 100
        assert (found['boxes'] >= 0).all() and (found['boxes'] <= 64).all()
        for c in (0, 1):
            own = found['boxes'][found['labels'] == c].double().numpy()
            assert (d.box_iou(own, own) - np.eye(len(own))).max(initial=0) <= .5 + 1e-6
    with pytest.raises(G2DError, match='training mode'): net.train().boxes(torch.rand(1, 1, 64, 64))


def test_head_on_a_pyramid_of_five_maps_reads_the_last_three():
    p = SMALL.replace(encoder_depth=5, decoder_channels=(32, 16, 16, 8, 8))
    net = d.DetectionNet(find_start('random', p), protocol('detection', 'demo')).train()
    assert net.image_encoder.reductions[-3:] == [8, 16, 32]
    assert [tuple(x.shape[-2:]) for x in net.detector.head(net._maps(torch.rand(2, 1, 64, 64)))] == [(8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize('head, steps, lr, width', [('yolov3', 50, 3e-3, .25), ('fcos', 45, 4e-3, .125)])
def test_a_head_learns_a_few_phantoms_by_heart(store, head, steps, lr, width):
    truth = d.true_boxes(store, d.wanted_labels(store))
    rows = [i for i, t in enumerate(truth) if len(t['labels']) and (t['boxes'][:, 2:] - t['boxes'][:, :2]).min() > 5][:4]
    few = store.select(where=np.isin(np.arange(len(store)), rows))
    net = make(head, width=width).train()
    images, _ = d.whole_film('none', 64)(training.films(few, range(4)), step=0, train=False)
    truths = [d.moved_truth(truth[i], np.eye(3), 64) for i in rows]
    optimizer = torch.optim.AdamW(net.detector.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(net.loss(images, truths).values()).backward()
        optimizer.step()
    assert d.Scores(d.predict(net, few), [truth[i] for i in rows]).metrics()['ap50'] > .9


# ---------------------------------------------------------------- boxes of a store

def test_boxes_move_with_the_film():
    "A filled box, augmented as a mask, has the moved box around it."
    rng, n = np.random.default_rng(0), 6
    masks, truths = torch.zeros(n, 1, 96, 96), []
    for i in range(n):
        x, y, w, h = rng.integers(20, 40), rng.integers(20, 40), rng.integers(15, 35), rng.integers(15, 35)
        masks[i, 0, y:y+h, x:x+w] = 1; truths.append(film([[x, y, x+w, y+h]]))
    for name in ('none', 'recommended', 'as_paper'):
        augment = d.whole_film(name, 64, seed=3)
        _, moved = augment(torch.zeros_like(masks), step=5, masks=masks)
        for mask, t, m in zip(moved[:, 0].numpy(), truths, augment.matrices(n, 5, (96, 96))):
            found = d.moved_truth(t, m, 64)['boxes'].numpy()
            y, x = np.nonzero(mask > .05)
            if not len(found): assert (mask > .5).mean() < .05; continue
            assert np.abs(found[0] - [x.min(), y.min(), x.max()+1, y.max()+1]).max() < 2, name


def test_a_box_that_leaves_the_film_is_dropped():
    shift = lambda dx: np.array([[1, 0, dx], [0, 1, 0], [0, 0, 1]], float)
    t = film([[10, 10, 30, 30]], [3])
    assert d.moved_truth(t, shift(-20), 64)['boxes'].tolist() == [[0, 10, 10, 30]] and d.moved_truth(t, shift(-20), 64)['labels'].tolist() == [3]
    for dx in (-26, -29, -40, 60): assert len(d.moved_truth(t, shift(dx), 64)['boxes']) == 0 # less than a quarter is left


def some_store(path, boxes_of, n=12, size=64):
    "A store whose film i has `boxes_of(i)`."
    rng = np.random.default_rng(0)
    with StoreWriter(path, size=size) as writer:
        for i in range(n): writer.add(rng.integers(0, 255, (size, size)).astype(np.uint8), image_id=str(i), patient_id=str(i), split=['train', 'val', 'test'][i % 3], boxes=boxes_of(i))
    return RadiographStore.open(path)


def test_negatives_count_and_unknown_films_are_left_out(tmp_path):
    lesion = dict(label='Pneumonia', x=10., y=10., w=20., h=20.)
    s = some_store(tmp_path/'s', lambda i: None if i >= 9 else [lesion] if i < 6 else [])
    result = d.finetune(s, 'random', 'demo', profile=SMALL, max_steps=1, draws=0)
    assert result.about['train_films'] == 3 and result.metrics['films'] == 3 and result.metrics['films_with_boxes'] == 2 == result.about['train_films_with_boxes']
    assert result.metrics['ap50_typical_boxes'] == pytest.approx(1) # the same box everywhere, and the healthy film is the last


def test_labels(tmp_path):
    lung, heart, mass = (dict(label=l, x=5., y=5., w=20., h=30.) for l in ('Left Lung', 'heart', 'Mass'))
    s = some_store(tmp_path/'s', lambda i: [lung, heart, mass])
    assert d.wanted_labels(s) == ['Mass'] and d.wanted_labels(s, 'lung') == ['Left Lung'] and d.wanted_labels(s, ['heart']) == ['heart'] and len(d.wanted_labels(s, 'all')) == 3
    assert d.true_boxes(s, ['Mass', 'heart'], per_label=True)[0]['labels'].tolist() == [1, 0]
    assert d.true_boxes(s, ['Mass', 'heart'])[0]['labels'].tolist() == [0, 0]


@pytest.mark.parametrize('boxes_of, options, message', [
    (lambda i: None, {}, 'has no boxes: detection needs'),
    (lambda i: [], {}, 'has no boxes: detection needs'),
    (lambda i: [dict(label='Left Lung', x=1., y=1., w=9., h=9.)], {}, 'has no boxes of findings; its boxes are Left Lung'),
    (lambda i: [dict(label='Mass', x=1., y=1., w=9., h=9.)], dict(labels=['Nodule']), 'has no boxes "Nodule"'),
    (lambda i: [dict(label='Mass', x=1., y=1., w=9., h=9.)] if i % 3 else [], {}, 'training films of .* hold no box of Mass; take a larger fraction'),
    (lambda i: [dict(label='Mass', x=1., y=1., w=9., h=9.)] if i % 3 != 1 else [], {}, 'validation films of .* hold no box of Mass'),
    (lambda i: [dict(label='Mass', x=1., y=1., w=9., h=9.)] if i % 3 != 2 else [], {}, 'has no box of Mass: there is nothing to find'),
    (lambda i: [dict(label='Mass', x=1., y=1., w=9., h=9.)], dict(head='ssd'), 'no detection head "ssd"'),
    (lambda i: [dict(label='Mass', x=1., y=1., w=9., h=9.)], dict(assign='all'), "assign is 'all'"),
])
def test_bad_input_is_refused_in_one_sentence(tmp_path, boxes_of, options, message):
    s = some_store(tmp_path/'s', boxes_of)
    with pytest.raises(G2DError, match=message): d.finetune(s, 'random', 'demo', profile=SMALL, max_steps=1, draws=0, **options)


def test_a_pyramid_of_two_maps_is_refused(store):
    with pytest.raises(G2DError, match='reads three maps'): d.finetune(store, 'random', 'demo', profile=SMALL.replace(encoder_depth=2, decoder_channels=(8, 8)), max_steps=1)


def test_a_checkpoint_that_does_not_fit_or_has_seen_the_test_films(store):
    from g2d.checkpoint import Checkpoint
    from g2d.data.splits import fingerprints
    from g2d.models.g2d import G2D
    c = Checkpoint.of(G2D(SMALL))
    wrong = Checkpoint(c.profile.replace(image_encoder='resnet34'), c.weights)
    with pytest.raises(G2DError, match='image encoder of the checkpoint does not fit'): d.finetune(store, wrong, 'demo', max_steps=1)
    c.seen = torch.from_numpy(np.asarray(fingerprints(store.index, store.manifest.get('source', ''))))
    with pytest.raises(G2DError, match='pre-training'): d.finetune(store, c, 'demo', max_steps=1)


# ---------------------------------------------------------------- the whole road

def test_finetune_on_phantoms(store):
    result = d.finetune(store, 'random', 'demo', fraction=.5, seed=2, profile=SMALL, max_steps=3, draws=30)
    assert result.about['encoder_unchanged'] and result.about['start'] == 'random' and result.about['weights'] == 'random'
    assert {'map', 'map_coco', 'ap50', 'map_mgca', 'ap50_typical_boxes', 'sensitivity_at_1'} <= set(result.metrics) and {'map', 'ap50'} <= set(result.intervals)
    assert len(result.predictions) == result.metrics['films'] == len(store.select('test')) and result.predictions['image_id'].is_unique
    again = d.finetune(store, 'random', 'demo', fraction=.5, seed=2, profile=SMALL, max_steps=3, draws=0)
    assert state_print(again.net) == state_print(result.net) and again.metrics['map_coco'] == result.metrics['map_coco']
    assert d.evaluate(store, result.net, draws=0).metrics['map'] == result.metrics['map']


def test_several_classes_and_trained_encoder(store, tmp_path):
    kinds = ['cardiomegaly', 'consolidation', 'pneumothorax']
    kinds = [k for k in kinds if k in d.wanted_labels(store, 'all')]
    result = d.finetune(store, 'random', 'demo', profile=SMALL, labels=kinds, per_label=True, freeze='no', max_steps=2, draws=0)
    assert not result.about['encoder_unchanged'] and result.about['classes'] == sorted(kinds, key=kinds.index)
    with pytest.raises(G2DError, match='cannot be asked for findings'): d.evaluate(store, result.net, labels='findings')
    result.save(tmp_path/'r')
    assert read_json(tmp_path/'r'/'result.json')['about']['classes'] == kinds


def test_killed_and_continued_is_the_same(store, tmp_path, monkeypatch):
    run = lambda out: d.finetune(store, 'random', 'demo', profile=SMALL, seed=3, max_steps=9, draws=0, out=out, batch_size=12, width=.125, augment='recommended')
    whole = run(None)
    epoch = training._Loop._epoch
    def killed(self, bar):
        if self.epoch == 2: raise KeyboardInterrupt
        found = epoch(self, bar); self.saved = 0
        return found
    monkeypatch.setattr(training._Loop, '_epoch', killed)
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'out')
    monkeypatch.setattr(training._Loop, '_epoch', epoch)
    assert (tmp_path/'out'/'training.safetensors').is_file()
    again = run(tmp_path/'out')
    assert state_print(again.net) == state_print(whole.net) and again.metrics['map'] == whole.metrics['map']
    with pytest.raises(G2DError, match='belongs to another training'):
        d.finetune(store, 'random', 'demo', profile=SMALL, seed=3, max_steps=9, draws=0, out=tmp_path/'out', batch_size=12, width=.125, augment='recommended', labels=['consolidation'])


def test_predictions_are_in_stored_pixels(store):
    "A network that sees another size gives boxes in the pixels of the store."
    net = make('yolov3', size=96).eval()
    assert net.size == 96
    found = d.predict(net, store.select('test'))
    assert max(f['boxes'].max() for f in found if len(f['boxes'])) <= 64 + 1e-4


def test_typical_boxes_by_hand():
    a, b = [10., 10, 30, 30], [40., 40, 60, 60]
    found = d.typical_boxes([film([a, b]), film([a]), film([[11., 10, 31, 30]]), film([])])
    assert found['scores'].tolist() == [.75, .25] and found['boxes'][1].tolist() == b


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    import g2d.settings
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    return tmp_path


def check_run(folder, starts):
    import pandas as pd
    table = pd.read_csv(folder/'results.csv')
    assert {'start', 'head', 'fraction', 'seed', 'metric', 'value', 'low', 'high'} <= set(table.columns) and {'map', 'map_coco', 'ap50', 'map_mgca'} <= set(table['metric'])
    assert {'films.png', 'curves.png', 'scores.png', 'training.png'} <= {p.name for p in (folder/'figures').iterdir()}
    return read_json(folder/'metrics.json')


def test_experiment_on_phantoms(outputs):
    from g2d.runs import run_notebook
    folder = run_notebook('detection', dict(store='phantoms:40', heads=['yolov3', 'retinanet'], steps=2, draws=10), progress=False)
    metrics = check_run(folder, 1)
    assert metrics['encoders_unchanged'] and 'random, yolov3, 1: ap50' in metrics


def test_experiment_on_real_lungs(outputs, data_root):
    from g2d.runs import run_notebook
    metrics = check_run(run_notebook('detection', dict(store='real:hannover', labels='lung', steps=2, draws=20), progress=False), 1)
    assert metrics['encoders_unchanged'] and metrics['scheme'] == 'column' # the protocol demo takes the column


def test_real_pneumonia_boxes(outputs, data_root):
    from g2d.tasks.stores import find_store
    real = find_store('real:nih_rsna', 64)
    result = d.finetune(real, 'random', 'fixed', profile=SMALL, max_steps=2, draws=10, width=.125, size=64)
    assert result.about['scheme'] == 'fixed' and result.metrics['films'] > result.metrics['films_with_boxes'] > 0
    assert d.evaluate(real, result.net, part=None, draws=0).metrics['films'] == len(real)
