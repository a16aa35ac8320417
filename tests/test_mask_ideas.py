"Ideas for the pseudo-mask: maps against brute force, off means bit for bit as before, and a teacher that is an average and survives a kill."
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from g2d.checkpoint import Checkpoint
from g2d.data.phantom import make_phantom_store
from g2d.data.reports import finding_sentences
from g2d.models.g2d import G2D, G2DOutput
from g2d.pretrain import Pretrainer, averaged_tensors, mask_teacher, pretrain
from g2d.profiles import profile
from g2d.settings import G2DError
from g2d.validation import collect_pass, dense_target, make_pseudo_mask, mask_scores, mask_texts

TINY = dict(image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, encoder_depth=4, decoder_channels=(16, 8, 8, 8),
            batch_size=8, epochs=2, global_only_steps=1)
REPORTS = ['There is a small left effusion. No pneumothorax. An 8 mm nodule in the right apex.', 'The lungs are clear. Heart size is normal.', 'Mild pulmonary edema. The heart is not enlarged.']


def tiny(**changes): return profile('demo', **TINY | changes)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return make_phantom_store(tmp_path_factory.mktemp('ideas')/'store', 26, size=64, seed=2, split=dict(train=24, val=2))


@pytest.fixture
def out():
    generator = torch.manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    return G2DOutput(random(3, 5), random(3, 5), random(3, 5, 2, 4), random(3, 4, 2, 4).abs(), random(3, 1, 16, 32))


def cosine(a, b): return float(a @ b/(np.linalg.norm(a)*np.linalg.norm(b)))


