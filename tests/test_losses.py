"The losses against open formulas and other libraries, gradients, half precision, and two processes against one."
import os, subprocess, sys, textwrap
import numpy as np, pytest, torch
from torch.nn import functional as F
from g2d.losses import (dense_alignment_loss, dense_alignment_loss_as_released, gather_with_grad, global_alignment_loss, global_alignment_loss_as_released, soft_dice_loss)
from g2d.settings import G2DError


@pytest.fixture(autouse=True)
def one_thread(clean_state): torch.set_num_threads(1)     # small tensors; a second thread only waits where the machine is busy


def pair(b=6, d=10, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, d, generator=g, dtype=dtype)*3, torch.randn(b, d, generator=g, dtype=dtype)


def brute_force(v, l, t=.07, positives=None):
    "Eq. 1 with loops, image to text; `positives[i]` lists the right texts of image i."
    v, l = v/np.linalg.norm(v, axis=1, keepdims=True), l/np.linalg.norm(l, axis=1, keepdims=True)
    total = 0.
    for i in range(len(v)):
        e = [np.exp(v[i] @ l[j]/t) for j in range(len(l))]
        right = positives[i] if positives else [i]
        total -= sum(np.log(e[j]/sum(e)) for j in right)/len(right)
    return total/len(v)


@pytest.mark.parametrize('temperature', [.07, .5])
def test_global_loss_is_equation_1(temperature):
    v, l = pair(dtype=torch.float64)
    a, b = brute_force(v.numpy(), l.numpy(), temperature), brute_force(l.numpy(), v.numpy(), temperature)
    for kw, expected in [(dict(direction='image_to_text'), a), (dict(direction='image_to_text', reduction='sum'), a), ({}, (a + b)/2), (dict(reduction='sum'), a + b)]:
        assert abs(global_alignment_loss(v, l, temperature, **kw).item() - expected) < 1e-10
    assert abs(global_alignment_loss_as_released(*pair()).item() - global_alignment_loss(*pair(), reduction='sum').item()) == 0


def test_global_loss_of_open_clip_form():
    "The textbook form: cross-entropy of the scaled similarities and of their transpose."
    v, l = pair(16)
    s = F.normalize(v, dim=-1) @ F.normalize(l, dim=-1).T/.07
    expected = (F.cross_entropy(s, torch.arange(16)) + F.cross_entropy(s.T, torch.arange(16)))/2
    torch.testing.assert_close(global_alignment_loss(v, l), expected)


def test_same_texts_share_the_target():
    v, l = pair(5, dtype=torch.float64)
    ids = torch.tensor([4, 9, 4, 1, 4])
    positives = [[j for j in range(5) if ids[j] == ids[i]] for i in range(5)]
    expected = (brute_force(v.numpy(), l.numpy(), positives=positives) + brute_force(l.numpy(), v.numpy(), positives=positives))/2
    assert abs(global_alignment_loss(v, l, same=ids).item() - expected) < 1e-10
    assert abs(global_alignment_loss(v, l, same=ids[:, None] == ids).item() - expected) < 1e-10
    torch.testing.assert_close(global_alignment_loss(v, l, same=torch.arange(5)), global_alignment_loss(v, l))
    torch.testing.assert_close(global_alignment_loss(v, l, same=torch.zeros(5, 5, dtype=torch.bool)), global_alignment_loss(v, l))   # a text is always its own positive
    one_way = torch.eye(5, dtype=torch.bool); one_way[0, 3] = True     # a matrix that is not symmetric: rows are images
    a = brute_force(v.numpy(), l.numpy(), positives=[[0, 3], [1], [2], [3], [4]]); b = brute_force(l.numpy(), v.numpy(), positives=[[0], [1], [2], [3, 0], [4]])
    assert abs(global_alignment_loss(v, l, same=one_way).item() - (a + b)/2) < 1e-10


