"The methods that G2D is compared with: losses against loops, gradients where they belong, one loop, exact resume, and every downstream task."
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import make_phantom_store
from g2d.local_alignment import clip_weights, gloria_local_loss, gloria_scores, mgca_local_loss, pixel_loss, word_attention, word_loss
from g2d.models.comparators import WithWords, build_model, comparator, comparators, method_name, word_positions
from g2d.models.g2d import G2D, parts_with_gradient
from g2d.pretrain import Pretrainer, parameter_groups, pretrain
from g2d.profiles import profile
from g2d.settings import G2DError
from g2d.validation import collect_pass, dense_target, losses_of, make_pseudo_mask, summarise

TINY = dict(image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=[32, 16, 16, 8],
            batch_size=6, epochs=1, global_only_steps=1, max_text_tokens=48, report_decoder=(32, 1, 2), memory_slots=16, memory_topk=4, memory_heads=2)
NAMES = list(comparators().index)
NEW = ['gloria', 'mgca', 'mrm', 'mpma']


def tiny(name, **overrides): return comparator(name, **(TINY | overrides))


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('comparators')/'store', 64, size=64, seed=6, split=dict(train=.5, val=.15, test=.35))


@pytest.fixture(scope='module')
def pairs(store):
    rows = [i for i in range(len(store)) if store.index['text'].notna().iloc[i]][:5]
    return torch.from_numpy(np.stack([store.images[i] for i in rows]))[:, None]/255, store.index['text'].iloc[rows].tolist()


# ---------------------------------------------------------------- losses against loops

def gloria_by_hand(words, patches, mask, one=4., two=5., three=10.):
    "The matrix of GLoRIA, film by film, report by report, word by word."
    films, reports = len(patches), [t for t in range(len(words)) if mask[t].any()]
    S = torch.zeros(films, len(reports), dtype=torch.float64)
    for i in range(films):
        P = patches[i].flatten(1).T.double()
        for column, t in enumerate(reports):
            W = words[t][mask[t] > 0].double()
            total = 0.
            for a in range(len(W)):
                share = torch.stack([torch.exp(W[a] @ p)/sum(torch.exp(w @ p) for w in W) for p in P])
                alpha = torch.exp(one*share)/torch.exp(one*share).sum()
                attended = sum(x*p for x, p in zip(alpha, P))
                total = total + torch.exp(two*(W[a] @ attended)/(W[a].norm()*attended.norm()))
            S[i, column] = three*torch.log(total)
    return S, reports


def mgca_by_hand(words, patches, mask, t=.1, omega=None):
    "MGCA's local loss, sample by sample, token by token."
    def side(own, other, weights):
        attended = []
        for x in own:
            a = torch.stack([torch.exp(x @ y/t) for y in other]); a = a/a.sum()
            c = sum(q*y for q, y in zip(a, other)); attended.append(c/c.norm())
        s = torch.stack([torch.stack([x @ c/t for c in attended]) for x in own])
        return sum(w*-(s[k, k] - torch.logsumexp(s[k], 0) + s[k, k] - torch.logsumexp(s[:, k], 0))/2 for k, w in enumerate(weights))
    losses = []
    for b in range(len(words)):
        if not mask[b].any(): continue
        W = F.normalize(words[b][mask[b] > 0].double(), dim=1); P = F.normalize(patches[b].flatten(1).T.double(), dim=1)
        w = torch.full((len(W),), 1/len(W)) if omega is None else omega[b][mask[b] > 0]
        losses.append(side(W, P, w) + side(P, W, torch.full((len(P),), 1/len(P))))
    return sum(losses)/len(losses)


