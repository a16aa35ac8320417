"Pre-training: kill -9 and resume to the same weights, two processes, and everything that must be refused."
import json, os, signal, subprocess, sys, time
import numpy as np, pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import make_phantom_store
from g2d.pretrain import learning_rate, pretrain
from g2d.profiles import profile
from g2d.settings import G2DError

TINY = dict(image_size=64, crop_size=64, image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', batch_size=8, epochs=3, global_only_steps=4, encoder_depth=3, decoder_channels=(32, 16, 8)) # a checkpoint of 9 MB, written after every step

# A run in a process of its own: saves after every step, and sleeps a little so that it can be killed between any two
SCRIPT = '''
import json, sys, time, torch
torch.set_num_threads(1)
from g2d.pretrain import Pretrainer, pretrain
from g2d.profiles import profile
store, out, overrides, pause = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4])
plain = Pretrainer._after_step
def slow(self, *a): plain(self, *a); time.sleep(pause)
Pretrainer._after_step = slow
pretrain(store, profile("demo", **overrides), out, device="cpu", progress=False, checkpoint_seconds=0, val_images=8)
'''


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return make_phantom_store(tmp_path_factory.mktemp('pretrain')/'store', 60, size=64, seed=2, split=dict(train=.8, val=.2))


def start(store, out, pause=0., **overrides):
    environment = os.environ | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', SCRIPT, str(store.path), str(out), json.dumps(TINY | overrides), str(pause)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def steps_in(out):
    "Rows of the log, without the header."
    try: return max(len((out/'log.csv').read_text().splitlines()) - 1, 0)
    except FileNotFoundError: return 0


def finish(process):
    text = process.communicate(timeout=400)[0].decode()
    assert process.returncode == 0, text


def test_killed_three_times_gives_the_same_weights_bit_for_bit(store, tmp_path):
    finish(start(store, tmp_path/'whole'))
    rng, killed, total = np.random.default_rng(int(time.time())), [], 18
    for moment in sorted(rng.choice(np.arange(1, total), 3, replace=False)):     # three random steps, in order
        process = start(store, tmp_path/'killed', pause=.05)
        while process.poll() is None and steps_in(tmp_path/'killed') < moment: time.sleep(.01)
        time.sleep(rng.random()*.1)                                               # anywhere inside the step, the save included
        assert process.poll() is None, process.communicate()[0].decode()
        process.send_signal(signal.SIGKILL); process.wait()
        killed.append(steps_in(tmp_path/'killed'))
    finish(start(store, tmp_path/'killed'))
    whole, again = (load_file(tmp_path/name/'checkpoint.safetensors') for name in ('whole', 'killed'))
    assert whole.keys() == again.keys()
    different = [k for k in whole if not torch.equal(whole[k], again[k])]
    assert not different, f'killed at steps {killed}: {len(different)} tensors differ, first {different[:3]}'
    assert any(k.startswith('optimizer/') for k in whole) and any(k.startswith('random/') for k in whole)
    # the logs read as if nothing had happened (times aside)
    for name in ('log.csv', 'validation.csv'):
        a, b = ([[v for k, v in row.items() if 'images_per_s' not in k] for row in read(tmp_path/n/name)] for n in ('whole', 'killed'))
        assert a == b, name


def read(path):
    import csv
    with open(path, newline='') as file: return list(csv.DictReader(file))


def test_resume_continues_in_the_middle_of_an_epoch(store, tmp_path):
    p = profile('demo', **TINY)
    whole = pretrain(store, p, tmp_path/'whole', device='cpu', progress=False)
    from g2d.pretrain import Pretrainer
    half = Pretrainer(store, p, tmp_path/'half', device='cpu', progress=False, checkpoint_seconds=0)
    (tmp_path/'half').mkdir()
    plain = half._after_step
    def stop(row, *rest):
        plain(row, *rest)
        if row['step'] == 9: raise KeyboardInterrupt
    half._after_step = stop
    with pytest.raises(KeyboardInterrupt): half.run()
    assert Checkpoint.load(tmp_path/'half').about['position']['step'] == 3            # 6 steps an epoch
    torch.manual_seed(99); np.random.seed(99)                                          # another state of the world
    again = pretrain(store, p, tmp_path/'half', device='cpu', progress=False)
    assert all(torch.equal(whole.weights[k], again.weights[k]) for k in whole.weights)


def test_losses_fall_and_files_are_there(store, tmp_path):
    c = pretrain(store, profile('demo', **TINY | dict(epochs=6)), tmp_path, device='cpu', progress=False)
    log = read(tmp_path/'log.csv')
    assert [int(r['step']) for r in log] == list(range(1, 37)) and log[0]['dense'] == '' and float(log[10]['dense']) > 0
    first, last = (np.mean([float(r['global']) for r in part]) for part in (log[:6], log[-6:]))
    assert last < first, (first, last)
    names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*') if p.is_file()}
    assert {'checkpoint.safetensors', 'log.csv', 'validation.csv', 'losses.png', 'profile.json', 'masks/epoch_000.png', 'masks/epoch_006.png'} <= names
    row = read(tmp_path/'validation.csv')[-1]
    assert {'val_global', 'val_dense', 'image_to_text_R@1', 'text_to_image_R@10', 'mask_agreement', 'pointing_attention', 'iou_pseudo'} <= set(row)
    assert c.about['start_weights']['image'].startswith('random')


@pytest.mark.parametrize('name', ['as_paper', 'as_released', 'recommended'])
def test_every_profile_trains(store, tmp_path, name):
    small = dict(image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, image_size=64, crop_size=64, batch_size=8, epochs=1, precision='fp32',
                 decoder_channels=(32, 16, 16, 8, 8)[name == 'recommended':], global_only_steps=2, max_text_tokens=32, kernel_size=5)
    c = pretrain(store, profile(name, **small), tmp_path, device='cpu', progress=False, max_steps=4, val_images=8)
    assert c.about['step'] == 4 and all(torch.isfinite(v).all() for v in c.weights.values() if v.is_floating_point())


def test_bf16_and_accumulation(store, tmp_path):
    c = pretrain(store, profile('demo', **TINY | dict(precision='bf16', accumulate=2, epochs=1)), tmp_path, device='cpu', progress=False)
    assert c.about['step'] == 3


def test_left_over_batches_of_accumulation_do_not_reach_the_next_epoch(store, tmp_path):
    "Six batches an epoch in steps of four: two are left over. A run resumed between epochs has no gradients of them, so no run may."
    from g2d.pretrain import Pretrainer
    p = profile('demo', **TINY | dict(accumulate=4, global_only_steps=0))
    whole = pretrain(store, p, tmp_path/'whole', device='cpu', progress=False, val_images=8)
    half = Pretrainer(store, p, tmp_path/'half', device='cpu', progress=False, val_images=8, checkpoint_seconds=1e9)
    (tmp_path/'half').mkdir()
    def stop(row, *rest):
        if row['step'] == 2: raise KeyboardInterrupt
    half._after_step = stop
    with pytest.raises(KeyboardInterrupt): half.run()
    assert Checkpoint.load(tmp_path/'half').about['step'] == 1
    again = pretrain(store, p, tmp_path/'half', device='cpu', progress=False, val_images=8)
    assert again.about['step'] == whole.about['step'] == 3
    assert all(torch.equal(whole.weights[k], again.weights[k]) for k in whole.weights)


def test_what_does_not_fit_is_refused(store, tmp_path):
    p = profile('demo', **TINY | dict(epochs=1))
    pretrain(store, p, tmp_path/'run', device='cpu', progress=False, max_steps=1)
    with pytest.raises(G2DError, match='another lr'): pretrain(store, p.replace(lr=.5), tmp_path/'run', device='cpu', progress=False)
    other = make_phantom_store(tmp_path/'other', 60, size=64, seed=3, split=dict(train=.8, val=.2))
    with pytest.raises(G2DError, match='another store'): pretrain(other, p, tmp_path/'run', device='cpu', progress=False)
    path = tmp_path/'run'/'checkpoint.safetensors'
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(G2DError, match='damaged or half-written'): pretrain(store, p, tmp_path/'run', device='cpu', progress=False)


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(store, tmp_path):
    from g2d.pretrain import Pretrainer
    run = Pretrainer(store, profile('demo', **TINY), tmp_path, device='cpu', progress=False)
    plain, calls = run.step, []
    def poisoned(batch):
        calls.append(1)
        return {k: v*float('nan') if len(calls) == 3 else v for k, v in plain(batch).items()}
    run.step = poisoned
    with pytest.raises(G2DError, match='The loss became nan at step 3'): run.run()
    assert all(torch.isfinite(v).all() for v in Checkpoint.load(tmp_path).weights.values() if v.is_floating_point())


def test_films_of_the_global_steps_may_be_smaller(store, tmp_path):
    "With global_only_size the network sees smaller films in the steps of the global loss alone, and the crop afterwards; a side that is not smaller is refused."
    from unittest.mock import patch
    from g2d.models.g2d import G2D
    from g2d.pretrain import smaller
    seen, whole = [], G2D.forward
    def forward(self, images, texts, decode=True):
        if self.training: seen.append(tuple(images.shape[-2:]))
        return whole(self, images, texts, decode)
    with patch.object(G2D, 'forward', forward):
        pretrain(store, profile('demo', **TINY | dict(epochs=1, global_only_size=48)), tmp_path/'run', device='cpu', progress=False, val_images=8)
    assert seen == [(48, 48)]*4 + [(64, 64)]*2
    from PIL import Image
    images = torch.rand(2, 1, 64, 64)
    for film, small in zip(images[:, 0].numpy(), smaller(images, 48)[:, 0].numpy()): assert np.abs(np.asarray(Image.fromarray(film).resize((48, 48), Image.BILINEAR)) - small).max() < 1e-5
    for size in (96, 16):
        with pytest.raises(G2DError, match='global_only_size is'): pretrain(store, profile('demo', **TINY | dict(global_only_size=size)), tmp_path/f'{size}', device='cpu', progress=False)


def test_learning_rate_equals_torch_schedulers():
    p = profile('as_released')
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=p.lr)
    torch_schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=200, eta_min=p.min_lr)
    for step in range(450):
        assert learning_rate(step, 1000, p) == pytest.approx(optimizer.param_groups[0]['lr'], rel=1e-9)
        optimizer.step(); torch_schedule.step()
    p = profile('as_paper', warmup=0.)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=p.lr)
    torch_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=300)
    for step in range(300):
        assert learning_rate(step, 300, p) == pytest.approx(optimizer.param_groups[0]['lr'], rel=1e-6, abs=1e-12)
        optimizer.step(); torch_schedule.step()
    with pytest.raises(G2DError, match='Unknown schedule'): learning_rate(0, 10, profile('demo', schedule='linear'))


