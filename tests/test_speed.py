"Levers of speed: each gives the result of the plain path; memory, several processes, and small runs of the benchmarks."
import csv, json, os, subprocess, sys, textwrap
import numpy as np
import pytest
import torch
from g2d import bench as B
from g2d.data.loading import Augment, PairLoader, bucketed_order, epoch_order, read_images
from g2d.data.phantom import make_phantom_store
from g2d.models.g2d import G2D
from g2d.models.text_encoder import TextEncoder
from g2d.pretrain import Pretrainer
from g2d.profiles import profile
from g2d.settings import G2DError

TINY = dict(image_encoder='resnet10t', pretrained=False, text_encoder='tiny', frozen_layers=1, freeze_embeddings=True, text_pool='cls', image_size=64, crop_size=64,
            encoder_depth=4, decoder_channels=(32, 16, 16, 8), global_only_steps=0, batch_size=8, epochs=1)
TEXTS = ['No pleural effusion.', 'FINDINGS: There is a small opacity in the right lower zone. The heart is normal in size.', 'Clear lungs.', 'Large left pneumothorax with edema.',
         'The heart is large.', 'Nodule in the left upper zone, no effusion is seen.', 'Normal.', 'Small effusion, right.']


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return make_phantom_store(tmp_path_factory.mktemp('speed')/'store', 40, size=64, seed=2, workers=0, split=dict(train=.8, val=.2))


def gradient(net): return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


# text: kept states of frozen layers

def features(encoder, texts, seed=1):
    torch.manual_seed(seed)
    encoder.zero_grad()
    found = encoder(encoder.tokenize(texts))
    (found.pooled.square().sum() + (found.tokens*found.attention_mask[..., None]).sum()).backward()
    return found.pooled.detach(), (found.tokens*found.attention_mask[..., None]).detach(), gradient(encoder)


@pytest.mark.parametrize('dtype, bound', [('float32', 1e-5), ('float16', 5e-3)])
@pytest.mark.parametrize('on_disk', [False, True])
def test_kept_text_states_give_the_same_features_and_gradients(dtype, bound, on_disk, tmp_path):
    torch.manual_seed(0)
    encoder = TextEncoder('tiny', frozen_layers=1, freeze_embeddings=True).train()       # dropout of the upper layer is on: same seed, same draws
    plain = features(encoder, TEXTS)
    assert encoder.keep_prefixes(TEXTS*2, dtype, folder=tmp_path if on_disk else None) == len(TEXTS)
    assert encoder._prefixes.states.dtype == dtype and isinstance(encoder._prefixes.states, np.memmap) == on_disk
    calls = []
    hook = encoder.model.encoder.layer[0].register_forward_hook(lambda *a: calls.append(1))
    for a, b in zip(plain, features(encoder, TEXTS)): assert (a - b).abs().max() <= bound*max(1, a.abs().max())
    assert not calls                                                                      # the frozen layer does not run
    assert (plain[0] - features(encoder, TEXTS, seed=2)[0]).abs().max() > bound           # the test can tell one dropout from another
    hook.remove()


def test_the_file_of_states_is_found_again_and_changes_with_the_weights(tmp_path):
    torch.manual_seed(0)
    encoder = TextEncoder('tiny', frozen_layers=1, freeze_embeddings=True)
    encoder.keep_prefixes(TEXTS, folder=tmp_path)
    first, = tmp_path.glob('*.npy')
    stamp = first.stat().st_mtime_ns
    with torch.no_grad(): encoder.model.encoder.layer[1].output.dense.weight.add_(1)     # a trained layer: the states below stay
    encoder.keep_prefixes(TEXTS, folder=tmp_path)
    assert [p.stat().st_mtime_ns for p in tmp_path.glob('*.npy')] == [stamp]
    encoder.load_state_dict(TextEncoder('tiny', frozen_layers=1, freeze_embeddings=True).state_dict())
    assert encoder._prefixes is None                                                      # new weights, no old states
    encoder.keep_prefixes(TEXTS, folder=tmp_path)
    assert len(list(tmp_path.glob('*.npy'))) == 2