MASKS = dict(full=[[1]*4]*3, ragged=[[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]], one_word=[[1, 0, 0, 0]]*3, one_report_without_words=[[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], one_report_left=[[0]*4, [1, 1, 1, 1], [0]*4])


@pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS)
@pytest.mark.parametrize('twins', [False, True], ids=['different', 'duplicates'])
def test_local_losses_equal_loops(mask, twins):
    torch.manual_seed(1)
    words, patches, mask = torch.randn(3, 4, 6), torch.randn(3, 6, 2, 3), torch.tensor(mask)
    if twins: words[2], mask[2], words[:, 1] = words[0], mask[0], words[:, 0]     # the same report twice, and the same word twice
    S, kept = gloria_by_hand(words, patches, mask)
    assert torch.allclose(gloria_scores(words[kept], patches, mask[kept]).double(), S, atol=1e-4)
    own, label = S[kept], torch.arange(len(kept))
    expected = F.cross_entropy(own, label) + F.cross_entropy(own.T, label)
    assert gloria_local_loss(words, patches, mask, reduction='sum').item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert gloria_local_loss(words, patches, mask).item() == pytest.approx(expected.item()/2, rel=1e-4, abs=1e-5)
    assert mgca_local_loss(words, patches, mask).item() == pytest.approx(mgca_by_hand(words, patches, mask).item(), rel=1e-4, abs=1e-4)
    omega = torch.rand(3, 4)
    assert mgca_local_loss(words, patches, mask, word_weights=omega).item() == pytest.approx(mgca_by_hand(words, patches, mask, omega=clip_weights(omega, mask)).item(), rel=1e-4, abs=1e-4)


def test_what_is_masked_has_no_influence_and_no_gradient():
    torch.manual_seed(2)
    words, patches, mask = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 8, 2, 2, requires_grad=True), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0]*5])
    for loss in (gloria_local_loss, mgca_local_loss):
        changed = torch.where(mask[..., None].bool(), words, 100*torch.randn(3, 5, 8))
        assert loss(changed, patches, mask).item() == pytest.approx(loss(words, patches, mask).item(), rel=1e-5)
        by_words, by_patches = torch.autograd.grad(loss(words, patches, mask), (words, patches))
        assert torch.isfinite(by_words).all() and torch.isfinite(by_patches).all()
        assert (by_words.abs().sum(2) > 0).tolist() == mask.bool().tolist() and (by_patches.flatten(1).abs().sum(1) > 0).tolist() == [True, True, False]
        nothing = loss(words, patches, torch.zeros_like(mask))
        assert nothing.item() == 0 and all((g == 0).all() for g in torch.autograd.grad(nothing, (words, patches)))
        with pytest.raises(G2DError, match='differ in batch or width'): loss(words, patches[:2], mask)
        with pytest.raises(G2DError, match='do not belong together'): loss(words, patches, mask[:, :3])


def test_equal_reports_are_no_negatives_of_each_other():
    torch.manual_seed(3)
    words, patches, mask = torch.randn(4, 3, 8), torch.randn(4, 8, 2, 2), torch.ones(4, 3)
    words[3] = words[0]
    s, ids = gloria_scores(words, patches, mask), torch.tensor([5, 6, 7, 5])
    target = torch.tensor([[.5, 0, 0, .5], [0, 1, 0, 0], [0, 0, 1, 0], [.5, 0, 0, .5]])
    expected = -((target*s.log_softmax(1)).sum(1).mean() + (target*s.T.log_softmax(1)).sum(1).mean())/2
    assert gloria_local_loss(words, patches, mask, same=ids).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(4)
    words, patches, mask = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True), torch.tensor([[1, 1, 0], [1, 1, 1]])
    for loss in (gloria_local_loss, mgca_local_loss): assert torch.autograd.gradcheck(lambda w, p: loss(w, p, mask), (words, patches))


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
def test_half_precision(kind):
    "Large features under autocast: the losses stay finite and near those in float32."
    torch.manual_seed(5)
    words, patches, mask = 8*torch.randn(4, 6, 64), 8*torch.randn(4, 64, 3, 3), torch.ones(4, 6)
    for loss in (gloria_local_loss, mgca_local_loss):
        exact = loss(words.to(kind).float(), patches.to(kind).float(), mask)
        with torch.autocast('cpu', dtype=torch.bfloat16): half = loss(words.to(kind), patches.to(kind), mask)
        assert half.dtype == torch.float32 and torch.isfinite(half) and half.item() == pytest.approx(exact.item(), rel=1e-4)


