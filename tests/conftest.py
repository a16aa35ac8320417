"Fixtures of all tests: where the real data lies, and a clean state of the random generators, torch and matplotlib for each test."
import os, random, sys
from pathlib import Path
import pytest

os.environ['MPLBACKEND'] = 'Agg'                      # before anything imports matplotlib
os.environ.setdefault('HF_HUB_OFFLINE', '1')          # no test may wait for a network
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # spinning threads make a busy machine many times slower


@pytest.fixture(scope='session')
def data_root():
    "Folder of the real data sets (G2D_DATA, or data_root in settings.ini); the test is skipped where there is none."
    from g2d.settings import load_settings
    root = load_settings(Path(__file__).parent).data_root
    if root is None: pytest.skip('no real data: set G2D_DATA or data_root in settings.ini')
    if not root.is_dir(): pytest.skip(f'no real data: {root} is not a folder')
    return root


def _reset():
    "Seeds and, where torch is in use already, its global state. Torch is never imported from here."
    random.seed(0)
    if numpy := sys.modules.get('numpy'): numpy.random.seed(0)
    if torch := sys.modules.get('torch'):
        if not hasattr(torch, 'set_grad_enabled'): return    # half imported after a failure
        torch.manual_seed(0)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1 if 'PYTEST_XDIST_WORKER' in os.environ else min(2, os.cpu_count() or 1)) # a worker a core


@pytest.fixture(autouse=True)
def clean_state():
    "The same seeds and torch settings before each test; figures are closed and the working folder restored after it."
    folder = os.getcwd()
    _reset()
    yield
    os.chdir(folder)
    if pyplot := sys.modules.get('matplotlib.pyplot'): pyplot.close('all')
    if threads := sys.modules.get('g2d.threads'): threads.give_back_memory()    # a worker of 1,000 tests held 6 GB without
