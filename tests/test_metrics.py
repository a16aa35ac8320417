"Metrics against brute force and torchmetrics, on random and edge cases."
import numpy as np
import pytest
from g2d.metrics import bootstrap_interval, mask_agreement, mask_iou, pointing_baselines, pointing_game, retrieval_recall
from g2d.settings import G2DError


def brute_recall(image, text, texts, k):
    "Rank by rank, with plain loops; the own text loses every tie."
    unit = lambda v: v/np.linalg.norm(v)
    distinct = sorted(set(texts))
    vector = {t: unit(text[texts.index(t)]) for t in distinct}
    hits = []
    for i, t in enumerate(texts):
        own = float(unit(image[i]) @ vector[t])
        hits.append(sum(float(unit(image[i]) @ vector[o]) >= own for o in distinct if o != t) < k)
    back = []
    for t in distinct:
        scores = [float(unit(v) @ vector[t]) for v in image]
        best = max(s for s, o in zip(scores, texts) if o == t)
        back.append(sum(s >= best for s, o in zip(scores, texts) if o != t) < k)
    return np.mean(hits), np.mean(back)


@pytest.mark.parametrize('n, distinct', [(12, 12), (40, 15), (60, 3), (7, 1)])
def test_retrieval_equals_brute_force(n, distinct):
    rng = np.random.default_rng(n)
    texts = [f'text {j}' for j in rng.integers(0, distinct, n)]
    vectors = {t: rng.normal(size=6) for t in sorted(set(texts))}
    text = np.stack([vectors[t] for t in texts])
    image = text + rng.normal(size=(n, 6))
    found = retrieval_recall(image, text, texts, ks=(1, 3))
    for k in (1, 3):
        forward, back = brute_recall(image, text, texts, k)
        assert found[f'image_to_text_R@{k}'] == pytest.approx(forward)
        assert found[f'text_to_image_R@{k}'] == pytest.approx(back)
    assert found['distinct_texts'] == len(set(texts)) and found['chance_R@1'] == 1/len(set(texts))


def test_retrieval_equals_torchmetrics_without_duplicates():
    import torch
    from torchmetrics.functional.retrieval import retrieval_hit_rate
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(50, 8)), rng.normal(size=(50, 8))
    found = retrieval_recall(image, text, [str(i) for i in range(50)], ks=(1, 5, 10))
    unit = lambda v: v/np.linalg.norm(v, axis=1, keepdims=True)
    similarity = torch.tensor(unit(image) @ unit(text).T)
    for k in (1, 5, 10):
        expected = np.mean([float(retrieval_hit_rate(similarity[i], torch.arange(50) == i, top_k=k)) for i in range(50)])
        assert found[f'image_to_text_R@{k}'] == pytest.approx(expected)


def test_constant_model_finds_nothing():
    found = retrieval_recall(np.ones((30, 4)), np.ones((30, 4)), [str(i) for i in range(30)], ks=(1, 10))
    assert found['image_to_text_R@10'] == 0 and found['text_to_image_R@10'] == 0


def test_pointing_game_with_ties_and_empty_truth():
    maps, masks = np.zeros((3, 6, 6)), np.zeros((3, 6, 6), bool)
    masks[0, 0, 0] = True                    # a flat map over 36 pixels hits one of them
    masks[1, 2:4, 2:4] = True; maps[1, 2, 2] = 5
    assert pointing_game(maps, masks) == pytest.approx([1/36, 1])
    with pytest.raises(G2DError, match='No image has a true mask'): pointing_game(maps, masks & False)
    with pytest.raises(G2DError, match='differ in shape'): pointing_game(maps[:, :3], masks)


def test_random_point_is_the_mean_over_many_draws():
    rng = np.random.default_rng(1)
    masks, bodies = rng.random((5, 16, 16)) < .2, rng.random((5, 16, 16)) < .7
    expected = pointing_baselines(masks, bodies, masks)['random point in the body']
    draws = []
    for mask, body in zip(masks, bodies):
        inside = np.flatnonzero(body.ravel())
        draws.append(mask.ravel()[rng.choice(inside, 20000)].mean())
    assert expected == pytest.approx(np.mean(draws), abs=.01)


def test_average_mask_baseline_points_at_the_most_frequent_place():
    train = np.zeros((10, 8, 8), bool); train[:7, 1, 1] = True; train[7:, 6, 6] = True
    masks = np.zeros((4, 8, 8), bool); masks[:3, 1, 1] = True; masks[3, 6, 6] = True
    assert pointing_baselines(masks, np.ones_like(masks), train)['average training mask'] == pytest.approx(.75)


def test_iou_equals_torchmetrics():
    import torch
    from torchmetrics.functional.classification import binary_jaccard_index
    rng = np.random.default_rng(2)
    scores, truth = rng.random((6, 12, 12)), rng.random((6, 12, 12)) < .3
    expected = [float(binary_jaccard_index(torch.tensor(s), torch.tensor(t))) for s, t in zip(scores, truth)]
    assert mask_iou(scores, truth) == pytest.approx(expected)
    assert len(mask_iou(np.zeros((2, 4, 4)), np.zeros((2, 4, 4), bool))) == 0


def test_agreement_equals_brute_force_over_pairs():
    rng = np.random.default_rng(3)
    masks = rng.random((7, 10, 10)) < .3
    pairs = [(masks[i] & masks[j]).sum()/(masks[i] | masks[j]).sum() for i in range(7) for j in range(7) if i != j]
    assert mask_agreement(masks) == pytest.approx(np.mean(pairs), rel=1e-6)
    assert mask_agreement(np.repeat(masks[:1], 4, 0)) == pytest.approx(1)
    assert np.isnan(mask_agreement(np.zeros((3, 4, 4))))


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(4)
    inside = [low <= .3 <= high for low, high in (bootstrap_interval(rng.random(200) < .3, seed=s) for s in range(200))]
    assert .88 <= np.mean(inside) <= 1
