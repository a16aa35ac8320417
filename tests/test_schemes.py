"Splits as data, leaks counted, fingerprints of what was seen, raw layouts, counts beside the published ones."
import json
import numpy as np, pandas as pd, pytest
from g2d.settings import G2DError
from g2d.data.splits import (Scheme, make_scheme, count_leaks, save_scheme, load_scheme, fraction_ids, fingerprints, check_unseen)
from g2d.data.prepare import SETS, PUBLISHED, Item, Listing, data_set, prepare, check_counts
from g2d.data.layouts import phantom_films, write_dicom, write_image, write_table, write_tgz, write_zip, LAYOUTS, layout, write_layout
from g2d.data.store import RadiographStore


def archive(patients=60, seed=0):
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    return pd.DataFrame(dict(image_id=[f'i{k:03d}' for k in range(len(patient))], patient_id=[f'p{k}' for k in patient]))


def test_scheme_from_column_and_round_trip(tmp_path):
    frame = archive()
    split = pd.Series(np.where(frame.patient_id.str[1:].astype(int) < 40, 'train', 'test'), dtype='string')
    split[0] = pd.NA
    scheme = make_scheme('official', frame, split, 'made up')
    assert scheme.sizes == split.value_counts().to_dict() and not scheme.leaks and 'i000' not in scheme.ids('train')
    train = frame[(split == 'train').fillna(False)]
    assert scheme.ids('train', .1) == fraction_ids(train, .1) and set(scheme.ids('train', .01)) < set(scheme.ids('train', .1))
    assert load_scheme(save_scheme(tmp_path, scheme)) == scheme
    text = (tmp_path/'official.json').read_text()
    (tmp_path/'official.json').write_text(text.replace('"i005"', '"i999"', 1))
    with pytest.raises(G2DError, match='changed after'): load_scheme(tmp_path/'official.json')
    with pytest.raises(G2DError, match='no part "val"'): scheme.ids('val')


def test_leaks_are_counted_as_a_loop_does():
    frame = archive()
    rng = np.random.default_rng(1)
    parts = {name: list(rng.choice(frame.image_id, 40, replace=False)) for name in ('train', 'val', 'test')}
    patient = dict(zip(frame.image_id, frame.patient_id))
    for pair, n in count_leaks(parts, frame).items():
        a, b = pair.split(' and ')
        assert n['images'] == sum(i in parts[b] for i in parts[a])
        assert n['patients'] == len({patient[i] for i in parts[a]} & {patient[i] for i in parts[b]})
    with pytest.raises(G2DError, match='leaks'): make_scheme('x', frame, parts, 'random')
    assert make_scheme('x', frame, parts, 'random', leaking=True).leaks == count_leaks(parts, frame)
    with pytest.raises(G2DError, match='does not have'): make_scheme('x', frame, dict(train=['nobody']), 'random')
    with pytest.raises(G2DError, match='twice'): make_scheme('x', frame, dict(train=['i001', 'i001']), 'random')


def test_fingerprints_know_image_patient_and_source():
    frame = archive()
    seen = fingerprints(frame[:20], 'a')
    assert len(seen) == 20 + frame[:20].patient_id.nunique() and (np.diff(seen) > 0).all()
    other = frame[frame.patient_id.isin(set(frame.patient_id) - set(frame[:20].patient_id))]
    check_unseen(seen, other, 'a')
    check_unseen(seen, frame, 'b')
    sibling = pd.DataFrame(dict(image_id=['new'], patient_id=[frame.patient_id[3]]))
    with pytest.raises(G2DError, match='has seen 1 of these 1'): check_unseen(seen, sibling, 'a')
    with pytest.raises(G2DError, match='has seen'): check_unseen(seen, frame.assign(source='a'), 'b')


@pytest.fixture
def toy(tmp_path):
    "A data set with an official and a leaking split, published counts, and its layout."
    @data_set('toy', published=dict(images=(10, 'its page'), boxes=(99, 'its paper')))
    def toy(source): # a set
        "A toy."
        names = [f'{k}' for k in range(10)]
        frame = pd.DataFrame(dict(image_id=names, patient_id=names))
        schemes = [make_scheme('official', frame, pd.Series(['train']*6 + ['val']*2 + ['test']*2), 'its page'),
                   make_scheme('as_mgca', frame, dict(train=names[:7], test=names[5:]), 'a release', leaking=True)]
        return Listing([Item(source/f'{n}.png', n, n, file='list.csv', row=k + 2) for k, n in enumerate(names)], source='toy', schemes=schemes, split='official', counts=dict(images=10, boxes=3))
    @layout('toy', shape=(64, 80))
    def write(folder, films, rng):
        for f in films: write_image(folder/f'{f.number}.png', f.image)
    yield write_layout('toy', tmp_path/'raw', 10)
    del SETS['toy'], PUBLISHED['toy'], LAYOUTS['toy']