def test_states_beyond_the_limit_are_computed_now():
    torch.manual_seed(0)
    encoder = TextEncoder('tiny', frozen_layers=1, freeze_embeddings=True).train()
    plain = features(encoder, TEXTS)
    n = encoder.keep_prefixes(TEXTS, 'float32', limit=60*32*4)
    assert 0 < n < len(TEXTS) and encoder._prefixes.states.nbytes <= 60*32*4
    for a, b in zip(plain, features(encoder, TEXTS)): assert (a - b).abs().max() < 1e-5*max(1, a.abs().max())


@pytest.mark.parametrize('options', [dict(frozen_layers=1), dict(frozen_layers=0, freeze_embeddings=True), dict(frozen_layers='all')])
def test_states_that_could_change_are_not_kept(options):
    with pytest.raises(G2DError, match='freeze_embeddings=True'): TextEncoder('tiny', **options).keep_prefixes(TEXTS)


# loader: batches of similar length, reading, position

def test_windows_keep_the_pairs_and_save_padding(store):
    plain, sorted_ = PairLoader(store, 4, seed=3), PairLoader(store, 4, seed=3, window=4)
    seen = [np.concatenate([b.rows for b in loader]) for loader in (plain, sorted_)]
    assert sorted(seen[0]) == sorted(seen[1]) and not np.array_equal(*seen)
    lengths = np.random.default_rng(0).lognormal(4, .6, 1003).astype(int)
    order = epoch_order(1003, 5)
    found = bucketed_order(order, lengths, 8, 20, 5)
    assert sorted(found) == list(range(1003)) and np.array_equal(found[1000:], order[1000:])
    for first in range(0, 1000, 160): assert sorted(found[first:first + 160]) == sorted(order[first:first + 160])   # nobody leaves the window
    padded = lambda o: lengths[o[:1000]].reshape(-1, 8).max(1).sum()
    assert padded(found) < .75*padded(order)
    assert abs(np.diff(lengths[found[:1000]].reshape(-1, 8).mean(1))).mean() > 5      # steps come in random order, not from short to long


def test_windows_are_a_function_of_seed_and_epoch(store):
    a, b = (PairLoader(store, 4, seed=3, window=4, workers=w) for w in (0, 2))
    epochs = [[batch.rows.tolist() for batch in loader] for loader in (a, b, a, b)]
    assert epochs[0] == epochs[1] and epochs[2] == epochs[3] and epochs[0] != epochs[2]
    ranks = [[x.rows.tolist() for x in PairLoader(store, 2, seed=3, rank=r, world_size=2, window=4)] for r in (0, 1)]
    assert [x + y for x, y in zip(*ranks)] == epochs[0]


def test_windows_resume_in_the_middle(store):
    whole = [b.rows.tolist() for b in PairLoader(store, 4, seed=3, window=4)]
    first = PairLoader(store, 4, seed=3, window=4, workers=2)
    iterator = iter(first)
    for _ in range(3): next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    again = PairLoader(store, 4, seed=3, window=4, workers=2)
    again.load_state_dict(state)
    assert [b.rows.tolist() for b in again] == whole[3:]
    with pytest.raises(G2DError, match='window is 4 there and 0 here'): PairLoader(store, 4, seed=3).load_state_dict(state)
    plain = PairLoader(store, 4, seed=3).state_dict()
    assert 'window' not in plain                                                          # states of earlier versions stay good
    with pytest.raises(G2DError, match='window is 0 there and 4 here'): again.load_state_dict(plain)


