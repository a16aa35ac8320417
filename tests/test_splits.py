"Splits against brute force: set intersections on random tables, other row orders, other processes."
import json, os, subprocess, sys
import numpy as np
import pandas as pd
import pytest
from g2d.settings import G2DError
from g2d.data.splits import as_ids, check_disjoint, fraction_ids, ids_hash, load_ids, save_ids, split_by_patient


def table(n_images=2000, n_patients=600, seed=0):
    rng = np.random.default_rng(seed)
    patient = rng.integers(0, n_patients, n_images)
    return pd.DataFrame(dict(image_id=[f'i{k}' for k in rng.permutation(n_images)], patient_id=[f'p{p}' for p in patient],
                             study_id=[f's{p}-{s}' for p, s in zip(patient, rng.integers(0, 3, n_images))],
                             label=rng.choice(list('aaaaaabbc'), n_images)))


def sets(frame, split, column='patient_id'):
    return {name: set(part[column]) for name, part in frame.groupby(split)}


def pairwise_empty(groups):
    names = list(groups)
    return all(not groups[a] & groups[b] for i, a in enumerate(names) for b in names[i + 1:])


@pytest.mark.parametrize('stratify', [None, 'label'])
@pytest.mark.parametrize('seed', range(4))
def test_no_patient_in_two_splits(seed, stratify):
    frame = table(seed=seed)
    split = split_by_patient(frame, dict(train=.7, val=.1, test=.2), seed=seed, stratify=stratify)
    assert split.index.equals(frame.index) and split.notna().all() and split.name == 'split'
    for column in ('patient_id', 'study_id', 'image_id'): assert pairwise_empty(sets(frame, split, column))
    n = frame.patient_id.nunique()
    got = frame.groupby(split).patient_id.nunique()
    for name, fraction in dict(train=.7, val=.1, test=.2).items(): assert abs(got[name] - fraction * n) <= 1