class Reader(torch.nn.Module):
    "Every text has a vector of its own, found by its hash."
    def __init__(self): super().__init__(); self.asked = []
    def encode_text(self, texts):
        self.asked += texts
        return torch.stack([torch.randn(5, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in texts])


@pytest.mark.parametrize('text, kept', [('There is a 3.9 cm mass. No effusion.', ['There is a 3.9 cm mass.']), ('Single AP view of the chest. Mild edema.', ['Mild edema.']),
                                        ('The heart is not enlarged. Lungs are clear without focal consolidation.', []), ('Comparison: none. Clinical correlation is recommended.', []),
                                        ('Effusion has resolved. Nodule is stable. Nodule is stable.', ['Nodule is stable.']), ('Normally sized heart. Abnormal opacity on the left.', ['Abnormal opacity on the left.'])])
def test_sentences_that_name_something(text, kept): assert list(finding_sentences(text)) == kept


def test_attention_is_as_before(out):
    p, images = tiny(), torch.rand(3, 1, 16, 32)
    processor = make_pseudo_mask(p)
    assert mask_scores(p, out) is out.attention
    assert torch.equal(dense_target(p, processor, out, images), processor(out.attention, images))


def test_similarity_against_loops(out):
    found = mask_scores(tiny(mask_source='similarity'), out)
    assert found.shape == (3, 1, 2, 4)
    for b, i, j in np.ndindex(3, 2, 4): assert found[b, 0, i, j].item() == pytest.approx(max(0, cosine(out.patch_emb[b, :, i, j].numpy(), out.text_emb[b].numpy())), abs=1e-6)
    assert (found == 0).any() and (found > 0).any()


def test_sentences_against_loops(out):
    reader = Reader()
    found = mask_scores(tiny(mask_source='sentences'), out, REPORTS, reader)
    wanted = [['There is a small left effusion.', 'An 8 mm nodule in the right apex.'], [REPORTS[1]], ['Mild pulmonary edema.']]      # the second names nothing: the report itself
    assert [list(t) for t in mask_texts(REPORTS)] == wanted and sorted(reader.asked) == sorted(sum(wanted, []))
    for b, i, j in np.ndindex(3, 2, 4):
        best = max(cosine(out.patch_emb[b, :, i, j].numpy(), reader.encode_text([s])[0].numpy()) for s in wanted[b])
        assert found[b, 0, i, j].item() == pytest.approx(max(0, best), abs=1e-6)


def test_asking_leaves_the_model_as_it_was():
    "Sentences are read in evaluation mode: no statistics move, no gradient, modes come back; same vectors as asked one by one."
    p = tiny(mask_source='sentences')
    net = G2D(p).train()
    images = torch.rand(3, 1, 64, 64)
    seen = net(images, REPORTS)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    scores = mask_scores(p, seen, REPORTS, net)
    assert not scores.requires_grad and net.training and net.text_projector.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.eval()
    for b, asked in enumerate(mask_texts(REPORTS)):
        with torch.no_grad(): words = torch.cat([net.encode_text([s]) for s in asked])
        best = torch.stack([torch.cosine_similarity(seen.patch_emb[b], w[:, None, None], dim=0) for w in words]).amax(0).clamp(min=0)
        assert torch.allclose(scores[b, 0], best, atol=1e-5)
    assert dense_target(p, make_pseudo_mask(p), seen, images, texts=REPORTS, model=net).shape == (3, 1, 64, 64)


@pytest.mark.parametrize('change, sentence', [(dict(mask_source='words'), 'mask_source is "words"'), (dict(mask_source='similarity', mask_per_head=True), 'has one map'),
                                              (dict(mask_source='sentences', text_style='mgca'), 'leaves none'), (dict(mask_momentum=1.), 'mask_momentum is 1.0')])
def test_what_cannot_be_is_refused(change, sentence):
    with pytest.raises(G2DError, match=sentence): make_pseudo_mask(tiny(**change))


def test_sentences_without_texts_are_refused(out):
    with pytest.raises(G2DError, match='needs the reports'): mask_scores(tiny(mask_source='sentences'), out)


def steps(store, folder, p, n=3, watch=None, **patches):
    "The first steps of a run: losses, and the run."
    run = Pretrainer(store, p, folder, device='cpu', progress=False)
    for name, function in patches.items(): setattr(run, name, function(run))
    run.model.train()
    losses = []
    while len(losses) < n:
        for batch in run.loader:
            losses.append({k: float(v) for k, v in run.step(batch).items()})
            run.update()
            if watch: watch(run)
            if len(losses) == n: break
        run.loader.set_epoch(1)
    return losses, run


@pytest.mark.parametrize('more', [dict(), dict(dense_target='shuffled'), dict(grad_cache_chunk=4)], ids=['plain', 'shuffled', 'chunks'])
def test_off_is_the_same_to_the_last_bit(store, tmp_path, more):
    "Against the line that stood there before: the processor on the attention of the network itself."
    def old(run):
        def target(out, images, texts, shift):
            mask = run.pseudo_mask(out.attention.detach(), images)
            return mask.roll(shift, 0) if run.profile.dense_target == 'shuffled' else mask
        return target
    a, run = steps(store, tmp_path/'a', tiny(**more))
    b, plain = steps(store, tmp_path/'b', tiny(**more), _target=old)
    assert a == b and 'dense' in a[-1] and run.teacher is None
    assert all(torch.equal(x, y) for x, y in zip(run.net.state_dict().values(), plain.net.state_dict().values()))


@pytest.mark.parametrize('more', [dict(mask_source='similarity'), dict(mask_source='sentences'), dict(mask_source='sentences', frozen_layers='all', mask_momentum=.9), dict(mask_momentum=.5, grad_cache_chunk=4)],
                         ids=['similarity', 'sentences', 'frozen', 'chunks'])
def test_ideas_train_and_change_only_the_dense_part(store, tmp_path, more):
    "The first step is global only and the start the same, so an idea must not show there; later its masks must."
    base = {k: v for k, v in more.items() if not k.startswith('mask_')}
    a, b = (steps(store, tmp_path/name, tiny(**m), n=2)[0] for name, m in (('a', base), ('b', more)))
    assert a[0] == b[0] and a[1]['global'] == b[1]['global'] and a[1]['dense'] != b[1]['dense'] and all(np.isfinite(list(x.values())).all() for x in b)


def test_validation_looks_at_the_same_map(store):
    p = tiny(mask_source='similarity')
    torch.manual_seed(0)
    net = G2D(p).eval()
    found = collect_pass(net, store, limit=4, named=False)
    images = torch.from_numpy(np.stack([store.images[i] for i in found.rows]))[:, None]/255
    with torch.no_grad(): own = make_pseudo_mask(p)(mask_scores(p, net(images, found.texts)), images)
    assert np.allclose(found.pseudo, own[:, 0].numpy(), atol=1e-5)


def test_the_teacher_is_the_average_of_the_weights(store, tmp_path):
    m, wanted = .7, {}
    p = tiny(mask_momentum=m)
    def watch(run):
        for name, (x, own) in averaged_tensors(run.teacher, run.net).items():
            wanted[name] = m*wanted[name] + (1 - m)*own.double()
            assert torch.allclose(x.double(), wanted[name], atol=1e-6), name
    def start(run):
        wanted.update({name: x.double().clone() for name, (x, _) in averaged_tensors(run.teacher, run.net).items()})
        return Pretrainer._target.__get__(run)
    _, run = steps(store, tmp_path, p, n=3, watch=watch, _target=start)
    names = set(wanted)
    assert any(n.startswith('image_encoder') for n in names) and any('running_mean' in n for n in names) and any(n.startswith('pool') for n in names)
    assert not any(n.startswith(('decoder', 'text_encoder')) for n in names) and run.teacher.decoder is None       # attention asks no text
    assert not any(x.requires_grad for n, x in run.teacher.named_parameters() if not n.startswith('text_encoder')) and [x.requires_grad for x in run.net.parameters()] == [x.requires_grad for x in G2D(p).parameters()]
    assert not any(part.training for n, part in run.teacher.named_modules() if n and not n.startswith('text_encoder'))


def test_the_mask_is_the_teachers(store, tmp_path):
    _, run = steps(store, tmp_path, tiny(mask_momentum=.9, mask_source='similarity'), n=2)
    images, texts = torch.rand(4, 1, 64, 64), REPORTS + REPORTS[:1]
    with torch.no_grad():
        own = run.net(images, texts)
        seen = run.teacher(images, texts, decode=False)
    wanted = run.pseudo_mask(mask_scores(run.profile, seen), images)
    assert torch.equal(run._target(own, images, texts, 1), wanted) and not torch.equal(wanted, run.pseudo_mask(mask_scores(run.profile, own), images))
    assert {n.split('.')[0] for n in averaged_tensors(run.teacher, run.net)} == {'image_encoder', 'image_projector', 'pool', 'text_encoder', 'text_projector'}


def test_a_frozen_text_encoder_is_shared():
    net = G2D(tiny(frozen_layers='all', mask_source='sentences'))
    teacher = mask_teacher(net)
    assert teacher.text_encoder is net.text_encoder and teacher.text_projector is not net.text_projector and net.decoder is not None


@pytest.mark.parametrize('source', ['attention', 'sentences'])
def test_resume_of_the_teacher(store, tmp_path, source):
    "Stopped in the middle of an epoch and continued: every tensor of the file, the teacher's too, is that of the uninterrupted run."
    p = tiny(mask_momentum=.8, mask_source=source)
    options = dict(device='cpu', progress=False, val_split='none')        # no such split: nothing is validated
    pretrain(store, p, tmp_path/'whole', **options)
    half = Pretrainer(store, p, tmp_path/'half', checkpoint_seconds=0, **options)
    (tmp_path/'half').mkdir()
    plain = half._after_step
    def stop(row, *rest):
        plain(row, *rest)
        if row['step'] == 4: raise KeyboardInterrupt
    half._after_step = stop
    with pytest.raises(KeyboardInterrupt): half.run()
    assert Checkpoint.load(tmp_path/'half').about['position']['step'] == 1
    torch.manual_seed(99); np.random.seed(99)
    pretrain(store, p, tmp_path/'half', **options)
    whole, again = (load_file(tmp_path/name/'checkpoint.safetensors') for name in ('whole', 'half'))
    assert whole.keys() == again.keys() and any(k.startswith('teacher/') for k in whole)
    different = [k for k in whole if not torch.equal(whole[k], again[k])]
    assert not different, different[:3]
    model = Checkpoint.load(tmp_path/'half').model()                       # what is handed on is the network, not the teacher
    assert torch.equal(model.pool.q_proj.weight, whole['model/pool.q_proj.weight'])
    assert not torch.equal(whole['model/pool.q_proj.weight'], whole['teacher/pool.q_proj.weight'])