def test_clipped_weights():
    weights, mask = torch.tensor([[5., 1, 2, 3, 100, 9], [1, 1, 1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1, 1, 0], [0]*6])
    low, high = np.quantile([5, 1, 2, 3, 100], (.1, .9))
    kept = np.clip([5, 1, 2, 3, 100], low, high)
    assert torch.allclose(clip_weights(weights, mask)[0], torch.tensor([*kept/kept.sum(), 0]).float()) and (clip_weights(weights, mask)[1] == 0).all()


def test_pixel_and_word_loss_equal_loops():
    torch.manual_seed(6)
    x, y, hidden = torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.tensor([[True, False, True, False], [False]*4])
    assert pixel_loss(x, y, hidden).item() == pytest.approx(np.mean([((x[b, n] - y[b, n])**2).mean().item() for b in range(2) for n in range(4) if hidden[b, n]]), rel=1e-5)
    assert pixel_loss(x, y, torch.zeros(2, 4).bool()).item() == 0
    with pytest.raises(G2DError, match='differ in shape'): pixel_loss(x, y[:, :3], hidden)
    logits, labels = torch.randn(3, 7), torch.tensor([0, 6, 2])
    assert word_loss(logits, labels).item() == pytest.approx(-np.mean([(z[k] - z.logsumexp(0)).item() for z, k in zip(logits, labels)]), rel=1e-5)
    logits = torch.randn(0, 7, requires_grad=True)
    assert word_loss(logits, labels[:0]).item() == 0 and torch.autograd.grad(word_loss(logits, labels[:0]), logits)[0].shape == (0, 7)
    assert torch.allclose(word_attention(torch.randn(2, 3, 4), torch.randn(5, 4, 2, 2), torch.ones(2, 3)).sum(3), torch.ones(5, 2, 3))


# ---------------------------------------------------------------- models

def test_names_and_constructor():
    shown = [method_name(tiny(name)) for name in NAMES]
    assert len(set(shown)) == 8 and shown[0] == 'G2D' and tiny('g2d') == profile('demo', **TINY)
    assert tiny('mrm', fusion='cross').fusion == 'cross' and comparator('gloria', profile('demo', **TINY)) == tiny('gloria')
    assert method_name(tiny('mpma', local='none', global_weight=0.)) == 'MPMA-style without alignment' and method_name(profile('demo', local='mgca')) == 'G2D + MGCA-style'
    assert type(build_model(tiny('shuffled'))) is G2D and type(build_model(tiny('mgca'))) is WithWords
    with pytest.raises(G2DError, match='There is no method "convirt"'): comparator('convirt')
    with pytest.raises(G2DError, match='expected g2d or mpma'): build_model(tiny('g2d', method='x'))
    with pytest.raises(G2DError, match='expected none, gloria or mgca'): build_model(tiny('g2d', local='x'))


def test_words_are_words(pairs):
    torch.manual_seed(0)
    net = build_model(tiny('gloria', frozen_layers='all'))
    images, texts = pairs
    tokens = net.text_encoder.tokenize(texts)
    mask = word_positions(net.text_encoder, tokens)
    pieces = [net.text_encoder.tokenizer.convert_ids_to_tokens(ids) for ids in tokens['input_ids']]
    assert mask.tolist() == [[p not in ('[CLS]', '[SEP]', '[PAD]') for p in row] for row in pieces] and not mask.all() and mask.any()
    net.eval()
    out = net(images, texts)
    assert torch.allclose(out.text_emb, net.encode_text(texts), atol=1e-5) and torch.allclose(out.image_emb, net.encode_image(images)[0], atol=1e-5)
    assert out.extra['words'].shape == (5, mask.shape[1], net.profile.embed_dim) and not any(q.requires_grad for q in net.text_encoder.parameters())
    long = net(images[:1], texts[:1]).extra['words']
    assert torch.allclose(long[0], out.extra['words'][0, :long.shape[1]], atol=1e-5)       # other reports of the batch do not change a word
    with pytest.raises(G2DError, match='5 images but 4 texts'): net(images, texts[:4])