def test_two_processes_under_torchrun(store, tmp_path):
    "Two gloo processes with gathered embeddings run to the end, keep one set of weights, and resume."
    script = tmp_path/'run.py'
    script.write_text(SCRIPT)
    def launch(epochs):
        overrides = json.dumps(TINY | dict(gather=True, epochs=epochs))
        return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1', f'--master_port={20000 + os.getpid() % 20000}',
                               str(script), str(store.path), str(tmp_path/'out'), overrides, '0'], capture_output=True, text=True, timeout=400, env=os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'))
    answer = launch(1)
    assert answer.returncode == 0, answer.stderr[-3000:]
    c = Checkpoint.load(tmp_path/'out')
    assert c.about['processes'] == 2 and c.about['step'] == 3                          # 48 pairs, 2 x 8 a step
    answer = launch(2)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert Checkpoint.load(tmp_path/'out').about['step'] == 6


@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_trains_on_cuda(store, tmp_path, precision):
    if not torch.cuda.is_available(): pytest.skip('no CUDA device')
    c = pretrain(store, profile('demo', **TINY | dict(precision=precision)), tmp_path, device='cuda', progress=False)
    assert c.about['step'] == 18
    again = pretrain(store, profile('demo', **TINY | dict(precision=precision, epochs=4)), tmp_path, device='cuda', progress=False)
    assert again.about['step'] == 24