def test_reading_gives_the_pages_back(tmp_path):
    n = 2000
    images = np.lib.format.open_memmap(tmp_path/'x.npy', 'w+', np.uint8, (n, 128, 128))
    for i in range(0, n, 100): images[i:i + 100] = np.random.default_rng(i).integers(0, 255, (100, 128, 128), dtype=np.uint8)
    images.flush(); del images
    images = np.load(tmp_path/'x.npy', mmap_mode='r')
    rows = np.random.default_rng(0).permutation(n)
    read_images(images, rows[:50])
    before = B.resident()
    for at in range(0, n, 50):
        batch = read_images(images, rows[at:at + 50])
    assert np.array_equal(batch[:, 0].numpy(), images[rows[at:at + 50]])
    assert B.resident() - before < .3*images.nbytes, (B.resident() - before, images.nbytes)


def test_a_loader_for_a_device_hands_out_the_same(store):
    plain, sent = PairLoader(store, 4, seed=1), PairLoader(store, 4, seed=1, device='cpu', workers=1)
    for a, b in zip(plain, sent): assert torch.equal(a.images, b.images) and a.texts == b.texts and sent.step == a.step + 1


# the network: layout, optimiser, precision, compiler, half a decoder, attention

def tiny_net(**changes):
    torch.manual_seed(0)
    return G2D(profile('recommended', **TINY | changes)).train()


def loss_and_gradient(net, images, texts, autocast=False):
    from g2d.losses import global_alignment_loss
    torch.manual_seed(5)
    net.zero_grad()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): out = net(images, texts)
    loss = global_alignment_loss(out.image_emb, out.text_emb) + out.mask_logits.float().sigmoid().mean()
    loss.backward()
    return loss.detach(), gradient(net)


def test_channels_last_is_the_same_network():
    "In double precision, where another order of sums does not show."
    images = torch.rand(8, 1, 64, 64).double()
    a = loss_and_gradient(tiny_net().double(), images, TEXTS)
    b = loss_and_gradient(tiny_net().double().to(memory_format=torch.channels_last), images, TEXTS)
    assert abs(a[0] - b[0]) < 1e-10 and (a[1] - b[1]).norm() < 1e-10*a[1].norm()


def test_bfloat16_is_close():
    "Mean over six batches of 32 pairs; single batches of a random network differ by 0.3 to 2 %, because the temperature of 0.07 enlarges every error."
    texts, errors = [f'{text} {letter*3}' for letter in 'abcd' for text in TEXTS], []
    for seed in range(6):
        torch.manual_seed(seed)
        images = torch.rand(32, 1, 64, 64)
        (a, _), (b, _) = loss_and_gradient(tiny_net(), images, texts), loss_and_gradient(tiny_net(), images, texts, autocast=True)
        errors.append(float(abs(a - b)/abs(a)))
    assert 0 < sum(errors)/6 < 2e-2


def test_fused_optimiser_makes_the_same_steps():
    nets = [tiny_net(), tiny_net()]
    optimizers = [torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3, **o) for net, o in zip(nets, (dict(foreach=False), dict(fused=True)))]
    images = torch.rand(8, 1, 64, 64)
    _, g = loss_and_gradient(nets[0], images, TEXTS)
    for p, q in zip(nets[0].parameters(), nets[1].parameters()): q.grad = None if p.grad is None else p.grad.clone()
    for _ in range(3):
        for optimizer in optimizers: optimizer.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters()): assert torch.allclose(p, q, atol=1e-6)


def test_no_graph_break_in_the_network():
    net, images = tiny_net(), torch.rand(4, 1, 64, 64)
    for keep in (False, True):
        if keep: net.text_encoder.keep_prefixes(TEXTS[:4])
        torch._dynamo.reset()
        found = torch._dynamo.explain(net)(images, net.text_encoder.tokenize(TEXTS[:4]))
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
    torch._dynamo.reset()


