"MPMA: masks and targets against loops, no leak of what is hidden, the memory against brute force, gradients where they belong, ViT through the tasks, and checkpoints."
import json, random
import numpy as np
import pytest
import torch
from torch.nn import functional as F

timm = pytest.importorskip('timm')
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import make_phantom_store, phantom
from g2d.models.decoder import smp_arguments
from g2d.models.g2d import G2D, parts_with_gradient
from g2d.models.image_encoder import ImageEncoder
from g2d.models.mpma import (MPMA, PixelDecoder, ReportDecoder, SharedMemory, UNetPixels, grid_positions, hide_patches, hide_words, norm_pixels, number_words, patchify, piece_tables,
                             unpatchify)
from g2d.models.text_encoder import TextEncoder, load_bert, minilm_folder
from g2d.profiles import profile
from g2d.settings import G2DError
from g2d.validation import losses_of

BACKBONES = ('test_vit', 'resnet18')


def tiny(**changes):
    return profile('demo', **{**dict(method='mpma', dense_target='none', local='gloria', image_encoder='test_vit', pretrained=False, in_chans=1, encoder_depth=4, decoder_channels=[16, 16, 16, 8],
        text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, report_decoder=[32, 2, 4], pixel_decoder=[32, 1, 4], memory_slots=24, memory_topk=4, memory_heads=4, max_text_tokens=64), **changes})


@pytest.fixture(autouse=True)
def one_thread(clean_state): torch.set_num_threads(1)


@pytest.fixture(scope='module')
def pairs():
    made = [phantom(seed=seed, size=64) for seed in range(4)]
    return torch.stack([torch.from_numpy(p.image) for p in made])[:, None]/255, [p.text for p in made]


@pytest.fixture(scope='module')
def store(tmp_path_factory): return make_phantom_store(tmp_path_factory.mktemp('mpma')/'store', 48, size=64, seed=6)


def build(**changes):
    torch.manual_seed(0)
    return MPMA(tiny(**changes))


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance, (a - b).abs().max().item()


# ---------------------------------------------------------------- patches