@pytest.mark.parametrize('kw', [{}, dict(direction='image_to_text'), dict(same=torch.tensor([1, 1, 2, 3]))])
def test_global_loss_gradient(kw):
    v, l = (x.requires_grad_() for x in pair(4, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: global_alignment_loss(a, b, temperature=.3, **kw), (v, l))


def test_global_loss_in_half_precision():
    v, l = pair(32, 64)
    exact = global_alignment_loss(v, l)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(global_alignment_loss(v, l), exact)       # no product in bfloat16
        assert global_alignment_loss(v.bfloat16(), l.bfloat16()).dtype == torch.float32
    big = global_alignment_loss((v*3000).half(), (l*3000).half())    # a norm that overflows in half precision
    torch.testing.assert_close(big, exact, atol=.02, rtol=0)


@pytest.mark.parametrize('kw,message', [(dict(direction='text_to_image'), 'image_to_text'), (dict(reduction='none'), 'mean')])
def test_global_loss_options(kw, message):
    with pytest.raises(G2DError, match=message): global_alignment_loss(*pair(), **kw)


def test_global_loss_shapes():
    with pytest.raises(G2DError, match='differ'): global_alignment_loss(torch.rand(4, 8), torch.rand(5, 8))


def masks(b=3, c=1, size=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 3*torch.randn(b, c, size, size, generator=g), (torch.rand(b, c, size, size, generator=g) > .8).float()


@pytest.mark.parametrize('channels', [1, 4])
def test_dense_loss_is_equation_4(channels):
    logits, target = masks(c=channels)
    p, t = logits.double().sigmoid().numpy(), target.numpy()
    dice = [1 - (2*(a*b).sum() + 1e-5)/(a.sum() + b.sum() + 1e-5) for a, b in zip(p, t)]
    bce = [-(b*np.log(a) + (1 - b)*np.log(1 - a)).mean() for a, b in zip(p, t)]
    each = .5*(np.array(dice) + np.array(bce))
    np.testing.assert_allclose(dense_alignment_loss(logits, target, reduction='none'), each, rtol=1e-5)
    np.testing.assert_allclose(dense_alignment_loss(logits, target), each.mean(), rtol=1e-5)
    np.testing.assert_allclose(dense_alignment_loss(logits, target, reduction='sum'), each.sum(), rtol=1e-5)
    np.testing.assert_allclose(dense_alignment_loss(logits, target, 0, 1), np.mean(bce), rtol=1e-5)
    np.testing.assert_allclose(dense_alignment_loss(logits, target, 1, 0), np.mean(dice), rtol=1e-5)


def test_dice_of_other_libraries():
    smp, metrics = pytest.importorskip('segmentation_models_pytorch'), pytest.importorskip('torchmetrics')
    logits, target = masks(1)
    theirs = smp.losses.DiceLoss('binary', from_logits=True, smooth=1e-5)(logits, target)
    torch.testing.assert_close(soft_dice_loss(logits.sigmoid(), target)[0], theirs, atol=1e-6, rtol=0)
    hard = (logits > 0).float()
    f1 = metrics.functional.classification.binary_f1_score(hard.flatten().long(), target.flatten().long())
    torch.testing.assert_close(1 - soft_dice_loss(hard, target)[0], f1, atol=1e-5, rtol=0)     # Dice of hard masks is F1


def test_released_form_and_its_bug():
    "Dice + 0.2 BCE; raw scores in Dice when the bug is on."
    logits, target = masks(4)
    def by_hand(scores):
        s, t = scores.flatten(1).double(), target.flatten(1).double()
        quotient = (2*(s*t).sum(1) + 1e-5)/(s.sum(1) + t.sum(1) + 1e-5)
        return 1 - quotient.sum()/4 + .2*F.binary_cross_entropy(logits.double().sigmoid(), target.double())
    assert abs(dense_alignment_loss_as_released(logits, target) - by_hand(logits)) < 1e-3*abs(by_hand(logits))
    torch.testing.assert_close(dense_alignment_loss_as_released(logits, target, dice_on_logits=False).double(), by_hand(logits.sigmoid()), atol=1e-5, rtol=0)
    mask = torch.zeros(1, 1, 10, 10); mask[..., :2, :] = 1
    values = torch.tensor([dense_alignment_loss_as_released(c*(2*mask - 1), mask) for c in torch.linspace(.2, .5, 50)])
    assert values.min() < -5 or values.max() > 10                                      # a pole between good outputs
    fixed = torch.tensor([dense_alignment_loss_as_released(c*(2*mask - 1), mask, False) for c in torch.linspace(-20, 20, 50)])
    assert fixed.min() >= 0 and (fixed.diff() < 0).all()                               # repaired: better output, smaller loss


@pytest.mark.parametrize('kw', [{}, dict(dice_on_logits=True), dict(dice_weight=1., bce_weight=.2)])
def test_dense_loss_gradient(kw):
    g = torch.Generator().manual_seed(1)
    logits = (torch.rand(2, 1, 4, 4, generator=g, dtype=torch.float64) + .5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dense_alignment_loss(x, (logits.detach() > 1).double(), **kw), (logits,))


def test_dense_loss_in_half_precision_and_at_extremes():
    logits, target = masks(2, size=256)
    exact = dense_alignment_loss(logits, target)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(dense_alignment_loss(logits, target), exact)
    assert abs(dense_alignment_loss(logits.half(), target.half()) - exact) < 1e-3      # 65,536 pixels overflow a sum in half precision
    for value in (1e4, -1e4):
        wild = torch.full((1, 1, 8, 8), value, requires_grad=True)
        loss = dense_alignment_loss(wild, target[:1, :, :8, :8]); loss.backward()
        assert loss.isfinite() and wild.grad.isfinite().all()
    empty = torch.zeros(1, 1, 8, 8, requires_grad=True)
    dense_alignment_loss(empty, torch.zeros(1, 1, 8, 8)).backward()
    assert (empty.grad > 0).all()


def test_dense_loss_refuses():
    logits, target = masks()
    with pytest.raises(G2DError, match='differ in shape'): dense_alignment_loss(logits, target[..., :12])
    with pytest.raises(G2DError, match='reduction'): dense_alignment_loss(logits, target, reduction='batch')


WORKER = textwrap.dedent('''
    import sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from g2d.losses import gather_with_grad, global_alignment_loss
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    case = torch.load(f'{folder}/case.pt', weights_only=True)
    results = {}
    for name, kw in dict(both={}, one=dict(direction='image_to_text'), sum=dict(reduction='sum'), same=dict(same=case['ids'][4*rank:4*rank+4]), local=dict(gather=False)).items():
        torch.manual_seed(0)
        model = torch.nn.ModuleDict(dict(image=torch.nn.Linear(6, 5), text=torch.nn.Linear(7, 5))).double()
        class Both(torch.nn.Module):
            def __init__(self): super().__init__(); self.nets = model
            def forward(self, x, y): return self.nets['image'](x), self.nets['text'](y)
        net = DistributedDataParallel(Both())
        v, l = net(case['x'][4*rank:4*rank+4], case['y'][4*rank:4*rank+4])
        loss = global_alignment_loss(v, l, **{'gather': True, **kw})
        loss.backward()
        mean = loss.detach().clone(); dist.all_reduce(mean); mean /= 2
        results[name] = dict(loss=mean, **{k: p.grad.clone() for k, p in model.named_parameters()})
    x = case['x'][4*rank:4*rank+4].clone().requires_grad_()
    together = gather_with_grad(x)
    (together*case['x']*(rank + 1)).sum().backward()
    results['gather'] = dict(together=together.detach(), grad=x.grad)
    try: global_alignment_loss(v.detach(), l.detach(), gather=True, same=torch.eye(4, dtype=torch.bool)); results['refused'] = {}
    except ValueError as error: assert 'one id a text' in str(error)
    torch.save(results, f'{folder}/out{rank}.pt')
    dist.destroy_process_group()
''')


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "Gradients from two gloo processes with 4 pairs each, and the case they worked on."
    folder = tmp_path_factory.mktemp('gloo')
    g = torch.Generator().manual_seed(3)
    case = dict(x=torch.randn(8, 6, generator=g, dtype=torch.float64), y=torch.randn(8, 7, generator=g, dtype=torch.float64), ids=torch.tensor([5, 6, 7, 5, 5, 8, 6, 9]))
    torch.save(case, folder/'case.pt')
    (folder/'worker.py').write_text(WORKER)
    env = dict(os.environ, GLOO_SOCKET_IFNAME='lo', OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    workers = [subprocess.Popen([sys.executable, str(folder/'worker.py'), str(r), str(folder)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    try:
        for w in workers:
            out, _ = w.communicate(timeout=200)
            assert w.returncode == 0, out
    finally:
        for w in workers: w.kill()
    return case, [torch.load(folder/f'out{r}.pt', weights_only=True) for r in range(2)]


@pytest.mark.parametrize('name,kw', [('both', {}), ('one', dict(direction='image_to_text')), ('sum', dict(reduction='sum')), ('same', dict(same=True))])
def test_two_processes_equal_one_joint_batch(two_processes, name, kw):
    case, results = two_processes
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(dict(image=torch.nn.Linear(6, 5), text=torch.nn.Linear(7, 5))).double()
    if 'same' in kw: kw = dict(same=case['ids'])
    loss = global_alignment_loss(model['image'](case['x']), model['text'](case['y']), **kw)
    loss.backward()
    for result in results:
        torch.testing.assert_close(result[name]['loss'], loss.detach(), atol=1e-9, rtol=0)
        for k, p in model.named_parameters():
            assert (result[name][k] - p.grad).abs().max() < 1e-9, k
            if name == 'both': assert (result['local'][k] - p.grad).abs().max() > 1e-4, k    # without gather the gradient is another


def test_gather_in_order_with_the_sum_of_gradients(two_processes):
    case, results = two_processes
    for rank, result in enumerate(results):
        assert torch.equal(result['gather']['together'], case['x'])
        torch.testing.assert_close(result['gather']['grad'], 3*case['x'][4*rank:4*rank+4])      # 1 from rank 0 and 2 from rank 1
        assert 'refused' not in result


def test_gather_alone_is_the_identity():
    x = torch.rand(3, 4, requires_grad=True)
    assert gather_with_grad(x) is x
    torch.testing.assert_close(global_alignment_loss(*pair(), gather=True), global_alignment_loss(*pair()))