@pytest.mark.parametrize('target', ['none', 'shuffled', 'reconstruction', 'pseudo'])
def test_what_the_decoder_learns(target, tmp_path):
    "The ablations of the paper: no decoder, masks of other films, pixels."
    import torch
    from g2d.data.phantom import make_phantom_store
    from g2d.models.g2d import G2D
    from g2d.profiles import profile
    from g2d.validation import dense_target, losses_of, make_pseudo_mask
    from g2d.pretrain import pretrain
    p = profile('demo', image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, epochs=1, batch_size=8,
                global_only_steps=0, encoder_depth=4, decoder_channels=(16, 8, 8, 8), dense_target=target)
    images, texts = torch.rand(5, 1, 64, 64), [f'film {k}' for k in range(5)]
    model, processor = G2D(p), make_pseudo_mask(p)
    out = model(images, texts)
    wanted, parts = dense_target(p, processor, out, images, 2), None
    parts = losses_of(p, out, wanted, texts, gather=False)
    own = processor(out.attention.detach(), images)
    if target == 'none': assert wanted is None and 'dense' not in parts and torch.equal(parts['loss'], parts['global'])
    if target == 'shuffled': assert all(torch.equal(wanted[k], own[(k - 2) % 5]) for k in range(5))
    if target == 'reconstruction': assert parts['dense'].item() == pytest.approx(((out.mask_logits - images)**2).mean().item(), rel=1e-5)
    if target == 'pseudo': assert torch.equal(wanted, own)
    store = make_phantom_store(tmp_path/'store', 24, size=64, split=dict(train=.7, val=.3))
    torch.manual_seed(p.seed)
    start = {k: v.clone() for k, v in G2D(p).decoder.state_dict().items()}
    end = pretrain(store, p, tmp_path/'run', device='cpu', progress=False)
    moved = any(not torch.equal(v, end.weights[f'decoder.{k}']) for k, v in start.items() if 'running' not in k and 'num_batches' not in k)
    assert moved == (target != 'none')


