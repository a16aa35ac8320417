"Checkpoints: exact round trip, stock timm and smp, and damaged or foreign files."
import json, random
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from g2d.checkpoint import Checkpoint, random_state, set_random_state
from g2d.models.g2d import G2D
from g2d.profiles import profile
from g2d.settings import G2DError

SMALL = dict(image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64)


@pytest.fixture(scope='module')
def trained():
    "A model after two optimiser steps, so that no tensor is at its start."
    torch.manual_seed(0)
    net = G2D(profile('demo', **SMALL))
    optimizer = torch.optim.AdamW([x for x in net.parameters() if x.requires_grad], lr=1e-3)
    for _ in range(2):
        out = net(torch.rand(4, 1, 64, 64), ['a b', 'c', 'd e f', 'g'])
        (out.image_emb.mean() + out.mask_logits.square().mean() + (out.text_emb*out.image_emb).sum()).backward()
        optimizer.step(); optimizer.zero_grad()
    return net, optimizer


def test_round_trip_is_exact(trained, tmp_path):
    net, optimizer = trained
    Checkpoint.of(net, optimizer, step=2).save(tmp_path/'c.safetensors')
    c = Checkpoint.load(tmp_path/'c.safetensors')
    state = net.state_dict()
    assert c.weights.keys() == state.keys() and all(torch.equal(c.weights[k], state[k]) and c.weights[k].dtype == state[k].dtype for k in state)
    assert c.profile == net.profile and c.about['step'] == 2
    other = torch.optim.AdamW([x for x in G2D(net.profile).parameters() if x.requires_grad], lr=5.)
    from g2d.checkpoint import unpack_optimizer
    unpack_optimizer(other, c.training['optimizer'], c.training['groups'])
    a, b = optimizer.state_dict(), other.state_dict()
    assert a['param_groups'] == b['param_groups'] or [g | dict(betas=tuple(g['betas'])) for g in a['param_groups']] == [g | dict(betas=tuple(g['betas'])) for g in b['param_groups']]
    assert all(torch.equal(torch.as_tensor(a['state'][i][k]), torch.as_tensor(b['state'][i][k])) for i in a['state'] for k in a['state'][i])


def test_random_numbers_continue():
    random.gauss(0, 1); np.random.randn()             # leaves a second value in both caches
    state = {k: v.clone() for k, v in random_state().items()}
    draw = lambda: (random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(3).tolist())
    first = draw()
    draw()
    set_random_state(state)
    assert draw() == first


WHOLE = dict(encoder_depth=5, decoder_channels=(64, 32, 16, 16, 8))