def test_a_compiled_network_gives_the_same():
    "The graph as traced, run without a code generator: what torch.compile captures is what the network does."
    net, images = tiny_net().eval(), torch.rand(4, 1, 64, 64)
    tokens = net.text_encoder.tokenize(TEXTS[:4])
    torch._dynamo.reset()
    for a, b in zip(net(images, tokens), torch.compile(net, backend='aot_eager', fullgraph=True)(images, tokens)):
        if a is not None: assert torch.allclose(a, b, atol=1e-4)
    torch._dynamo.reset()


def test_half_a_decoder_has_the_same_weights_and_a_quarter_of_the_work():
    from torch.utils.flop_counter import FlopCounterMode
    full, half = tiny_net(), tiny_net(decoder_scale=2)
    half.load_state_dict(full.state_dict())
    features_, work = full.image_encoder(torch.rand(2, 1, 64, 64)), []
    for net in (full, half):
        with FlopCounterMode(display=False) as counter: logits = net.decoder(features_, (64, 64))
        assert logits.shape == (2, 1, 64, 64)
        work.append(counter.get_total_flops())
    assert work[1] < work[0]
    smooth = torch.nn.functional.avg_pool2d(full.decoder(features_, (64, 64)), 2)
    assert smooth.shape[-1] == 32 and torch.isfinite(logits).all()
    with pytest.raises(G2DError, match='expected 1, or 2'): tiny_net(decoder_scale=4)


def test_attention_maps_are_a_view_of_the_weights():
    "One query: nothing of the size tokens x tokens is kept, and the maps are the weights themselves, not copies for each head."
    from g2d.models.attention_pool import AttentionPool
    pool, x = AttentionPool(128, 4, grid=(14, 14)), torch.randn(16, 128, 14, 14)
    seen = {}
    def look(): seen['maps'] = pool(x)[1]; return seen['maps']
    kept = B.kept_bytes(look)
    assert seen['maps'].untyped_storage().nbytes() == 16*4*197*4                          # [B, heads, 1, 1 + h w] in all, the query's own weight with them
    assert kept < 16*4*197*197*4                                                          # less than one square of tokens for each head


# gradient caching

def cached_and_whole(p, store, tmp_path, frozen_norm):
    "Gradients of one step: whole batch, and in chunks."
    found = []
    for chunk in (0, 3):
        run = Pretrainer(store, p.replace(grad_cache_chunk=chunk), tmp_path/f'{chunk}', device='cpu', progress=False)
        run.model.train()
        if frozen_norm: run.net.eval()
        parts = run.step(next(iter(run.loader)))
        found.append((parts, gradient(run.net), {k: v.clone() for k, v in run.net.named_buffers()}))
    return found


@pytest.mark.parametrize('method', [dict(), dict(dense_target='none', local='gloria'), dict(dense_target='none', local='mgca')], ids=['g2d', 'gloria', 'mgca'])
def test_gradient_caching_equals_the_big_batch(method, store, tmp_path):
    "With BatchNorm frozen: the same losses and the same gradient to 1e-5."
    p = profile('recommended', **TINY | method, precision='fp32', train_split='train', text_cache='off')
    (a, g, _), (b, h, _) = cached_and_whole(p, store, tmp_path, True)
    assert a.keys() == b.keys() and len(a) > 2
    for name in a: assert abs(a[name] - b[name]) < 1e-5*max(1, abs(a[name])), name
    assert (g - h).abs().max() < 1e-5*g.abs().max()


def test_gradient_caching_with_batch_statistics(store, tmp_path):
    "With BatchNorm in training mode the statistics are those of a chunk: another gradient than the big batch, and averages that move once a chunk."
    p = profile('recommended', **TINY, precision='fp32', train_split='train', text_cache='off')
    (a, g, plain), (b, h, cached) = cached_and_whole(p, store, tmp_path, False)
    assert (g - h).norm() > 1e-3*g.norm()
    counts = {k: (int(plain[k]), int(v)) for k, v in cached.items() if k.endswith('num_batches_tracked')}
    assert counts and set(counts.values()) == {(1, 3)}