@pytest.mark.parametrize('name', NAMES)
def test_gradient_goes_where_it_should(name, pairs):
    p = tiny(name, global_only_steps=0)
    torch.manual_seed(0)
    net, (images, texts) = build_model(p), pairs
    out = net(images, texts, decode=p.dense_target != 'none')
    parts = losses_of(p, out, dense_target(p, make_pseudo_mask(p), out, images), texts)
    expected = {'g2d': {'dense'}, 'reconstruction': {'dense'}, 'shuffled': {'dense'}, 'gloria': {'local'}, 'mgca': {'local'}, 'mrm': {'pixel', 'word'}, 'mpma': {'local', 'pixel', 'word'}}.get(name, set())
    assert set(parts) == {'global', 'loss'} | expected and all(torch.isfinite(v) for v in parts.values())
    weights = dict(**{'global': p.global_weight}, dense=p.dense_weight, local=p.local_weight, pixel=p.pixel_weight, word=p.word_weight)
    assert parts['loss'].item() == pytest.approx(sum(weights[k]*v.item() for k, v in parts.items() if k != 'loss'), rel=1e-5)
    parts['loss'].backward()
    aligned = {'image_encoder', 'image_projector', 'pool', 'text_encoder', 'text_projector'}
    reached = parts_with_gradient(net)
    if name == 'mrm': assert 'image_encoder' in reached and not reached & {'image_projector', 'pool', 'text_projector', 'word_projector', 'text_encoder'}
    else: assert aligned <= reached
    assert ('word_projector' in reached) == (p.local != 'none') and ('decoder' in reached) == (p.dense_target != 'none')
    # several processes wait for all: a parameter without gradient would stop them, save the decoder that `Pretrainer.step` looks after
    waiting = [n for n, q in net.named_parameters() if q.requires_grad and q.grad is None and not n.startswith('decoder.')]
    assert not waiting, waiting
    groups = parameter_groups(net, p)
    fast = {id(x) for x in groups[1]['params']}
    assert groups[1]['factor'] == p.head_lr_factor and {n.split('.')[0] for n, x in net.named_parameters() if id(x) in fast} == {'image_projector', 'text_projector', 'pool'} | ({'word_projector'} if p.local != 'none' else set())


def test_a_decoder_of_masks_may_learn_faster():
    "decoder_lr_factor gives the decoder a group of its own, and every trained parameter stays in exactly one group; 1 leaves the groups as they were."
    net = build_model(tiny('g2d'))
    plain, faster = (parameter_groups(net, tiny('g2d').replace(decoder_lr_factor=k)) for k in (1., 4.))
    assert len(plain) == 2 and len(faster) == 3 and faster[2]['factor'] == 4
    assert [id(x) for x in faster[2]['params']] == [id(x) for x in net.decoder.parameters()]
    held = [id(x) for g in faster for x in g['params']]
    assert len(held) == len(set(held)) and set(held) == {id(x) for x in net.parameters() if x.requires_grad} == {id(x) for g in plain for x in g['params']}


# ---------------------------------------------------------------- the loop

def run(store, p, out, stop=None, pictures=False):
    "Three steps; `stop` ends the run after that step, as a kill would. Most of its time would go into pictures."
    from unittest.mock import patch
    if not pictures:
        with patch('g2d.views.sample_masks'), patch('g2d.views.loss_curves'): return run(store, p, out, stop, True)
    out.mkdir(exist_ok=True)
    it = Pretrainer(store, p, out, device='cpu', progress=False, max_steps=3, val_images=6, checkpoint_seconds=0 if stop else 60)
    plain = it._after_step
    def after(row, *rest):
        plain(row, *rest)
        if row['step'] == stop: raise KeyboardInterrupt
    it._after_step = after
    if stop is None: return it.run()
    with pytest.raises(KeyboardInterrupt): it.run()
    return Checkpoint.load(out)