def test_row_order_index_and_type_of_ids_do_not_matter():
    frame = table()
    split = dict(zip(frame.image_id, split_by_patient(frame, stratify='label')))
    for seed in range(3):
        other = frame.sample(frac=1, random_state=seed)
        if seed: other.index = [0] * len(other) if seed == 1 else [f'r{k}' for k in range(len(other))]
        assert dict(zip(other.image_id, split_by_patient(other, stratify='label'))) == split
    numbers = pd.DataFrame(dict(image_id=range(100), patient_id=np.arange(100) // 3))
    expected = split_by_patient(numbers).tolist()
    for kind in (float, str, 'Int64'): assert split_by_patient(numbers.assign(patient_id=numbers.patient_id.astype(kind))).tolist() == expected
    padded = numbers.patient_id.astype(str) + np.where(np.arange(100) % 2, ' ', '')
    assert split_by_patient(numbers.assign(patient_id=padded)).tolist() == expected


def test_seeds_differ_and_repeat():
    frame = table()
    splits = [split_by_patient(frame, seed=s).tolist() for s in (0, 1, 2, 0)]
    assert splits[0] == splits[3] and splits[0] != splits[1] != splits[2]
    agreement = np.mean(np.array(splits[0]) == np.array(splits[1]))
    assert .55 < agreement < .77                      # .8^2 + .1^2 + .1^2 = .66 for independent draws


def test_same_lists_in_another_process_and_hash_seed():
    code = ("import pandas as pd; from g2d.data.splits import *\n"
            "f = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(500)], patient_id=[f'p{k//4}' for k in range(500)], label=[['a','b'][k%7==0] for k in range(500)]))\n"
            "print(ids_hash(fraction_ids(f, .1, seed=5, stratify='label')), ''.join(s[1] for s in split_by_patient(f, seed=5, stratify='label')))")
    runs = {subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': h, 'PYTHONPATH': os.pathsep.join(sys.path)},
                           capture_output=True, text=True, check=True).stdout for h in ('1', '2')}
    assert len(runs) == 1 and len(runs.pop()) > 500


def test_draws_are_fair():
    "Over many seeds every patient is in the test set about as often as its fraction, singleton strata included."
    frame = pd.DataFrame(dict(image_id=range(40), patient_id=range(40), label=['a'] * 30 + ['b'] * 7 + ['c'] * 2 + ['d']))
    for stratify in (None, 'label'):
        hits = np.mean([split_by_patient(frame, dict(train=.75, test=.25), seed=s, stratify=stratify) == 'test' for s in range(400)], axis=0)
        assert abs(hits.mean() - .25) < .001
        assert (abs(hits - .25) < 5 * np.sqrt(.25 * .75 / 400)).all()


@pytest.mark.parametrize('seed', range(3))
def test_stratified_by_the_rarest_label_of_the_patient(seed):
    frame = table(seed=seed)
    patients_with = frame.groupby('label').patient_id.nunique()
    rarest = frame.assign(n=frame.label.map(patients_with)).sort_values(['n', 'label']).drop_duplicates('patient_id').set_index('patient_id').label
    fractions = dict(train=.6, val=.2, test=.2)
    split = frame.assign(split=split_by_patient(frame, fractions, seed=seed, stratify='label')).drop_duplicates('patient_id').set_index('patient_id').split
    count = pd.crosstab(rarest, split)
    for label, n in rarest.value_counts().items():
        for name, fraction in fractions.items(): assert abs(count.loc[label, name] - fraction * n) <= 2.5


def test_stratify_by_lists_with_unknown_and_empty():
    frame = pd.DataFrame(dict(image_id=range(300), patient_id=np.arange(300) // 2))
    frame['labels'] = [[], ['a'], None, ['a', 'b'], pd.NA, []] * 50
    split = split_by_patient(frame, dict(train=.5, test=.5), stratify='labels')
    rare = frame.patient_id.map(frame.groupby('patient_id').labels.apply(lambda rows: any(isinstance(r, list) and 'b' in r for r in rows)))
    assert abs((split[rare] == 'test').mean() - .5) < .06
    assert split.tolist() == split_by_patient(frame, dict(train=.5, test=.5), stratify=frame.labels.sample(frac=1, random_state=0)).tolist()
    with pytest.raises(G2DError, match='no column "nosuch"'): split_by_patient(frame, stratify='nosuch')
    with pytest.raises(G2DError, match='3 values for 300 rows'): split_by_patient(frame, stratify=[1, 2, 3])


def test_missing_patients():
    frame = table(100, 40)
    frame.loc[[3, 4], 'patient_id'] = [None, ' ']
    with pytest.raises(G2DError, match='2 of 100 rows have no patient_id'): split_by_patient(frame)
    assert split_by_patient(frame, missing='image').notna().all()
    with pytest.raises(G2DError, match='100 of 100'): split_by_patient(frame.drop(columns='patient_id'))
    named = pd.DataFrame(dict(image_id=['x', 'y'], patient_id=[None, 'x']))       # image x without patient, patient called x
    assert set(split_by_patient(named, dict(train=.5, test=.5), missing='image')) == {'train', 'test'}
    with pytest.raises(G2DError, match='missing="guess"'): split_by_patient(frame, missing='guess')


def test_bad_ids_and_fractions():
    frame = table(50, 20)
    with pytest.raises(G2DError, match='1 image ids occur more than once, e.g. i'): split_by_patient(pd.concat([frame, frame[:1]]))
    with pytest.raises(G2DError, match='1 rows have no image_id'): split_by_patient(frame.assign(image_id=frame.image_id.where(frame.index > 0)))
    with pytest.raises(G2DError, match='no column image_id'): split_by_patient(frame.drop(columns='image_id'))
    for bad in (dict(train=.9, test=.2), dict(train=.9), dict(train=1.1, test=-.1), dict(train=0, test=1), {}, [.8, .2],
                dict(train='most', test=.2), dict(train=float('nan'), test=.5)):
        with pytest.raises(G2DError, match='fraction'): split_by_patient(frame, bad)
    with pytest.raises(G2DError, match='2 patients cannot fill the 3 splits'): split_by_patient(frame.assign(patient_id=['a', 'b'] * 25))
    assert split_by_patient(frame, dict(all=1)).eq('all').all()
    three = pd.DataFrame(dict(image_id=range(3), patient_id=range(3)))
    assert sorted(split_by_patient(three)) == ['test', 'train', 'val']              # nobody goes away empty


def test_check_disjoint_against_set_intersections():
    rng = np.random.default_rng(0)
    raised = 0
    for trial in range(60):
        frame = table(int(rng.integers(4, 30)), 40, seed=trial)
        frame['split'] = rng.choice(['train', 'val', 'test'], len(frame))
        clean = all(pairwise_empty(sets(frame, frame.split, c)) for c in ('patient_id', 'study_id', 'image_id'))
        for given in (frame, {name: part for name, part in frame.groupby('split')}):
            if clean: assert check_disjoint(given).rows.sum() == len(frame)
            else:
                raised += 1
                groups = sets(frame, frame.split)
                n = sum(sum(p in g for g in groups.values()) > 1 for p in set(frame.patient_id))
                with pytest.raises(G2DError, match=f'^{n} patients are in more than one split: p'): check_disjoint(given)
    assert 10 < raised < 110


def test_check_disjoint_names_what_is_shared():
    frame = pd.DataFrame(dict(image_id=list('abcd'), patient_id=['p1', 'p2', 'p3', 'p4'], study_id=['s1', 's1', 's2', 's3'], split=['train', 'val', 'test', None]))
    with pytest.raises(G2DError, match='1 studies are in more than one split: s1 in train and val'): check_disjoint(frame)
    with pytest.raises(G2DError, match='1 images are in more than one split: a in train and test'):
        check_disjoint(dict(train=pd.DataFrame(dict(image_id=['a', 'b'])), test=pd.DataFrame(dict(image_id=['a ']))))
    with pytest.raises(G2DError, match=r'5 ids are in more than one split: 0 in train and test; 1 in train and test; 2 in train and test; \.\.\.'):
        check_disjoint(dict(train=range(5), test=range(5)))
    with pytest.raises(G2DError, match='1 patients'):                              # 7 and 7.0 are one patient
        check_disjoint(dict(train=pd.DataFrame(dict(patient_id=[7])), test=pd.DataFrame(dict(patient_id=[7.0, np.nan]))))
    with pytest.raises(G2DError, match='no column "split"'): check_disjoint(frame.drop(columns='split'))
    with pytest.raises(G2DError, match='Nothing to check'): check_disjoint(dict(train=pd.DataFrame(dict(x=[1]))))
    with pytest.raises(G2DError, match='takes a table'): check_disjoint(['a', 'b'])
    report = check_disjoint(pd.DataFrame(dict(image_id=list('abc'), patient_id=['p', None, 'q'], split=['train', 'train', 'test'])))
    assert report.loc['train'].to_dict() == dict(rows=2, patients=1, images=2, rows_without_patient=1)


@pytest.mark.parametrize('by', ['patient', 'image'])
@pytest.mark.parametrize('stratify', [None, 'label'])
def test_fractions_are_nested(by, stratify):
    frame = table(3000, 1000)
    lists = [fraction_ids(frame, f, seed=2, by=by, stratify=stratify) for f in (.0001, .01, .1, .35, 1.)]
    for small, large in zip(lists, lists[1:]): assert set(small) < set(large)
    assert set(lists[-1]) == set(frame.image_id) and lists[2] == sorted(lists[2])
    n = frame.patient_id.nunique() if by == 'patient' else len(frame)
    inside = frame[frame.image_id.isin(lists[2])]
    assert (inside.patient_id.nunique() if by == 'patient' else len(inside)) == round(.1 * n)
    if by == 'patient': assert not set(inside.patient_id) & set(frame[~frame.image_id.isin(lists[2])].patient_id)
    assert fraction_ids(frame.sample(frac=1, random_state=1), .1, seed=2, by=by, stratify=stratify) == lists[2]
    assert fraction_ids(frame, .1, seed=3, by=by, stratify=stratify) != lists[2]


def test_fraction_arguments():
    frame = table(30, 10)
    for bad in (0, -1, 1.5):
        with pytest.raises(G2DError, match='fraction is'): fraction_ids(frame, bad)
    with pytest.raises(G2DError, match='by="study"'): fraction_ids(frame, .5, by='study')
    assert len(fraction_ids(frame.drop(columns='patient_id'), .5)) == 15           # without patients each image stands alone


def test_id_lists(tmp_path):
    path = tmp_path/'list.json'
    ids = ['b', 'a', 'ü 1']
    assert save_ids(path, ids, split='train', seed=0) == ids_hash(reversed(ids)) == ids_hash(tuple(ids))
    assert load_ids(path) == ['a', 'b', 'ü 1']
    assert json.loads(path.read_text())['about'] == dict(split='train', seed=0)
    good = path.read_text()
    for a, b in (('"b"', '"c"'), ('"b",\n', ''), ('"a"', '"a", "d"')):
        assert a in good
        path.write_text(good.replace(a, b, 1))
        with pytest.raises(G2DError, match='was changed after it was written'): load_ids(path)
    for broken, message in (('{', 'not valid JSON'), ('[1]', 'not an id list'), ('{"ids": [], "x": 1}', 'not an id list')):
        path.write_text(broken)
        with pytest.raises(G2DError, match=message): load_ids(path)
    with pytest.raises(G2DError, match='does not exist'): load_ids(tmp_path/'none.json')
    path.write_text(good)
    for bad, message in ((['a', 'a '], 'twice'), (['a', None], 'missing or blank'), (['a\nb'], 'line break')):
        with pytest.raises(G2DError, match=message): save_ids(path, bad)
    assert path.read_text() == good                                                # a refused list leaves the old file
    assert ids_hash(['ab', 'c']) != ids_hash(['a', 'bc'])


def test_folds_test_each_patient_once_and_are_the_same_in_every_table():
    from g2d.data.splits import fold_by_patient
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(dict(image_id=np.arange(600), patient_id=rng.integers(0, 200, 600)))
    for folds in (2, 3, 5):
        parts = [fold_by_patient(frame, k, folds) for k in range(1, folds + 1)]
        assert sum((p == 'test').to_numpy().astype(int) for p in parts).tolist() == [1]*600
        for p in parts:
            assert frame.assign(split=p).groupby('patient_id')['split'].nunique().max() == 1 and set(p) == {'train', 'val', 'test'}
            share = frame.assign(split=p).drop_duplicates('patient_id')['split'].value_counts(normalize=True)
            assert abs(share['test'] - 1/folds) < .12 and abs(share['val'] - .1) < .08
    some = frame[frame['patient_id'] % 3 > 0].sample(frac=1, random_state=0)
    assert (fold_by_patient(some, 2, 3) == fold_by_patient(frame, 2, 3)[some.index]).all()          # whoever else is in the table, in whatever order
    assert (fold_by_patient(frame, 2, 3, seed=1) != fold_by_patient(frame, 2, 3)).any()
    for bad in (dict(fold=0, folds=3), dict(fold=4, folds=3), dict(fold=1, folds=1), dict(fold=1, folds=2, val=.5)):
        with pytest.raises(G2DError, match='expected a fold from 1'): fold_by_patient(frame, **bad)
    with pytest.raises(G2DError, match='patients are too few'): fold_by_patient(frame.head(2), 1, 3)
    with pytest.raises(G2DError, match='no patient_id'): fold_by_patient(frame[['image_id']], 1, 3)


def test_a_hundred_thousand_rows():
    rng = np.random.default_rng(0)
    n = 100_000
    frame = pd.DataFrame(dict(image_id=np.arange(n), patient_id=rng.integers(0, 40_000, n), label=rng.choice(list('aaab'), n)))
    frame['split'] = split_by_patient(frame, stratify='label')
    check_disjoint(frame)
    assert pairwise_empty(sets(frame, frame.split))
    frame.loc[0, 'patient_id'] = frame.loc[frame.split != frame.split[0], 'patient_id'].iloc[0]
    with pytest.raises(G2DError, match='^1 patients'): check_disjoint(frame)


def test_real_indexes(data_root):
    "The tables of the shared data split without overlap, and again the same."
    found = 0
    for path in sorted(data_root.glob('*/*/*.csv')):
        frame = pd.read_csv(path, low_memory=False)
        if not {'image', 'patient_id'} <= set(frame): continue
        frame = frame.rename(columns=dict(image='image_id')).dropna(subset=['image_id', 'patient_id']).drop_duplicates('image_id')
        if frame.patient_id.nunique() < 3: continue
        frame['split'] = split_by_patient(frame)
        check_disjoint(frame[['image_id', 'patient_id', 'split']])
        found += 1
    assert found >= 2
