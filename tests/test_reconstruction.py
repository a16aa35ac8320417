"Reconstruction: scores against loops, predictors that do not look, and the experiment notebooks of masked methods and of ablations."
import numpy as np, pandas as pd, pytest, torch
from g2d.data.phantom import make_phantom_store
from g2d.files import read_json
from g2d.models.comparators import build_model, comparator
from g2d.notebooks import find_notebook, run_notebook
from g2d.settings import G2DError
from g2d.tasks.reconstruction import _prepared, blind_predictors, evaluate, film_scores
from g2d.validation import with_report_texts

TINY = dict(image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=[32, 16, 16, 8], memory_slots=16, memory_topk=4)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return make_phantom_store(tmp_path_factory.mktemp('phantoms')/'store', 30, size=64, seed=5, split=dict(train=.5, val=.2, test=.3))


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(1)
    return build_model(comparator('mpma', **TINY)).eval()


def test_blind_predictors_are_means_and_counts(store, net):
    view = with_report_texts(store.select('train'), net.profile)
    mean_film, blind = blind_predictors(net, view)
    counts, targets = np.full(len(net.begins), .01), []
    for images, texts in _prepared(net, view, 'cpu', 4):
        targets.append(net.pixel_target(images))
        for text in texts:
            for i in net.text_encoder.tokenizer(text, truncation=True, max_length=net.profile.max_text_tokens)['input_ids']:
                if i not in net.text_encoder.tokenizer.all_special_ids: counts[i] += 1
    assert torch.allclose(mean_film, torch.cat(targets).mean(0), atol=1e-5)
    np.testing.assert_allclose(blind.exp().numpy(), counts/counts.sum(), rtol=1e-4)


def test_scores_against_a_loop(store, net):
    view = with_report_texts(store.select('test'), net.profile)
    mean_film, blind = blind_predictors(net, view)
    scores = film_scores(net, view, mean_film, blind, seed=3)
    images, texts = next(_prepared(net, view, 'cpu', len(view)))
    found = net.rebuild(images, texts, seed=3)
    at = 0
    for k in range(len(view)):
        error = [((found.pixels[k, i] - found.pixel_target[k, i])**2).mean().item() for i in range(found.pixels.shape[1]) if found.hidden_patches[k, i]]
        assert scores['pixel_error'][k] == pytest.approx(np.mean(error), rel=1e-4)
        labels = found.ids[k][found.hidden_words[k]]
        logits = found.word_logits[at:at + len(labels)]; at += len(labels)
        assert scores['word_accuracy, own film'][k] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-6)
        assert scores['word_loss, own film'][k] == pytest.approx(np.mean([-logits[j].log_softmax(0)[labels[j]].item() for j in range(len(labels))]), rel=1e-3)
        assert scores['word_loss, counts'][k] == pytest.approx(np.mean([-blind[i].item() for i in labels]), rel=1e-4)


def test_a_predictor_that_is_right_scores_full(store, net, monkeypatch):
    "With logits of the truth every accuracy is one, and the film makes no difference."
    view = with_report_texts(store.select('test'), net.profile)
    rebuild = type(net).rebuild
    def right(self, images, texts, **options):
        found = rebuild(self, images, texts, **options)
        return found._replace(word_logits=torch.nn.functional.one_hot(found.ids[found.hidden_words], len(self.begins)).float()*50, pixels=found.pixel_target)
    monkeypatch.setattr(type(net), 'rebuild', right)
    result = evaluate(store, net, draws=50)
    assert result.metrics['pixel_error'] == 0 and result.metrics['word_accuracy, own film'] == result.metrics['side_accuracy, own film'] == 1
    assert result.metrics['word_accuracy, own minus grey film'] == 0 and result.metrics['word_loss, gain over counts'] > 0
    assert len(result.predictions) == len(view) and result.intervals['pixel_error, gain over mean film'][0] > 0


def test_only_masked_methods(store):
    with pytest.raises(G2DError, match='rebuilds nothing'): evaluate(store, build_model(comparator('g2d', **TINY)))


def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    run = run_notebook(find_notebook('reconstruction'), dict(size=64, limit=6, draws=20), tmp_path)
    folder = run if hasattr(run, 'iterdir') else next(tmp_path.glob('reconstruction/*'))
    table = pd.read_csv(folder/'results.csv')
    assert {'pixel_error', 'pixel_error, mean film', 'word_accuracy, own film', 'word_accuracy, grey film'} <= set(table.metric) and table.value.notna().all()
    assert (folder/'figures'/'rebuilt.png').exists() and (folder/'figures'/'words.png').exists()


def test_ablations_beside_the_paper(tmp_path, monkeypatch):
    "Effects and verdicts of the notebook, on a table whose answers are known."
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    rows = []
    levels = {'pseudo masks (85 %)': (.6, .5), 'no decoder': (.3, .4), 'shuffled masks': (.7, .5), 'threshold median': (.59, .5)}
    for name, (dice, auc) in levels.items():
        rows += [dict(row=f'segmentation, {name}', task='segmentation', method=f'x encoder{d}', fraction=.01, metric='dice_positives', mean=dice, half=.02) for d in ('', ' + decoder')]
        rows += [dict(row=f'classification, {name}', task='linear', method='x encoder', fraction=.01, metric='auroc', mean=auc, half=.01),
                 dict(row=name, task='pretrain', metric='image_to_text_R@1', mean=.1), dict(row=name, task='pretrain', metric='pointing_attention', mean=.3)]
    pd.DataFrame(rows).to_csv(tmp_path/'t.csv', index=False)
    run = run_notebook(find_notebook('ablations'), dict(table=str(tmp_path/'t.csv')), tmp_path)
    folder = run if hasattr(run, 'iterdir') else next(tmp_path.glob('ablations/*'))
    table = pd.read_csv(folder/'effects.csv').set_index(['change', 'metric'])
    assert table.loc[('no decoder', 'Dice'), 'ours'] == pytest.approx(-30) and table.loc[('no decoder', 'Dice'), 'paper'] == pytest.approx(49.2 - 65.6)
    assert table['verdict'].to_dict() == {('no decoder', 'Dice'): 'holds', ('no decoder', 'AUC'): 'holds', ('shuffled masks', 'Dice'): 'reversed', ('shuffled masks', 'AUC'): 'not separated here',
                                          ('threshold median', 'Dice'): 'not separated here', ('threshold median', 'AUC'): 'not separated here'}
    assert (folder/'figures'/'ablations.png').exists()
