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