@pytest.mark.parametrize('name, stride, chans, depth', [('resnet18', 16, 1, 5), ('resnet18', 32, 3, 5), ('resnet50', 32, 1, 5), ('tf_efficientnet_lite0', 32, 1, 4), ('resnet18', 32, 1, 4)])
def test_exports_load_in_stock_timm_and_smp(tmp_path, name, stride, chans, depth):
    import timm, segmentation_models_pytorch as smp
    torch.manual_seed(1)
    net = G2D(profile('demo', **SMALL | (WHOLE if depth == 5 else {}) | dict(image_encoder=name, output_stride=stride, in_chans=chans)))
    net.train(); net(torch.rand(4, 1, 64, 64), ['a', 'b', 'c', 'd'])                  # moves the BatchNorm statistics
    net.eval()
    c = Checkpoint.of(net)
    images = torch.rand(2, chans, 64, 64)
    def stock(path, **modules):
        "The sentence in the file's header builds the model, and the weights fit it strictly."
        from safetensors import safe_open
        with safe_open(path, 'pt') as file: model = eval(file.metadata()['load_with'], modules).eval()
        model.load_state_dict(load_file(path))
        return model
    encoder, unet = stock(c.export_timm(tmp_path/'timm.safetensors'), timm=timm), stock(c.export_unet(tmp_path/'unet.safetensors'), segmentation_models_pytorch=smp)
    prepared = net.image_encoder.prepare(images)
    with torch.no_grad():
        last = encoder.forward_features(prepared) if depth == 5 else encoder(prepared)[-1]
        torch.testing.assert_close(last, net.image_encoder(images)[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(unet(prepared), net(images, ['a', 'b']).mask_logits, atol=1e-5, rtol=1e-5)
        if depth == 4:      # and the file is a start of ours again
            again = G2D(net.profile.replace(pretrained=str(tmp_path/'timm.safetensors'))).eval()
            torch.testing.assert_close(again.image_encoder(images)[-1], net.image_encoder(images)[-1], atol=1e-5, rtol=1e-5)


def test_a_checkpoint_that_holds_the_last_stages_still_loads(tmp_path):
    "As they were written before EfficientNets were built without them."
    import timm
    from dataclasses import replace
    from g2d.tasks.training import find_start, make_encoder
    net = G2D(profile('demo', **SMALL | dict(image_encoder='tf_efficientnet_lite0'))).eval()
    whole = timm.create_model('tf_efficientnet_lite0', features_only=True, out_indices=(0, 1, 2, 3), in_chans=1).state_dict()
    c = Checkpoint.of(net)
    old = replace(c, weights={f'image_encoder.net.{k}': v for k, v in whole.items()} | c.weights)
    assert len(old.weights) > len(c.weights)
    again, images = old.model(), torch.rand(2, 1, 64, 64)
    for ours in (again.image_encoder, make_encoder(find_start(old)).eval()): torch.testing.assert_close(ours(images)[-1], net.image_encoder(images)[-1])
    with pytest.raises(G2DError, match='is not in the model'): replace(c, weights=c.weights | {'image_encoder.net.blocks.1.9.x': torch.zeros(1)}).model()


def test_weights_of_smps_own_efficientnet_come_back(tmp_path):
    "smp by itself builds the stages behind the last map, too; they are passed over."
    import segmentation_models_pytorch as smp
    from g2d.models.decoder import from_smp
    net = G2D(profile('demo', **SMALL | dict(image_encoder='tf_efficientnet_lite0'))).eval()
    theirs = smp.Unet('tu-tf_efficientnet_lite0', encoder_weights=None, encoder_depth=4, in_channels=1, classes=1, decoder_channels=net.decoder.widths).eval()
    from_smp(theirs.state_dict(), net.image_encoder, net.decoder)
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(theirs(net.image_encoder.prepare(images)), net(images, ['a', 'b']).mask_logits, atol=1e-5, rtol=1e-5)


def test_a_decoder_at_half_resolution_says_so_in_its_export(tmp_path):
    "smp has no such decoder: the weights fit, and the header says that they compute otherwise there."
    from safetensors import safe_open
    for scale in (1, 2):
        c = Checkpoint.of(G2D(profile('demo', **SMALL | dict(decoder_scale=scale))))
        with safe_open(c.export_unet(tmp_path/f'{scale}.safetensors'), 'pt') as file: assert ('decoder_scale=2' in file.metadata().get('note', '')) == (scale == 2)


def test_another_architecture_is_refused(trained, tmp_path):
    net, _ = trained
    c = Checkpoint.of(net).save(tmp_path/'c.safetensors')
    for change in (dict(image_encoder='resnet34'), dict(embed_dim=64), dict(in_chans=3), dict(decoder_channels=(64, 32, 16, 8))):
        other = G2D(profile('demo', **SMALL | change))
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(G2DError, match='does not fit this model'): c.load_into(other)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items()), 'a refused checkpoint changed the model'


@pytest.mark.parametrize('keep', [0, 5, 8, 200, 100_000, -1])
def test_half_written_file(trained, tmp_path, keep):
    path = tmp_path/'c.safetensors'
    Checkpoint.of(trained[0]).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(G2DError, match='damaged or half-written') as caught: Checkpoint.load(path)
    assert '\n' not in str(caught.value)


def test_foreign_and_absent_files(tmp_path):
    save_file(dict(a=torch.zeros(2)), tmp_path/'other.safetensors')
    with pytest.raises(G2DError, match='no g2d checkpoint'): Checkpoint.load(tmp_path/'other.safetensors')
    with pytest.raises(G2DError, match='There is no checkpoint'): Checkpoint.load(tmp_path/'none.safetensors')
    torch.save(dict(a=1), tmp_path/'pickle.pt')
    with pytest.raises(G2DError, match='damaged or half-written'): Checkpoint.load(tmp_path/'pickle.pt')


def test_full_disk_keeps_the_old_checkpoint(trained, tmp_path):
    "A real limit on the file size in a process of its own: the save fails in one sentence, the old file stays, no litter."
    import subprocess, sys
    path = tmp_path/'c.safetensors'
    Checkpoint.of(trained[0], step=1).save(path)
    old = path.read_bytes()
    script = f'''
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from g2d.checkpoint import Checkpoint
from g2d.settings import G2DError
c = Checkpoint.load({str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try: c.save({str(path)!r})
except G2DError as error: print(error); sys.exit(3)
'''
    answer = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert answer.returncode == 3, answer.stderr[-2000:]
    assert 'disk is full' in answer.stdout and answer.stdout.count('\n') == 1
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ['c.safetensors']