def test_processes_of_one_call_share_the_batch(store, tmp_path):
    "Two processes each take their part of a batch (`test_ranks_share_the_epoch`); losses are close to those of one process, up to what BatchNorm of the projectors sees."
    p = profile('demo', **TINY | dict(image_encoder='convnext_atto', epochs=1, gather=True, dense_target='none', lr=1e-4))
    one = pretrain(store, p, tmp_path/'one', device='cpu', progress=False, max_steps=4)
    two = pretrain(store, p, tmp_path/'two', device='cpu', progress=False, max_steps=4, processes=2)
    assert two.about['processes'] == 2 and two.about['step'] == one.about['step'] == 4 and two.profile.batch_size*2 == p.batch_size
    a, b = (pd.read_csv(tmp_path/name/'log.csv') for name in ('one', 'two'))
    assert np.abs(a['loss'][:1] - b['loss'][:1]).max() < .35 and len(a) == len(b) == 4
    again = pretrain(store, p, tmp_path/'two', device='cpu', progress=False, max_steps=4, processes=2)
    assert again.about['step'] == 4
    with pytest.raises(G2DError, match='was trained with 2 processes'): pretrain(store, p.replace(batch_size=p.batch_size//2), tmp_path/'two', device='cpu', progress=False)


def test_mistakes_of_several_processes_are_one_sentence(store, tmp_path):
    p = profile('demo', **TINY | dict(epochs=1))
    with pytest.raises(G2DError, match='3 processes cannot share batches of 8'): pretrain(store, p, tmp_path/'a', device='cpu', processes=3)
    with pytest.raises(G2DError, match='processes=0 is not positive'): pretrain(store, p, tmp_path/'a', device='cpu', processes=0)
    with pytest.raises(G2DError, match='this is a part of it'): pretrain(store.select(split='train'), p, tmp_path/'a', device='cpu', processes=2)
    with pytest.raises(G2DError, match='is unknown|cannot|Unknown|not exist|no '): pretrain(store, p.replace(image_encoder='no_such_network'), tmp_path/'b', device='cpu', processes=2, progress=False)


def test_processes_end_with_their_parent(store, tmp_path):
    "After kill -9 of the parent nobody goes on writing, and the same call finishes the run."
    script = SCRIPT.rsplit('\n', 2)[0] + '\npretrain(store, profile("demo", **overrides), out, device="cpu", progress=False, checkpoint_seconds=0, val_images=8, processes=2)\n'
    overrides = TINY | dict(epochs=40)
    parent = subprocess.Popen([sys.executable, '-c', script, str(store.path), str(tmp_path/'run'), json.dumps(overrides), '0'], env=os.environ | dict(OMP_NUM_THREADS='1'))
    while parent.poll() is None and steps_in(tmp_path/'run') < 3: time.sleep(.05)
    assert parent.poll() is None
    parent.send_signal(signal.SIGKILL); parent.wait()
    time.sleep(4)
    before = steps_in(tmp_path/'run')
    time.sleep(3)
    assert before >= 3 and steps_in(tmp_path/'run') == before
    steps = Checkpoint.load(tmp_path/'run').about['step']
    c = pretrain(store, profile('demo', **TINY | dict(epochs=40)), tmp_path/'run', device='cpu', progress=False, processes=2, max_steps=steps + 2, val_images=8)
    assert c.about['step'] == steps + 2


def test_processes_train_the_decoder_after_epochs_without_it(store, tmp_path):
    "Some steps leave the decoder out; with frozen stages, chunks of the gradient cache and without. Afterwards this process can train alone again."
    from g2d.models.g2d import G2D
    p = profile('demo', **TINY | dict(epochs=1, global_only_steps=2, frozen_stages=1))
    import cv2     # writes LD_LIBRARY_PATH when it is imported
    threads, before = torch.get_num_threads(), dict(os.environ)
    ends = [pretrain(store, q, tmp_path/str(k), device='cpu', progress=False, max_steps=4, processes=2) for k, q in enumerate((p, p.replace(grad_cache_chunk=2)))]
    assert torch.get_num_threads() == threads and dict(os.environ) == before and not torch.distributed.is_initialized()
    for k, end in enumerate(ends):
        log = pd.read_csv(tmp_path/str(k)/'log.csv')
        assert end.about['step'] == 4 and log['dense'].isna().tolist() == [True, True, False, False] and np.isfinite(log['loss']).all()
    alone = pretrain(store, p, tmp_path/'alone', device='cpu', progress=False, max_steps=3)
    assert alone.about['processes'] == 1
    torch.manual_seed(p.seed)
    start = {f'decoder.{k}': v for k, v in G2D(p.replace(batch_size=4)).decoder.named_parameters()}
    assert any(not torch.equal(v.detach(), ends[0].weights[k]) for k, v in start.items())


def test_calls_in_processes_end_in_one_sentence(tmp_path, monkeypatch):
    from g2d.threads import in_processes
    (tmp_path/'odd_calls.py').write_text('''
import os, pathlib, signal, time
from g2d.settings import G2DError
def call(path, how):
    pathlib.Path(path).write_text(f'{os.getpid()} {os.environ.get("WHO")}')
    if how == 'mistake': raise G2DError(f'No such thing as {path[-1]}.')
    if how == 'kill': os.kill(os.getpid(), signal.SIGKILL)
    if how == 'crash':          # as a process does whose partner has ended
        while not pathlib.Path(path[:-1] + '1').exists(): time.sleep(.05)
        raise RuntimeError('closed by peer')
    if how == 'wait': time.sleep(300)
''')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv('WHO', raising=False)
    def run(*hows, **more):
        for old in tmp_path.glob('out*'): old.unlink()
        in_processes('odd_calls:call', [dict(path=str(tmp_path/f'out{k}'), how=how) for k, how in enumerate(hows)], len(hows), environment=lambda k: dict(WHO=k), **more)
        return [(tmp_path/f'out{k}').read_text().split() for k in range(len(hows))]
    apart, here = run('', ''), run('', '', here=True)
    assert [who for _, who in apart + here] == ['0', '1']*2 and here[0][0] == str(os.getpid()) and len({pid for pid, _ in apart + here}) == 4 and 'WHO' not in os.environ
    for hows, more, said in ((('', 'mistake'), {}, 'No such thing as 1'), (('', 'mistake'), dict(here=True), 'No such thing as 1'), (('mistake', 'wait'), dict(here=True), 'No such thing as 0'),
                             (('', 'kill'), dict(here=True), 'ended with code -9'), (('wait', 'mistake'), {}, 'No such thing as 1')):
        started = time.time()
        with pytest.raises(G2DError, match=said): run(*hows, **more)
        assert time.time() - started < 200, 'the others were not ended'
    with pytest.raises(RuntimeError, match='closed by peer'): run('crash', 'wait', here=True)
    with pytest.raises(G2DError, match='No such thing as 1'): run('crash', 'mistake', here=True)     # the one failed because the other did
    with pytest.raises(G2DError, match='2 jobs do not run'): in_processes('odd_calls:call', [{}, {}], 1, here=True)
