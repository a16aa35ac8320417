"""Linear probes with features computed once, against running the frozen encoder again in every epoch: the same probes, in one run.

    python benchmarks/linear_probe.py                                  # 600 phantoms of 128 x 128, 1/10/100 %, 5 seeds: about an hour on two cores
    python benchmarks/linear_probe.py --small                          # 120 phantoms of 64 x 64, 2 seeds: a minute or two
    python benchmarks/linear_probe.py --store DIR --start RUN --device cuda

The encoder comes from one checkpoint for all seeds and fractions, as in any comparison of a pre-training (with `--start random` a checkpoint of random weights is written: times are the same).
Both sides call `g2d.tasks.classification.finetune`: same protocol, films, order, seeds, and `cache` on or off. "Computed once" starts with nothing in memory
and no file; its time holds the encoder's one pass over the films. "In every epoch" runs the encoder for each training batch, for the validation films in each
validation, and for the test films at the end, as MGCA's code does. Intervals and curves are left out on both sides (`draws=0`). The sides take turns, so that a
busy machine slows both. Times are those of whole probes, with building the network;
the mean and spread of training features, which both need for their scale, are found in memory by the second. Ends with status 1 where the factor is under 20 or an AUROC differs by more than 1e-4."""
import argparse, json, sys, tempfile, time
from pathlib import Path
import numpy as np, torch
from g2d.bench import machine
from g2d.checkpoint import Checkpoint
from g2d.data.store import RadiographStore
from g2d.data.phantom import make_phantom_store
from g2d.models.g2d import G2D
from g2d.profiles import profile
from g2d.settings import G2DError
from g2d.tasks import classification
from g2d.tasks.protocols import protocol
from g2d.tasks.training import find_start


def probe(store, start, p, fraction, seed, device, cache):
    "Seconds and AUROCs of one probe."
    if device != 'cpu': torch.cuda.synchronize()
    began = time.perf_counter()
    r = classification.finetune(store, start, p, fraction, seed, device=device, cache=cache, draws=0)
    if device != 'cpu': torch.cuda.synchronize()
    return time.perf_counter() - began, {m: v for m, v in r.metrics.items() if m.split('/')[0] == 'auroc'}, r.about


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--small', action='store_true', help='120 phantoms of 64 x 64, two seeds, 20 epochs')
    parser.add_argument('--store', default='', help='folder of a store with labels; phantoms are made where none is given')
    parser.add_argument('--start', default='random', help='random, a checkpoint or a weights file')
    parser.add_argument('--network', default='resnet18'); parser.add_argument('--films', type=int, default=600); parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--fractions', default='0.01,0.1,1'); parser.add_argument('--seeds', type=int, default=5); parser.add_argument('--epochs', type=int, default=50)
    parser.add_argument('--threads', type=int, default=2); parser.add_argument('--device', default='cpu')
    a = parser.parse_args()
    if a.small: a.films, a.size, a.seeds, a.epochs = 120, 64, 2, 20
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = RadiographStore.open(a.store) if a.store else make_phantom_store(Path(folder)/'store', a.films, size=a.size, seed=7, split=dict(train=.7, val=.1, test=.2))
        p = profile('demo', image_encoder=a.network, pretrained=False, image_size=a.size, crop_size=a.size, text_encoder='tiny', frozen_layers=0, text_pool='cls')
        if a.start == 'random':
            torch.manual_seed(0)
            a.start = Path(folder)/'random.safetensors'
            Checkpoint.of(G2D(p)).save(a.start)
        start = find_start(a.start, p)
        rows, skipped = [], []
        probe(store, start, protocol('linear', 'demo', epochs=1), 1., 0, a.device, False) # imports, first use of kernels
        classification._kept.clear()                                                     # nothing is known when the clock starts
        for fraction in map(float, a.fractions.split(',')):
            for seed in range(a.seeds):
                p = protocol('linear', 'demo', fraction=fraction, epochs=a.epochs, patience=a.epochs) # no early end: the same number of epochs for all
                try: (once, cached, about), (again, live, _) = probe(store, start, p, fraction, seed, a.device, True), probe(store, start, p, fraction, seed, a.device, False)
                except G2DError as error: skipped.append(f'{fraction:g}, seed {seed}: {error}'); continue
                rows.append((fraction, once, again, max(abs(cached[m] - live[m]) for m in live), cached['auroc'], about['train_films']))
                print(f'{fraction:6g} of the films ({about["train_films"]}), seed {seed}: computed once {once:7.2f} s, in every epoch {again:8.2f} s, AUROC {cached["auroc"]:.4f}, largest difference of an AUROC {rows[-1][3]:.1e}', flush=True)
    for line in skipped: print('not possible:', line)
    if not rows: sys.exit('no probe was possible')
    table = np.array(rows)
    print(f'\npython {" ".join(sys.argv)}\n{machine(a.device)}')
    for fraction in np.unique(table[:, 0]):
        part = table[table[:, 0] == fraction]
        print(f'{fraction:6g} of the films, {len(part)} seeds: {part[:, 1].sum():.1f} s against {part[:, 2].sum():.1f} s, {part[:, 2].sum()/part[:, 1].sum():.0f} times')
    factor, difference = table[:, 2].sum()/table[:, 1].sum(), table[:, 3].max()
    print(json.dumps(dict(probes=len(rows), computed_once_s=round(table[:, 1].sum(), 1), every_epoch_s=round(table[:, 2].sum(), 1), times_faster=round(factor, 1), largest_auroc_difference=float(difference))))
    sys.exit(0 if factor >= 20 and difference <= 1e-4 else 1)


if __name__ == '__main__': main()