def test_a_run_with_every_lever_resumes(store, tmp_path):
    "Kept text states, windows and gradient caching in `pretrain`: stopped and continued gives the same weights."
    from g2d.pretrain import pretrain
    from g2d.settings import settings
    p = profile('recommended', **TINY | dict(epochs=2), precision='fp32', train_split='train', text_window=2, grad_cache_chunk=4, decoder_scale=2)
    whole = pretrain(store, p, tmp_path/'whole', device='cpu', progress=False, val_images=4)
    half = Pretrainer(store, p, tmp_path/'half', device='cpu', progress=False, checkpoint_seconds=0, val_images=4)
    (tmp_path/'half'/'masks').mkdir(parents=True)
    plain = half._after_step
    def stop(row, *rest):
        plain(row, *rest)
        if row['step'] == 6: raise KeyboardInterrupt
    half._after_step = stop
    with pytest.raises(KeyboardInterrupt): half.run()
    again = pretrain(store, p, tmp_path/'half', device='cpu', progress=False, val_images=4)
    different = [k for k in whole.weights if not torch.equal(whole.weights[k], again.weights[k])]
    assert not different, different[:3]


# several processes

WORKER = textwrap.dedent('''
    import json, multiprocessing, sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from g2d.bench import kept_bytes
    from g2d.data.loading import PairLoader
    from g2d.data.store import RadiographStore
    from g2d.losses import global_alignment_loss
    from g2d.models.g2d import G2D
    from g2d.profiles import profile
    torch.set_num_threads(1)
    folder, path, overrides = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

    def work(rank, world):
        dist.init_process_group('gloo', init_method=f'file://{folder}/meet{world}', rank=rank, world_size=world)
        torch.manual_seed(0)
        net = G2D(profile('recommended', **overrides)).eval()          # BatchNorm and dropout as in use: the joint batch is then well defined
        both = DistributedDataParallel(net, find_unused_parameters=True)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        curve = []
        for batch in PairLoader(RadiographStore.open(path), 8//world, seed=1, rank=rank, world_size=world, split='train'):
            out = both(batch.images/255, batch.texts, decode=False)
            loss = global_alignment_loss(out.image_emb, out.text_emb, gather=True)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            mean = loss.detach().clone(); dist.all_reduce(mean); curve.append(float(mean)/world)
        big = torch.randn(2, 1024//world, 64, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        kept = kept_bytes(lambda: global_alignment_loss(big[0], big[1], gather=True))
        json.dump(dict(curve=curve, kept=kept), open(f'{folder}/{world}_{rank}.json', 'w'))
        dist.destroy_process_group()

    if __name__ == '__main__':
        fork = multiprocessing.get_context('fork')                     # the imports above are paid once
        workers = [fork.Process(target=work, args=(rank, world)) for world in (1, 2, 4) for rank in range(world)]
        for w in workers: w.start()
        for w in workers: w.join(240)
        for w in workers: w.kill()
        sys.exit(max(w.exitcode or 0 for w in workers))
''')