def test_store_carries_its_splits(toy, tmp_path):
    store = prepare('toy', toy, tmp_path/'store', size=32)
    assert store.schemes == ['as_mgca', 'official'] and store.index.split.tolist() == ['train']*6 + ['val']*2 + ['test']*2
    assert store.select('test', scheme='as_mgca').index.image_id.tolist() == ['5', '6', '7', '8', '9']
    assert store.select('train', scheme='as_mgca').index.image_id.tolist() == [str(k) for k in range(7)]
    assert store.scheme('as_mgca').leaks == {'train and test': dict(images=2, patients=2)}
    assert store.select('train', scheme='official', fraction=.1).index.image_id.tolist() == store.scheme('official').fractions['0.1']
    with pytest.raises(G2DError, match='no split "nope"'): store.select('train', scheme='nope')
    other = prepare('toy', toy, tmp_path/'other', size=32, split='as_mgca')
    assert other.index.split.tolist() == ['train']*5 + ['test']*5
    with pytest.raises(G2DError, match='There is no split'): prepare('toy', toy, tmp_path/'third', size=32, split='as_paper')
    assert not (tmp_path/'third'/'manifest.json').exists()


def test_every_store_gets_a_scheme(tmp_path):
    for film in phantom_films(12, shape=(64, 64)): write_image(tmp_path/f'{film.number}.png', film.image)
    write_table(tmp_path/'t.csv', 'image,patient_id', [[f'{k}.png', k//2] for k in range(12)])
    store = prepare('tidy', tmp_path/'t.csv', tmp_path/'store', size=32)
    scheme = store.scheme('fixed')
    assert {part: ids for part, ids in scheme.parts.items()} == {part: sorted(store.index.image_id[store.index.split == part]) for part in scheme.parts}


def test_counts_beside_the_published(toy):
    (toy/'3.png').unlink()
    table = check_counts('toy', toy).set_index('count')
    assert table.verdict['images'] == 'same' and table.verdict['boxes'] == 'DIFFERS' and table.found['films present'] == 9
    assert table.found['official leaks'] == 'nothing' and '2 images and 2 patients in train and test' in table.found['as_mgca leaks']


def test_check_on_the_command_line(toy, capsys, monkeypatch):
    import sys
    from g2d.cli import main
    monkeypatch.setattr(sys, 'argv', ['g2d', 'prepare', 'toy', '--source', str(toy), '--check'])
    with pytest.raises(SystemExit) as stop: main()
    text = capsys.readouterr().out
    assert stop.value.code == 1 and 'DIFFERS' in text and '1 of 2 published counts differ' in text


def test_layouts_are_the_same_twice(toy, tmp_path):
    again = write_layout('toy', tmp_path/'again', 10)
    assert {p.name: p.read_bytes() for p in toy.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    write_dicom(tmp_path/'a.dcm', np.zeros((8, 9), np.uint8)); first = (tmp_path/'a.dcm').read_bytes()
    write_dicom(tmp_path/'a.dcm', np.zeros((8, 9), np.uint8))
    assert (tmp_path/'a.dcm').read_bytes() == first
    for write, name in ((write_zip, 'a.zip'), (write_tgz, 'a.tgz')):
        write(tmp_path/name, {'b/c.txt': b'text'}); first = (tmp_path/name).read_bytes()
        write(tmp_path/name, {'b/c.txt': b'text'})
        assert (tmp_path/name).read_bytes() == first


def test_a_checkpoint_knows_what_it_has_seen(tmp_path):
    from g2d.data.phantom import make_phantom_store
    from g2d.pretrain import pretrain
    from g2d.profiles import profile
    from g2d.checkpoint import Checkpoint
    from g2d.tasks.training import find_start, check_start
    p = profile('demo', image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, epochs=1, batch_size=8,
                global_only_steps=1, encoder_depth=4, decoder_channels=(16, 8, 8, 8))
    store = make_phantom_store(tmp_path/'store', 30, size=64, split=dict(train=.5, val=.2, test=.3))
    pretrain(store, p, tmp_path/'run', device='cpu', max_steps=1, progress=False)
    checkpoint = Checkpoint.load(tmp_path/'run')
    assert np.isin(fingerprints(store.select('train').index, store.manifest['source']), checkpoint.seen.numpy()).all()
    start = find_start(checkpoint)
    check_start(start, store.select('test'))
    with pytest.raises(G2DError, match='has seen'): check_start(start, store.select('train'))


def test_weights_may_not_move_into_a_test_set():
    from g2d.data.splits import seen_elsewhere, check_weights_may_move
    frame = archive()
    names = frame.image_id.tolist()
    a = make_scheme('a', frame, dict(train=names[:50], val=names[50:60], test=names[60:]), 'x', leaking=True)
    b = make_scheme('b', frame, dict(train=names[30:], test=names[:30]), 'x', leaking=True)
    assert seen_elsewhere(a, b) == names[:30] and seen_elsewhere(b, a) == names[60:] and seen_elsewhere(a, a) == []
    with pytest.raises(G2DError, match=f'30 of the 30 test images'): check_weights_may_move(a, b)
    check_weights_may_move(a, a)
