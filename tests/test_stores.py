"""Stores made by name, also by several processes at once"""
import os, subprocess, sys, time
from g2d.settings import settings
from g2d.tasks.stores import find_store

MAKE = 'import sys; from g2d.tasks.stores import find_store; s = find_store(sys.argv[1], 64, n=24); print(len(s), s.hash)'


def test_two_processes_that_ask_for_one_store_both_get_it(tmp_path):
    env = os.environ | {'G2D_OUTPUTS': str(tmp_path), 'OMP_NUM_THREADS': '1'}
    for name in ('phantoms:24', 'layout:siim'):
        both = [subprocess.Popen([sys.executable, '-c', MAKE, name], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        found = [process.communicate(timeout=300) for process in both]
        assert [process.returncode for process in both] == [0, 0], found
        assert found[0][0].splitlines()[-1] == found[1][0].splitlines()[-1]


def test_a_waiting_process_says_so(tmp_path, monkeypatch, capsys):
    import threading
    from filelock import FileLock
    monkeypatch.setattr(settings, 'output_root', tmp_path)
    (tmp_path/'stores').mkdir()
    held = threading.Event()
    def hold():
        with FileLock(tmp_path/'stores'/'.phantoms_4_64_7.lock'): held.set(); time.sleep(2.5)
    other = threading.Thread(target=hold); other.start(); held.wait()
    assert len(find_store('phantoms:4', 64)) == 4
    other.join()
    assert 'waiting' in capsys.readouterr().out


def test_words_joined_are_one_store(tmp_path, monkeypatch):
    import pytest
    from g2d.settings import G2DError
    monkeypatch.setattr(settings, 'output_root', tmp_path)
    both = find_store('phantoms:4+layout:siim', 64, n=6)
    assert len(both) == 10 and both.images.shape == (10, 64, 64) and len(both.shards) == 2
    with pytest.raises(G2DError, match='in more than one shard'): find_store('phantoms:4+phantoms:4', 64)


def test_folds_of_the_shared_sets_keep_a_patient_on_one_side(tmp_path, monkeypatch, data_root):
    "A pre-training on the pairs of a fold has not seen the test patients of any set of that fold, and each film is tested once."
    import pytest
    from g2d.data.splits import check_disjoint, fingerprints
    from g2d.settings import G2DError
    monkeypatch.setattr(settings, 'output_root', tmp_path); monkeypatch.setattr(settings, 'data_root', data_root)
    tested = []
    for fold in (1, 2, 3):
        covid, pairs = find_store(f'real:covid:{fold}/3', 32), find_store(f'real:pairs:{fold}/3', 32)
        check_disjoint(covid.index)
        trained = set(fingerprints(pairs.select('train').index)) | set(fingerprints(pairs.select('val').index))
        assert trained and not trained & set(fingerprints(covid.select('test').index))
        tested += covid.select('test').index['image_id'].tolist()
    assert sorted(tested) == sorted(covid.index['image_id'])
    for word, said in (('real:covid:2', 'names no fold'), ('real:covid:4/3', 'Fold 4 of 3'), ('real:nothing:1/3', 'There is no store "real:nothing"')):
        with pytest.raises(G2DError, match=said): find_store(word, 32)