@pytest.mark.parametrize('height, width, side', [(32, 32, 16), (48, 32, 8), (16, 64, 4)])
def test_patchify_against_a_loop_and_back(height, width, side):
    x = torch.rand(3, 1, height, width)
    p, columns = patchify(x, side), width//side
    assert p.shape == (3, height*width//side**2, side**2)
    for n in range(p.shape[1]):
        row, column = divmod(n, columns)
        for k in range(side*side): assert torch.equal(p[:, n, k], x[:, 0, row*side + k//side, column*side + k % side])
    assert torch.equal(unpatchify(p, (height//side, columns)), x)


@pytest.mark.parametrize('n', [1, 2, 7, 16, 196])
@pytest.mark.parametrize('ratio', [0., .1, .3, .5, .75, .9, .999])
def test_image_ratio_is_exact(n, ratio):
    hidden, keep = hide_patches(20, n, ratio)
    wanted = min(round(ratio*n), n - 1)
    assert (hidden.sum(1) == wanted).all() and keep.shape == (20, n - wanted)
    for h, k in zip(hidden, keep): assert k.tolist() == [i for i in range(n) if not h[i]]


def test_masks_are_random_and_repeatable():
    draw = lambda seed: hide_patches(2000, 16, .75, torch.Generator().manual_seed(seed))[0]
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert (draw(1).float().mean(0) - .75).abs().max() < .05                      # 5 standard deviations
    assert draw(1)[0].tolist() != draw(1)[1].tolist()                             # each film has its own


def test_norm_pix_loss_against_a_loop():
    x, predicted = torch.rand(2, 5, 16), torch.randn(2, 5, 16)
    hidden, found = torch.rand(2, 5) < .6, norm_pixels(x)
    total = count = 0.
    for b in range(2):
        for n in range(5):
            values = [float(v) for v in x[b, n]]
            mean = sum(values)/16
            deviation = (sum((v - mean)**2 for v in values)/15 + 1e-6)**.5        # unbiased, as torch.var of MAE
            assert float(found[1][b, n]) == pytest.approx(mean, abs=1e-6) and float(found[2][b, n]) == pytest.approx(deviation, abs=1e-6)
            if not hidden[b, n]: continue
            total, count = total + sum((float(q) - (v - mean)/deviation)**2 for q, v in zip(predicted[b, n], values))/16, count + 1
    from g2d.local_alignment import pixel_loss
    assert float(pixel_loss(predicted, found[0], hidden)) == pytest.approx(total/count, rel=1e-4)


def test_grid_positions_equal_mae():
    "numpy transcription of MAE's get_2d_sincos_pos_embed: the first half of the width encodes columns, each half is sines, then cosines."
    def one(width, places):
        omega = 1/10000**(np.arange(width//2)/(width/2.))
        out = np.einsum('m,d->md', places.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], 1)
    w, h = np.meshgrid(np.arange(5.), np.arange(3.))
    want = np.concatenate([one(16, w), one(16, h)], 1)
    close(grid_positions(32, (3, 5)), torch.from_numpy(want).float(), 1e-6)
    with pytest.raises(G2DError, match='4 divides'): grid_positions(30, (2, 2))


# ---------------------------------------------------------------- words

class Pieces:
    "A slow tokenizer with a vocabulary given as a list."
    def __init__(self, pieces, special): self.pieces, self.all_special_ids = pieces, special
    def __len__(self): return len(self.pieces)
    def convert_ids_to_tokens(self, ids): return [self.pieces[i] for i in ids]


@pytest.mark.parametrize('pieces, ids, want', [
    (['<pad>', '[CLS]', 'lung', '##s', 'heart', '.'], [1, 2, 3, 4, 5, 0], [-1, 0, 0, 1, 2, -1]),                       # WordPiece
    (['<pad>', '<s>', 'lung', 's', 'Ġheart', 'Ġno'], [1, 2, 3, 4, 5, 3], [-1, 0, 0, 1, 2, 2]),                         # byte-level: the first word has no mark
    (['<pad>', '<s>', '▁lung', 's', '▁heart', '.'], [1, 2, 3, 4, 5, 0], [-1, 0, 0, 1, 1, -1]),                         # SentencePiece
    (['<pad>', '<s>', 'a', 'b', 'c', 'd'], [1, 2, 3, 4, 5, 0], [-1, 0, 1, 2, 3, -1]),                                  # letters without marks
    (['<pad>', '[CLS]', 'lung', '##s', 'heart', '##t'], [1, 3, 5, 4, 1, 5], [-1, 0, 0, 1, -1, 2])])                    # cut off: a continuation comes first
def test_words_of_other_tokenizers(pieces, ids, want):
    ids = torch.tensor([ids])
    assert number_words(ids, (ids != 0).long(), *piece_tables(Pieces(pieces, [0, 1]))).tolist() == [want]


def random_reports(n, seed):
    rng = random.Random(seed)
    words = 'pneumothorax no cardiomegaly, left right lung heart effusion hydropneumothorax 3.5 cm well-defined opacity (new). atelectasis/consolidation the'.split()
    return [' '.join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(n)]


@pytest.mark.parametrize('name', ['tiny', 'minilm'])
def test_words_are_those_of_the_fast_tokenizer_and_never_split(name):
    tokenizer = TextEncoder('tiny').tokenizer if name == 'tiny' else load_bert(minilm_folder())[1]
    found = tokenizer(random_reports(40, 1) + ['x'], padding=True, truncation=True, max_length=60, return_tensors='pt')
    words = number_words(found['input_ids'], found['attention_mask'], *piece_tables(tokenizer))
    for row, mine in enumerate(words.tolist()):
        theirs = [-1 if w is None else w for w in found.word_ids(row)]
        dense = {w: i for i, w in enumerate(dict.fromkeys(w for w in theirs if w >= 0))}
        special = set(tokenizer.all_special_ids)                                  # [UNK] is a word there and none here
        if not special & set(found['input_ids'][row].tolist()) - {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}:
            assert mine == [dense.get(w, -1) for w in theirs]
    for ratio in (0., .15, .5, .77, 1.):
        hidden = hide_words(words, ratio)
        assert not hidden[words < 0].any()
        for w, h in zip(words, hidden):
            n, chosen = int(w.max()) + 1, set(w[h].tolist())
            assert len(chosen) == (max(1, round(ratio*n)) if ratio else 0)
            assert all(bool(h[i]) == (int(w[i]) in chosen) for i in range(len(w)) if w[i] >= 0)      # all pieces or none


def test_every_word_can_be_hidden_and_a_text_without_words_has_none():
    words = torch.tensor([[-1, 0, 0, 1, 2, -1]]).expand(3000, -1)
    share = hide_words(words, .4).float().mean(0)
    assert ((share[[1, 3, 4]] - 1/3).abs() < .05).all() and torch.equal(share[1], share[2]) and share[0] == share[5] == 0
    assert not hide_words(torch.full((2, 4), -1), .5).any()


# ---------------------------------------------------------------- memory

def test_memory_against_a_loop():
    torch.manual_seed(1)
    memory, x = SharedMemory(12, slots=7, topk=3, heads=2), torch.randn(2, 4, 12)
    torch.nn.init.normal_(memory.matrix)
    rows, weights = memory.query(x)
    want, (q, k, v) = torch.zeros(2, 4, 12), (layer(y) for layer, y in ((memory.q, x), (memory.k, memory.matrix), (memory.v, memory.matrix)))
    for b in range(2):
        for n in range(4):
            for head in range(2):
                part = slice(6*head, 6*head + 6)
                scores = [float((q[b, n, part] @ k[s, part]).detach())/6**.5 for s in range(7)]
                best = sorted(range(7), key=lambda s: -scores[s])[:3]
                assert rows[b, head, n].tolist() == best
                e = [np.exp(scores[s]) for s in best]
                for s, value in zip(best, e): want[b, n, part] += value/sum(e)*v[s, part].detach()
                assert weights[b, head, n].tolist() == pytest.approx([value/sum(e) for value in e], abs=1e-5)
    close(memory(x), x + memory.out(want), 1e-5)


def test_memory_learns_only_through_chosen_rows():
    torch.manual_seed(2)
    memory, x = SharedMemory(16, slots=50, topk=2, heads=4), torch.randn(1, 3, 16, requires_grad=True)
    torch.nn.init.normal_(memory.matrix)
    memory(x).square().sum().backward()
    chosen = set(memory.query(x)[0].flatten().tolist())
    moved = {i for i, g in enumerate(memory.matrix.grad) if g.abs().sum() > 0}
    assert moved == chosen and len(chosen) < 50 and x.grad.abs().sum() > 0
    assert all(q.grad is not None for q in memory.parameters())
    for slots, topk in ((4, 5), (4, 0)):
        with pytest.raises(G2DError, match='memory_topk'): SharedMemory(16, slots, topk, 4)
    with pytest.raises(G2DError, match='memory_heads'): SharedMemory(16, 8, 2, 3)


# ---------------------------------------------------------------- what is hidden stays hidden

@pytest.mark.parametrize('name', BACKBONES)
def test_hidden_pixels_and_words_reach_nothing_but_the_targets(name, pairs):
    "Change only what is hidden: every prediction and every embedding is the same; change what is shown: they differ."
    films, texts = pairs
    model = build(image_encoder=name).train()
    tokens = model.text_encoder.tokenize(texts)
    run = lambda films, tokens: (torch.manual_seed(7), model(films, tokens))[1]
    out = run(films, tokens)
    cover = F.interpolate(out.extra['hidden_patches'].view(4, 1, 4, 4).float(), scale_factor=16) > 0
    torch.manual_seed(7); model._hide_patches(films, .75, None)                    # the same draws, in the same order
    hidden = model._hide_words(tokens, .5, None)[1]
    assert hidden.sum() == len(out.extra['word_labels'])
    ids, piece = tokens['input_ids'], model.text_encoder.tokenizer.convert_tokens_to_ids
    others = dict(tokens, input_ids=torch.where(hidden, torch.where(model.begins[ids], piece('k'), piece('##k')), ids))   # other words, cut alike
    again = run(torch.where(cover, torch.rand_like(films), films), others)
    predicted = lambda o: (o.image_emb, o.text_emb, o.patch_emb, o.attention, o.extra['words'], o.extra['pixels'], o.extra['word_logits'])
    for a, b in zip(predicted(out), predicted(again)): close(a, b, 1e-5)
    assert not torch.equal(out.extra['pixel_target'], again.extra['pixel_target']) and not torch.equal(out.extra['word_labels'], again.extra['word_labels'])
    seen = run(torch.where(cover, films, 1 - films), tokens)
    for a, b in zip((out.image_emb, out.extra['pixels'], out.extra['word_logits']), (seen.image_emb, seen.extra['pixels'], seen.extra['word_logits'])): assert (a - b).abs().max() > 1e-3


def test_kept_states_of_the_full_report_do_not_leak(pairs):
    films, texts = pairs
    model = build(frozen_layers=1, freeze_embeddings=True).train()
    torch.manual_seed(3); plain = model(films, texts)
    model.text_encoder.keep_prefixes(texts)
    assert 'hidden' in model.text_encoder.tokenize(texts)
    torch.manual_seed(3); kept = model(films, texts)
    close(plain.extra['words'], kept.extra['words'], 1e-4); close(plain.text_emb, kept.text_emb, 1e-4)


def test_closed_cells_of_a_convolution(pairs):
    "A cell is closed to the words exactly if all patches under it are hidden, at stride 16 and 32."
    for changes in (dict(), dict(encoder_depth=5, decoder_channels=[16, 16, 16, 8, 8]), dict(mask_patch=32)):
        model = build(image_encoder='resnet18', **changes).eval()
        hidden, keep = model._hide_patches(pairs[0], .5, None)
        side, seen = model.patch_side, model._encode(pairs[0], hidden, keep)
        cover, stride = F.interpolate(hidden.view(4, 1, 64//side, 64//side).float(), scale_factor=side)[:, 0] > 0, 64//seen.grid[0]
        want = torch.stack([cover[:, r*stride:(r + 1)*stride, c*stride:(c + 1)*stride].flatten(1).all(1) for r in range(seen.grid[0]) for c in range(seen.grid[1])], 1)
        assert torch.equal(seen.unseen, want) and not seen.unseen.all(1).any()


# ---------------------------------------------------------------- shapes and switches

@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('factor', [1, 2])
def test_shapes_and_super_resolution(name, factor, pairs):
    films = pairs[0] if factor == 1 else F.interpolate(pairs[0], scale_factor=2, mode='bilinear')
    model = build(image_encoder=name, super_resolution=factor, norm_pix=False)
    assert model.film_size == 64*factor
    out = model.train()(films, pairs[1])
    assert out.extra['pixels'].shape == out.extra['pixel_target'].shape == (4, 16, (16*factor)**2) and out.mask_logits is None
    close(unpatchify(out.extra['pixel_target'], (4, 4)), films, 1e-6)
    assert (out.extra['hidden_patches'].sum(1) == 12).all() and out.patch_emb.flatten(2).shape == (4, 128, 4 if name == 'test_vit' else 16)
    with torch.no_grad(): full = model.eval()(films, pairs[1])
    assert full.patch_emb.shape == (4, 128, 4, 4) and full.attention.shape == (4, 4, 4, 4)
    if factor == 1: return
    close(full.image_emb, model.encode_image(F.avg_pool2d(films, 2))[0])
    assert 'pixels' not in model(pairs[0], pairs[1]).extra                         # embedding films of the crop's size is allowed, training on them is not
    with pytest.raises(G2DError, match='trained on films of 128 pixels, not 64'): model.train()(*pairs)


def test_word_targets_all_asks_every_position(pairs):
    tokens = build().text_encoder.tokenize(pairs[1][:2] + ['no'])
    out = build(word_targets='all').train()(pairs[0][:3], tokens)
    assert torch.equal(out.extra['word_labels'], tokens['input_ids'].flatten()) and out.extra['word_logits'].shape == (tokens['input_ids'].numel(), 141)


@pytest.mark.parametrize('name', BACKBONES)
def test_several_draws_of_words_ask_the_same_films(name, pairs):
    "The first draw is the only one of word_draws=1, each further one hides as many words of its own choice, and evaluation draws once."
    outs = []
    for draws in (1, 3):
        torch.manual_seed(0)
        model = build(image_encoder=name, word_draws=draws).train()
        torch.manual_seed(1)
        outs.append(model(*pairs))
    one, three = outs
    n = len(one.extra['word_labels'])
    close(three.extra['word_logits'][:n], one.extra['word_logits']); close(three.image_emb, one.image_emb); close(three.text_emb, one.text_emb)
    assert torch.equal(three.extra['word_labels'][:n], one.extra['word_labels']) and len(three.extra['word_labels']) > 2*n
    assert not torch.equal(three.extra['word_labels'][n:2*n], one.extra['word_labels'])
    assert len(model.eval()(*pairs).extra['word_labels']) < 2*n
    with pytest.raises(G2DError, match='word_draws is 0'): build(word_draws=0)


@pytest.mark.parametrize('name', BACKBONES)
def test_nothing_hidden_equals_the_plain_model(name, pairs):
    "With both ratios 0 the training pass embeds like `encode_image` and `encode_text`; a MAE that hides nothing is a plain ViT."
    model = build(image_encoder=name, image_mask_ratio=0., word_mask_ratio=0.).train()
    for m in model.modules():
        if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d, torch.nn.Dropout)): m.eval()
    out, (image_emb, patch_emb, attention) = model(*pairs), model.encode_image(pairs[0])
    close(out.image_emb, image_emb); close(out.patch_emb.flatten(2), patch_emb.flatten(2)); close(out.attention.flatten(2), attention.flatten(2))
    assert set(out.extra) == {'words', 'word_mask'}
    for part in (model.text_encoder, model.text_projector): part.eval()
    close(model(*pairs).text_emb, model.encode_text(pairs[1]))


def test_evaluation_is_full_and_repeatable(pairs):
    model = build().eval()
    with torch.no_grad(): a, b = model(*pairs), model(*pairs, decode=False)
    close(a.image_emb, model.encode_image(pairs[0])[0]); close(a.text_emb, model.encode_text(pairs[1]))
    assert all(torch.equal(a.extra[k], b.extra[k]) for k in a.extra) and {'pixels', 'word_logits', 'words'} <= set(a.extra)
    special = set(model.text_encoder.tokenizer.all_special_ids)
    ids = model.text_encoder.tokenize(pairs[1])['input_ids']
    assert a.extra['word_mask'].bool().tolist() == [[i not in special for i in row] for row in ids.tolist()]


def test_alignment_on_full_or_masked_inputs(pairs):
    full, masked = build(align_on='full').train(), build().train()
    for m in (*full.modules(), *masked.modules()):
        if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.Dropout)): m.eval()
    a, b = full(*pairs), masked(*pairs)
    close(a.image_emb, full.encode_image(pairs[0])[0])
    assert a.patch_emb.shape[-2:] == (4, 4) and b.patch_emb.shape[-2:] == (4, 1) and a.extra['word_mask'].sum() > b.extra['word_mask'].sum()
    # hidden words take no part in the local alignment
    assert b.extra['word_mask'].sum() + len(b.extra['word_labels']) == a.extra['word_mask'].sum()


def test_settings_that_make_no_sense():
    for changes, message in ((dict(method='g2d'), 'method="mpma"'), (dict(dense_target='pseudo'), 'dense_target="none"'), (dict(fusion='sum'), 'fusion'), (dict(image_mask_ratio=1.), 'below 1'),
                             (dict(word_mask_ratio=1.5), '0 to 1'), (dict(report_decoder=[30, 2]), 'width, layers and heads'), (dict(report_decoder=[32, 1, 5]), 'do not divide'), (dict(super_resolution=3), 'super_resolution')):
        with pytest.raises(G2DError, match=message): MPMA(tiny(**changes))
    model = build()
    with pytest.raises(G2DError, match='4 images but 1 texts'): model(torch.rand(4, 1, 64, 64), ['no'])
    with pytest.raises(G2DError, match='patches of 16'): model(torch.rand(2, 1, 60, 60), ['no', 'no'])
    with pytest.raises(G2DError, match='no masks'): model.predict_mask(torch.rand(1, 1, 64, 64))
    with pytest.raises(G2DError, match='no report decoder'): build(word_weight=0.).fuse(torch.rand(1, 1, 64, 64), ['no'])


# ---------------------------------------------------------------- gradients

LOSSES = {
    'global': (lambda o: (F.normalize(o.image_emb) @ F.normalize(o.text_emb).T).diagonal().sum(), {'image_encoder', 'image_projector', 'pool', 'text_encoder', 'text_projector'}),
    'local': (lambda o: torch.einsum('bld,bdn->', o.extra['words'], o.patch_emb.flatten(2)), {'image_encoder', 'image_projector', 'pool', 'text_encoder', 'word_projector'}),
    'pixel': (lambda o: (o.extra['pixels'] - o.extra['pixel_target']).square().mean(), {'image_encoder', 'pixel_decoder'}),
    'word': (lambda o: F.cross_entropy(o.extra['word_logits'], o.extra['word_labels']), {'image_encoder', 'report_decoder'})}


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('loss', LOSSES)
def test_each_loss_trains_its_parts_and_no_other(name, loss, pairs):
    of, want = LOSSES[loss]
    model = build(image_encoder=name).train()
    of(model(*pairs)).backward()
    assert parts_with_gradient(model) == want


@pytest.mark.parametrize('fusion', ['add', 'cross', 'memory'])
def test_every_fusion_brings_the_film_to_the_words(fusion, pairs):
    model = build(fusion=fusion).train()
    LOSSES['word'][0](model(*pairs)).backward()
    assert parts_with_gradient(model) == {'image_encoder', 'report_decoder'}
    decoder = model.report_decoder
    assert decoder.from_image.weight.grad.abs().sum() > 0 and (decoder.memory is not None) == (fusion == 'memory')
    assert all((layer.attend_cross is None) == (fusion == 'add') for layer in decoder.layers)
    if fusion == 'memory': assert decoder.memory.matrix.grad.abs().sum() > 0
    with torch.no_grad():
        a, b = model.eval().fuse(*pairs)[0], model.fuse(pairs[0].flip(0), pairs[1])[0]
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize('changes', [dict(), dict(fusion='add'), dict(fusion='cross'), dict(local='none'), dict(pixel_weight=0.), dict(word_weight=0.), dict(align_on='full'), dict(frozen_layers='all'),
                                     dict(frozen_layers='all', local='none', align_on='full'), dict(image_encoder='resnet18'), dict(word_targets='all'), dict(super_resolution=2, crop_size=32)], ids=str)
def test_no_trained_parameter_is_without_a_gradient(changes, pairs):
    "DistributedDataParallel waits for all of them; and a part that is switched off is not built."
    model = build(**changes).train()
    p, out = model.profile, model(*pairs)
    parts = losses_of(p, out, None, pairs[1], dense=False)
    parts['loss'].backward()
    assert [n for n, q in model.named_parameters() if q.requires_grad and q.grad is None] == []
    assert ('local' in parts, 'pixel' in parts, 'word' in parts) == (p.local != 'none', p.pixel_weight > 0, p.word_weight > 0)
    assert (model.word_projector is None, model.pixel_decoder is None, model.report_decoder is None) == (p.local == 'none', not p.pixel_weight, not p.word_weight) and model.decoder is None
    if p.frozen_layers == 'all': assert 'text_encoder' not in parts_with_gradient(model) and 'report_decoder' in parts_with_gradient(model)


def test_the_word_scores_are_tied_to_the_embeddings():
    decoder = ReportDecoder(50, 16, 8, 32, 1, 4, 'add')
    hidden = torch.randn(3, 32)
    close(decoder.logits(hidden), hidden @ decoder.words.weight.T + decoder.bias, 1e-6)
    assert sum(q.numel() == 50*32 for q in decoder.parameters()) == 1


# ---------------------------------------------------------------- reconstruction

def test_pixel_decoder_puts_features_in_their_places():
    "Shuffling the shown patches together with their numbers changes nothing; hidden ones differ only by their position."
    torch.manual_seed(0)
    decoder, z = PixelDecoder(8, 4, 16, 1, 2).eval(), torch.randn(1, 3, 8)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad(): a, b = decoder(z, torch.tensor([[0, 4, 7]]), (3, 3)), decoder(z[:, order], torch.tensor([[0, 4, 7]])[:, order], (3, 3))
    close(a, b, 1e-6)
    assert a.shape == (1, 9, 4)


def test_a_u_net_learns_what_each_place_has_on_average():
    "At the start the positions change nothing; they alone can draw any mean film, at any size."
    torch.manual_seed(0)
    decoder, pyramid = UNetPixels((4, 8), 8, 2, 32, (8, 4)), [torch.randn(2, 4, 16, 16), torch.randn(2, 8, 8, 8)]
    with torch.no_grad():
        plain = patchify(F.pixel_shuffle(decoder.unet(pyramid, (32, 32)), 2), 8)
        assert torch.equal(decoder(pyramid, (32, 32)), plain) and plain.shape == (2, 64, 64)
        mean, features = torch.randn(64, 64), decoder.places[:2](grid_positions(32, (8, 8)))
        decoder.places[2].weight.copy_(torch.linalg.lstsq(features.double(), mean.double()).solution.T)
        close(decoder(pyramid, (32, 32)) - plain, mean.expand(2, -1, -1), .1)     # float32 of an ill-conditioned fit; a sum of stripes is off by more than 1
        assert decoder([torch.randn(1, 4, 12, 16), torch.randn(1, 8, 6, 8)], (24, 32)).shape == (1, 48, 64)


def test_the_report_decoder_starts_from_counts_and_trains_on_the_words_that_occur(pairs):
    model = build()
    decoder, texts = model.report_decoder, pairs[1]
    model.start_words(texts)
    tokens = model.text_encoder.tokenize(texts)
    words = number_words(tokens['input_ids'], tokens['attention_mask'], model.begins, model.special) >= 0
    counts = np.zeros(len(decoder.bias))
    for i in tokens['input_ids'][words].tolist(): counts[i] += 1
    close(decoder.bias.detach().softmax(0), torch.tensor((counts + .01)/(counts + .01).sum()).float(), 1e-6)
    assert decoder.vocabulary.tolist() == np.flatnonzero(counts).tolist()
    hidden, labels = torch.randn(9, 32), torch.tensor(np.random.default_rng(0).choice(np.flatnonzero(counts), 9))
    scores, at = decoder.train().asked(hidden, labels)
    far = decoder.logits(hidden).masked_fill(torch.tensor(counts == 0), -torch.inf)          # the others can never be the answer
    close(F.cross_entropy(scores, at), F.cross_entropy(far, labels), 1e-5)
    assert scores.shape[1] == (counts > 0).sum() and torch.equal(decoder.vocabulary[at], labels)
    scores, at = decoder.eval().asked(hidden, labels)
    assert torch.equal(scores, decoder.logits(hidden)) and torch.equal(at, labels)
    model.train()(*pairs).extra['word_logits'].sum().backward()
    assert decoder.words.weight.grad is not None


def test_without_alignment_the_embeddings_are_by_products(pairs, monkeypatch):
    "One pass of the image encoder over the masked film, and no mask in the text, whatever align_on says."
    for align_on in ('masked', 'full'):
        model = build(image_encoder='resnet18', local='none', global_weight=0., align_on=align_on).train()
        passes, encode = [], model._encode
        monkeypatch.setattr(model, '_encode', lambda *a: passes.append(len(a)) or encode(*a))
        monkeypatch.setattr(model, '_embed_text', lambda texts, tokens, ids, words: (passes.append(torch.equal(ids, tokens['input_ids'])), (torch.zeros(4, 128), {}))[1])
        model(*pairs)
        assert passes == [3, True]


@pytest.mark.parametrize('name', BACKBONES)
def test_rebuild_says_what_was_hidden(name, pairs):
    model = build(image_encoder=name).train()
    r, again, other = model.rebuild(*pairs), model.rebuild(*pairs), model.rebuild(*pairs, image_ratio=.5, word_ratio=.2, seed=1)
    assert model.training and torch.equal(r.picture, again.picture) and not torch.equal(r.hidden_patches, other.hidden_patches)
    assert (other.hidden_patches.sum(1) == 8).all() and r.hidden_words.sum() > other.hidden_words.sum()
    shown = ~F.interpolate(r.hidden_patches.view(4, 1, 4, 4).float(), scale_factor=16).bool()
    assert torch.equal(r.picture[shown], pairs[0][shown]) and torch.equal(r.masked[shown], pairs[0][shown]) and not torch.equal(r.picture, pairs[0])
    assert torch.equal(r.predicted[~r.hidden_words], r.ids[~r.hidden_words]) and torch.equal(r.predicted[r.hidden_words], r.word_logits.argmax(1))
    assert r.rows.shape == (*r.ids.shape, 4, 4) == r.row_weights.shape and r.patch_rows.shape == (4, 4 if name == 'test_vit' else 16, 4, 4)
    close(r.row_weights.sum(-1), torch.ones_like(r.row_weights[..., 0]), 1e-5)
    without = build(pixel_weight=0., fusion='add').rebuild(*pairs)
    assert without.picture is None and without.rows is None and without.predicted is not None


@pytest.mark.parametrize('name', BACKBONES)
def test_both_losses_fall_on_eight_phantoms(name):
    size = 64 if name == 'test_vit' else 32
    made = [phantom(seed=seed, size=64) for seed in range(8)]
    films, texts = F.adaptive_avg_pool2d(torch.stack([torch.from_numpy(p.image) for p in made])[:, None]/255, size), [p.text for p in made]
    model = build(image_encoder=name, norm_pix=False, image_mask_ratio=.5, local='none', frozen_layers='all', align_on='full', report_decoder=[64, 2, 4], crop_size=size, mask_patch=8).train()
    optimizer, curve = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(40):
        out = model(films, texts)
        parts = losses_of(model.profile, out, None, texts, dense=False)
        optimizer.zero_grad(); parts['loss'].backward(); optimizer.step()
        curve.append((float(parts['pixel'].detach()), float(parts['word'].detach())))
    first, last = np.mean(curve[:3], 0), np.mean(curve[-5:], 0)
    assert last[0] < .4*first[0] and last[1] < .85*first[1], (first, last)


# ---------------------------------------------------------------- a ViT is an encoder as any other

def test_vit_equals_plain_timm_at_its_size_and_others():
    torch.manual_seed(0)
    encoder = ImageEncoder('test_vit', depth=5).eval()
    stock = timm.create_model('test_vit', num_classes=0).eval()
    stock.load_state_dict(encoder.timm_state_dict(), strict=True)                  # exactly the tensors of stock timm
    wide = timm.create_model('test_vit', num_classes=0, dynamic_img_size=True).eval()
    wide.load_state_dict(stock.state_dict())
    with torch.no_grad():
        for net, size in ((stock, (160, 160)), (wide, (64, 96))):
            x = torch.rand(2, 3, *size)
            maps, want, parts = encoder(x), net.forward_features(x)[:, 1:], net.get_intermediate_layers(x, n=[1, 3], reshape=True, norm=True)
            close(maps[3].flatten(2).transpose(1, 2), want); close(encoder.tokens(x), want)
            close(maps[1], F.interpolate(parts[0], scale_factor=4, mode='bilinear')); close(maps[2], F.interpolate(parts[1], scale_factor=2, mode='bilinear'))
            if size == (64, 96): close(maps[4], F.avg_pool2d(maps[3], 2))
            assert [tuple(m.shape[1:]) for m in maps] == [(c, -(-size[0]//s), -(-size[1]//s)) for c, s in zip((0, 64, 64, 64, 64), (2, 4, 8, 16, 32))]


def test_shown_patches_against_an_attention_mask():
    "Dropping patches equals keeping them and forbidding everybody to look at them."
    torch.manual_seed(0)
    encoder, x = ImageEncoder('test_vit', in_chans=1, depth=4).eval(), torch.rand(2, 1, 64, 64)
    hidden, keep = hide_patches(2, 16, .5)
    allowed = torch.cat([torch.ones(2, 1, dtype=torch.bool), ~hidden], 1)[:, None, None, :].expand(-1, 1, 17, -1)
    with torch.no_grad():
        want = encoder.net.forward_features(encoder.prepare(x), attn_mask=torch.zeros(2, 1, 17, 17).masked_fill(~allowed, -1e9))[:, 1:]
        close(encoder.tokens(x, keep), want.gather(1, keep[..., None].expand(-1, -1, 64)), 1e-5)


def test_vit_weights_from_mae_files(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model('test_vit').state_dict()
    mae = {k: v for k, v in whole.items() if not k.startswith('head')} | {'mask_token': torch.zeros(1, 1, 32), 'decoder_embed.weight': torch.zeros(32, 64)}
    torch.save(dict(model=mae), tmp_path/'mae.pth')
    encoder = ImageEncoder('test_vit', pretrained=tmp_path/'mae.pth', in_chans=1, depth=4)
    assert encoder.weights == 'file: mae.pth' and torch.equal(encoder.net.blocks[3].mlp.fc1.weight, whole['blocks.3.mlp.fc1.weight'])
    close(encoder.net.patch_embed.proj.weight, whole['patch_embed.proj.weight'].sum(1, keepdim=True), 1e-6)
    other = timm.create_model('test_vit', img_size=64).state_dict()                # a grid of 4x4 instead of 10x10
    save_file(other, tmp_path/'small.safetensors')
    resampled = ImageEncoder('test_vit', pretrained=tmp_path/'small.safetensors', depth=4)
    from timm.layers import resample_abs_pos_embed
    close(resampled.net.pos_embed, resample_abs_pos_embed(other['pos_embed'], [10, 10]), 1e-6)
    with pytest.raises(G2DError, match='does not fit the timm network test_vit: missing blocks.5'):
        torch.save({k: v for k, v in mae.items() if 'blocks.5' not in k}, tmp_path/'cut.pth'); ImageEncoder('test_vit', pretrained=tmp_path/'cut.pth', depth=4)
    with pytest.raises(G2DError, match='knows tf_efficientnet_lite0'): ImageEncoder('test_vit', pretrained='offline', depth=4)


def test_vit_refusals():
    with pytest.raises(G2DError, match='encoder_depth is 2'): ImageEncoder('test_vit', depth=2)
    with pytest.raises(G2DError, match='14x14'): ImageEncoder('vit_small_patch14_dinov2', depth=4)
    with pytest.raises(G2DError, match='do not divide into patches of 16'): ImageEncoder('test_vit', depth=4)(torch.rand(1, 3, 70, 64))
    with pytest.raises(G2DError, match='has no patches'): ImageEncoder('resnet18').tokens(torch.rand(1, 3, 64, 64))
    g2d = G2D(tiny(method='g2d', local='none'))
    with pytest.raises(G2DError, match='no ViT encoder'): smp_arguments(g2d.image_encoder, g2d.decoder)


def test_a_random_vit_starts_with_sin_cos_positions():
    net = build().image_encoder.net
    assert torch.equal(net.pos_embed[0, 1:], grid_positions(64, (10, 10))) and not net.pos_embed[0, 0].any() and net.pos_embed.requires_grad


def test_g2d_on_a_vit_trains_all_of_it(pairs):
    model = G2D(tiny(method='g2d', local='none')).train()
    out = model(*pairs)
    assert out.mask_logits.shape == (4, 1, 64, 64) and out.attention.shape == (4, 4, 4, 4)
    (out.mask_logits.square().mean() + out.image_emb.square().mean() + out.text_emb.square().mean()).backward()
    assert [n for n, q in model.named_parameters() if q.requires_grad and q.grad is None] == []


def test_checkpoint_there_and_back_and_export(tmp_path, pairs):
    model = build().eval()
    Checkpoint.of(model).save(tmp_path/'c.safetensors')
    loaded = Checkpoint.load(tmp_path/'c.safetensors')
    again = build().eval()
    loaded.load_into(again)
    rebuilt = loaded.model()
    with torch.no_grad():
        for other in (again, rebuilt):
            a, b = model(*pairs), other(*pairs)
            assert type(other) is MPMA and torch.equal(a.image_emb, b.image_emb) and all(torch.equal(a.extra[k], b.extra[k]) for k in a.extra)
    loaded.export_timm(tmp_path/'vit.safetensors')
    stock = timm.create_model('test_vit', num_classes=0, in_chans=1, dynamic_img_size=True).eval()
    stock.load_state_dict(load_file(tmp_path/'vit.safetensors'), strict=True)
    with safe_open(tmp_path/'vit.safetensors', 'pt') as file: assert any('timm.create_model("test_vit", num_classes=0' in v for v in file.metadata().values())
    with torch.no_grad(): close(stock.forward_features(model.image_encoder.prepare(pairs[0]))[:, 1:].transpose(1, 2).reshape(4, 64, 4, 4), model.image_encoder(pairs[0])[-1])


def test_the_training_loop_trains_both_decoders_and_resumes(store, tmp_path):
    "Four steps in one go equal two, a kill and two more; the pixel decoder moves although dense_target is none, and films are twice the crop with super_resolution=2."
    from g2d.pretrain import pretrain
    p = tiny(batch_size=8, epochs=1, crop_size=32, super_resolution=2, global_only_steps=2)
    go = lambda out, **more: pretrain(store, p, tmp_path/out, device='cpu', workers=0, progress=False, val_images=4, **more)
    torch.manual_seed(p.seed)
    whole, before = go('a', max_steps=4), MPMA(p).state_dict()
    moved = {k.split('.')[0] for k, v in whole.weights.items() if v.is_floating_point() and 'running' not in k and not torch.equal(v, before[k])}
    assert {'pixel_decoder', 'report_decoder', 'image_encoder', 'pool', 'word_projector'} <= moved
    class Stop(Exception): pass
    from g2d.pretrain import Pretrainer
    update = Pretrainer.update
    def killed(self):
        found = update(self)
        if self.done_steps == 2:
            self.save(dict(self.loader.state_dict())); raise Stop
        return found
    Pretrainer.update = killed
    try:
        with pytest.raises(Stop): go('b', max_steps=4)
    finally: Pretrainer.update = update
    again = go('b', max_steps=4)
    assert all(torch.equal(whole.weights[k], again.weights[k]) for k in whole.weights)


def test_the_tasks_run_on_an_mpma_checkpoint_with_a_vit(store):
    "Segmentation with a U-Net, linear probe, detection and zero-shot, two steps each: nothing in them knows about transformers."
    from g2d.tasks import classification, detection, segmentation, zero_shot
    from g2d.tasks.protocols import protocol
    start = Checkpoint.of(build())
    found = segmentation.finetune(store, start, 'demo', .5, max_steps=2, limit=8)
    assert 'g2d pre-training' in found.about['weights'] and 0 <= found.metrics['dice_published'] <= 1
    probe = classification.finetune(store, start, protocol('linear', 'demo', batch_size=8), steps=2, draws=0)
    assert probe.about['encoder_unchanged'] and probe.net.head.linear.in_features == 64
    boxes = detection.finetune(store, start, 'demo', max_steps=2, draws=0)
    assert 0 <= boxes.metrics['map'] <= 1
    assert 0 <= zero_shot.evaluate(store, start, 'demo').metrics['auroc_macro'] <= 1
    with pytest.raises(G2DError, match='no mask decoder'): segmentation.finetune(store, start, 'demo', parts=('encoder', 'decoder'), max_steps=1)