@pytest.fixture(scope='module')
def trained(store, tmp_path_factory):
    "Each method after three steps, made when first asked for."
    folder, made = tmp_path_factory.mktemp('trained'), {}
    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = run(store, tiny(name), folder/name, pictures=name == 'mpma')
        return made[name]
    return get


@pytest.mark.parametrize('name', NAMES)
def test_every_method_pre_trains(name, trained):
    c = trained(name)
    import pandas as pd
    log, validation = (pd.read_csv(c.path.parent/f'{kind}.csv') for kind in ('log', 'validation'))
    losses = {'global', *({'local'} if name in ('gloria', 'mgca', 'mpma') else ()), *({'pixel', 'word'} if name in ('mrm', 'mpma') else ()), *({'dense'} if c.profile.dense_target != 'none' else ())}
    assert {k for k in log if k in ('global', 'dense', 'local', 'pixel', 'word')} == losses and log[[*(losses - {'dense'}), 'loss']].notna().all().all() and c.about['step'] == 3
    assert {k[4:] for k in validation if k.startswith('val_')} == losses | {'loss'} and ('iou_predicted' in validation) == (c.profile.dense_target != 'none')
    assert {'pointing_attention', 'image_to_text_R@1'} <= set(validation)
    if name == 'mpma': assert (c.path.parent/'losses.png').is_file() and (c.path.parent/'masks'/'epoch_001.png').is_file()
    torch.manual_seed(c.profile.seed)
    before = build_model(c.profile).state_dict()
    moved = {k.split('.')[0] for k, v in c.weights.items() if v.is_floating_point() and not torch.equal(v, before[k]) and 'running' not in k}
    assert 'image_encoder' in moved and ('decoder' in moved) == (c.profile.dense_target != 'none')
    if name in ('mrm', 'mpma'): assert {'pixel_decoder', 'report_decoder'} <= moved
    net = c.model()
    assert type(net) is type(build_model(c.profile)) and all(torch.equal(v, net.state_dict()[k]) for k, v in c.weights.items())


@pytest.mark.parametrize('name', NEW)
def test_a_stopped_run_ends_with_the_same_weights(name, store, trained, tmp_path):
    whole = trained(name)
    half = run(store, tiny(name), tmp_path/'run', stop=1)
    assert half.about['step'] == 1 and half.about['position']
    torch.manual_seed(99); np.random.seed(99)
    again = run(store, tiny(name), tmp_path/'run')
    assert again.about['step'] == 3 and [k for k, v in whole.weights.items() if not torch.equal(v, again.weights[k])] == []
    assert whole.about['validation'][-1] == again.about['validation'][-1]


def test_masks_of_a_step_do_not_depend_on_what_ran_before(store, tmp_path):
    "The seed of a step is its own: the same step after other random numbers hides the same patches and words."
    it = Pretrainer(store, tiny('mpma'), tmp_path, device='cpu', progress=False, max_steps=3)
    batch, seen = next(iter(it.loader)), []
    it.net.train()
    plain = it.net._rebuilt
    it.net._rebuilt = lambda *a: seen.append(plain(*a)) or seen[-1]
    for noise in (1, 2):
        torch.manual_seed(noise); it.step(batch); it.optimizer.zero_grad()
    assert torch.equal(seen[0]['hidden_patches'], seen[1]['hidden_patches']) and torch.equal(seen[0]['word_labels'], seen[1]['word_labels']) and seen[0]['hidden_patches'].any()