@pytest.fixture(scope='module')
def worlds(store, tmp_path_factory):
    "Loss curves and kept bytes of 1, 2 and 4 gloo processes that share batches of 8 pairs."
    folder = tmp_path_factory.mktemp('worlds')
    (folder/'worker.py').write_text(WORKER)
    environment = os.environ | dict(GLOO_SOCKET_IFNAME='lo', OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    done = subprocess.run([sys.executable, str(folder/'worker.py'), str(folder), str(store.path), json.dumps(TINY)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return {w: [json.loads((folder/f'{w}_{r}.json').read_text()) for r in range(w)] for w in (1, 2, 4)}


def test_processes_have_the_loss_curve_of_the_joint_batch(worlds):
    one = worlds[1][0]['curve']
    assert len(one) == 4 and max(one) - min(one) > 1e-3                                    # something is learnt, so equality means something
    for world in (2, 4):
        for answer in worlds[world]: assert np.allclose(answer['curve'], one, atol=1e-4), (world, answer['curve'], one)


def test_memory_of_the_contrastive_loss_falls_with_processes(worlds):
    kept = {w: max(a['kept'] for a in answers) for w, answers in worlds.items()}
    square = 1024*1024*4
    assert kept[1] >= 2*square                                                             # two directions, N x N
    for w in (2, 4): assert kept[w] < 1.25*kept[1]/w, kept                                 # B x N each


# the benchmarks

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='processes are forked on Linux only')
def test_the_fork_server_is_measured_against_new_pythons(tmp_path, monkeypatch):
    monkeypatch.delenv('G2D_FORK_SERVER', raising=False)
    rows = list(csv.DictReader(open(B.bench('fork_server', small=True, rounds=1, out=tmp_path))))
    assert [r['side'] for r in rows] == ['with the first copy', 'a new Python', 'a copy'] and float(rows[2]['ratio']) > 0 and 'G2D_FORK_SERVER' not in os.environ


def test_the_finer_grid_is_measured(tmp_path):
    rows = list(csv.DictReader(open(B.bench('finer_grid', small=True, rounds=2, out=tmp_path))))
    assert [(r['side'], bool(r['ratio'])) for r in rows] == [('last stage', False), ('last stage dilated', True), ('stage before, as recommended', True)]


@pytest.mark.parametrize('name', ['text', 'loader', 'pseudo_mask'])
def test_small_runs_write_their_table(name, tmp_path, capsys):
    path = B.bench(name, small=True, rounds=2, out=tmp_path)
    rows = list(csv.DictReader(open(path)))
    assert len(rows) >= 4 and all(r['machine'] and r['command'] == f'g2d bench {name} --small --rounds 2' and 'torch' in r['machine'] for r in rows)
    for row in rows:
        assert float(row['low']) <= float(row['median']) <= float(row['high'])
        if row['ratio']: assert float(row['ratio_low']) <= float(row['ratio']) <= float(row['ratio_high'])
    assert sum(bool(r['ratio']) for r in rows) >= 2


def counts_faults() -> bool:
    "Does this kernel count page faults? That of gVisor says 0, whatever is touched."
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 23)                                               # 64 MiB, each page touched for the first time
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt > before


def test_freed_memory_is_kept():
    # How much glibc gives back by itself is a matter of how a start lays out its heap: with two threads nothing in 4 of 14 starts, with one thread 192 pages a step or more in 18 of 18; hence one thread, and two starts
    child = lambda keep: B.answer_of(B.start_child('kept_child', threads=1, keep=keep, small=True))
    given, kept = max((child(False) for _ in range(2)), key=lambda answer: answer['faults']), child(True)
    if B.os.uname().sysname != 'Linux': pytest.skip('glibc only')
    assert kept['peak'] < 1.3*given['peak'], (given, kept)
    if not counts_faults(): pytest.skip('this kernel counts no page faults, so there is nothing to compare')
    assert kept['faults'] < given['faults']/5, (given, kept)      # medians of eight steps, the heap having grown in the first two


def test_users_of_malloc_variables_are_left_alone(monkeypatch):
    from g2d.threads import keep_freed_memory
    monkeypatch.setenv('MALLOC_ARENA_MAX', '2')
    assert keep_freed_memory() is False


def held_after_training(give_back: bool) -> dict:
    "Memory of a process after 400 MB were used and freed, in a child."
    import torch
    from g2d.threads import give_back_memory, keep_freed_memory
    if not keep_freed_memory(): return dict(before=0, after=0)
    before = B.resident()
    pieces = [torch.ones(500_000) for _ in range(200)]
    pieces = pieces[-1:]
    if give_back: give_back_memory()
    return dict(before=before, after=B.resident())


def test_memory_is_given_back_at_the_end_of_a_training():
    "What is kept between steps does not stay with a notebook."
    import json, subprocess, sys
    def child(give_back):
        code = f'import json, sys; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r}); from test_speed import held_after_training; print(json.dumps(held_after_training({give_back})))'
        return json.loads(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    kept, given = child(False), child(True)
    if not kept['after']: pytest.skip('glibc only')
    assert kept['after'] - kept['before'] > 300e6 and given['after'] - given['before'] < 100e6, (kept, given)


def test_every_store_has_its_epochs_in_turn():
    seconds = B.answer_of(B.start_child('epochs_child', sizes=[80, 160], size=64))
    assert [len(s) for s in seconds] == [4, 4] and min(map(min, seconds)) > 0     # two epochs of 80 pairs for one of 160


def test_a_small_step_runs_with_all_levers_and_one(tmp_path):
    pairs = B.make_pairs(tmp_path, 16, 64)
    for levers in ((), B.SAME + ('frozen', 'prefix', 'half', 'bf16')):
        step = B.Step(pairs, 4, levers, small=True)
        assert np.isfinite(step(0)['loss']) and set(step.seconds) == {'input', 'tokens', 'forward', 'mask', 'losses', 'backward', 'optimiser'}
    with pytest.raises(G2DError, match='no lever faster'): B.Step(pairs, 4, ('faster',), small=True)


def test_benches_are_listed_and_unknown_ones_refused():
    known = B.benches()
    assert {'step', 'levers', 'text', 'loader', 'pseudo_mask', 'memory', 'scaling', 'demo', 'phantom', 'prepare', 'linear_probe', 'runs'} <= set(known)
    assert all(len(about) > 10 for about in known.values())
    with pytest.raises(G2DError, match='There is no benchmark "stepp"'): B.bench('stepp')


def test_a_child_that_fails_says_why():
    with pytest.raises(G2DError, match='A benchmark process failed'): B.answer_of(B.start_child('contrastive_child', rank=0))


def test_peak_memory_of_gradient_caching_is_reported():
    answer = B.answer_of(B.start_child('memory_child', threads=1, batch=8, chunk=4, small=True))
    assert answer['peak'] > answer['before'] > 1e7 and np.isfinite(answer['loss'])


def test_ratios_are_taken_round_by_round():
    table = B.Table('x')
    row = table.add('case', 'side', [1., 2., 4.], baseline=[2., 8., 4.])
    assert (row['ratio'], row['ratio_low'], row['ratio_high']) == (2., 1., 4.)
    assert table.add('case', 'rate', [10., 30.], 'images/s', baseline=[5., 10.], rate=True)['ratio'] == 2.5


# sharded stores

def test_shards_are_one_store(tmp_path):
    from g2d.data.store import RadiographStore, ShardedStore
    from g2d.data.phantom import make_phantom_store
    shards = [make_phantom_store(tmp_path/name, 10, size=64, seed=seed, workers=0, split=dict(train=.8, val=.2)) for name, seed in (('a', 1), ('b', 2))]
    if set(shards[0].index.image_id) & set(shards[1].index.image_id): pytest.fail('the two phantom stores share image ids')
    both = ShardedStore.open([s.path for s in shards])
    whole = np.concatenate([s.images for s in shards])
    assert both.images.shape == whole.shape and np.array_equal(np.asarray(both.images), whole) and both.hash not in [s.hash for s in shards]
    assert both.hash == ShardedStore.open([s.path for s in shards]).hash != ShardedStore.open([s.path for s in shards[::-1]]).hash
    train = both.select(split='train')
    assert np.array_equal(np.asarray(train.images), whole[train.rows]) and {row // 10 for row in train.rows} == {0, 1}
    for batch in PairLoader(train, 4, seed=0, window=2, workers=1):
        assert np.array_equal(batch.images[:, 0].numpy(), whole[train.rows[batch.rows]])
    for i in (0, 9, 10, 19): assert both.masks(i).keys() == shards[i // 10].masks(i % 10).keys()
    import pickle
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(both)).images), whole)       # workers of a DataLoader open the files anew