def test_the_gradient_of_the_memory_is_the_same_each_time():
    "Many queries share a row: adding their gradients up in the order in which two threads come by would end exact resume."
    from g2d.models.mpma import SharedMemory
    torch.manual_seed(0)
    memory, x = SharedMemory(64, 8, 4, 4), torch.randn(8, 128, 64)
    torch.set_num_threads(2)
    def gradient(): return torch.autograd.grad(memory(x).square().sum(), memory.matrix)[0]
    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(20))


@pytest.mark.parametrize('name', ['gloria', 'mrm', 'mpma'])
def test_a_frozen_text_encoder_stays(name, store, tmp_path):
    "Whole-text embeddings are kept where no loss reads words or masked text: in MRM alone."
    it = Pretrainer(store, tiny(name, frozen_layers='all'), tmp_path, device='cpu', progress=False, max_steps=3)
    start = {k: v.clone() for k, v in it.net.state_dict().items()}
    it.net.train()
    it.step(next(iter(it.loader))); it.update()
    moved = {k.split('.')[0] for k, v in it.net.state_dict().items() if not torch.equal(v, start[k])}
    assert 'text_encoder' not in moved and ('word_projector' in moved) == (it.profile.local != 'none') and 'image_encoder' in moved
    assert bool(it.net.text_encoder._cache) == (name == 'mrm')


@pytest.mark.parametrize('name', ['gloria', 'mpma'])
def test_validation_is_the_same_each_time(name, store, trained):
    view = store.select(split='val')
    net = trained(name).model()
    torch.manual_seed(1); first = summarise(collect_pass(net, view, limit=6))
    torch.manual_seed(2); second = summarise(collect_pass(net, view, limit=6))
    assert first == second and 'val_local' in first and 'iou_predicted' not in first


# ---------------------------------------------------------------- downstream

@pytest.mark.parametrize('name', NEW)
def test_every_downstream_task_takes_the_checkpoint(name, store, trained):
    from g2d.tasks import classification, grounding, retrieval, segmentation, zero_shot
    from g2d.tasks.protocols import protocol
    from g2d.tasks.training import find_start
    c = trained(name)
    start = find_start(c)
    assert start.name == f'{method_name(c.profile)} encoder' and start.name != 'G2D encoder'
    probe = classification.finetune(store, start, protocol('linear', 'demo'), steps=2, draws=0, min_positives=2)
    assert probe.about['encoder_unchanged'] and 0 <= probe.metrics['auroc'] <= 1
    net = segmentation.SegmentationNet(find_start(c))
    assert all(torch.equal(v, c.weights[k]) for k, v in net.state_dict().items() if k.startswith('image_encoder.') and k in c.weights)
    tuned = segmentation.finetune(store, c, protocol('segmentation', 'demo'), .5, max_steps=1, limit=6)
    assert tuned.about['start'] == start.name and 0 <= tuned.metrics['dice_positives'] <= 1
    zero = zero_shot.evaluate(store, c, 'demo', draws=0)
    assert zero.about['start'] == method_name(c.profile) and 0 <= zero.metrics['auroc_macro'] <= 1
    found = retrieval.evaluate(store, c, 'demo', draws=0, classes=[])
    assert found.about['start'] == method_name(c.profile) and 0 <= found.metrics['image_to_text_R@1'] <= 1
    ground = grounding.evaluate(store, c, protocol('grounding', 'demo'), baselines=True, limit=4)
    assert ground.about['start'] == method_name(c.profile) and 0 <= ground.metrics['pointing'] <= 1


def test_what_a_method_does_not_have_is_said(trained, tmp_path):
    from g2d.tasks.training import find_start
    c = trained('mpma')
    with pytest.raises(G2DError, match='no mask decoder'): find_start(c, parts=('encoder', 'decoder'))
    with pytest.raises(G2DError, match='no mask decoder'): c.export_unet(tmp_path/'unet.safetensors')
    assert c.export_timm(tmp_path/'timm.safetensors').is_file() and trained('gloria').export_unet(tmp_path/'unet.safetensors').is_file()
