"""Images a second: store + batched augmentation against per-image PIL transforms of the released kind, in one run.

    python benchmarks/loading.py                     # two cores: 1,024 images of 256 x 256, batch 64
    python benchmarks/loading.py --device cuda --processes 8

Both sides read the same uint8 array and deliver the same tensors on the device. The reference is what
cheliu-computation/G2D-NeurIPS24 does (PRETRAIN/utils/dataset.py): np.load memory map, Image.fromarray(...).convert("RGB"), the
torchvision transforms, a DataLoader with N processes (without the copy of the raw image that it returns beside it, which would
only slow it down). Ours is `PairLoader` + `Augment`, with N compute threads on the CPU. The sides take turns, `--rounds` times; the
median counts. Four rows a case: "PIL, 3 channels" is the released kind and the measure of the factors; "PIL, 1 channel" is kinder than the
released code and keeps one channel until the end; "to the encoder" is what our encoder takes, [B, 1, H, W] in [0, 1]; "same tensor" goes on to
the reference's three normalised channels (in a buffer that is used again). Ends with status 1 where a factor "to the encoder" is under 5.
"""
import argparse, os, platform, sys, tempfile, time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np, pandas as pd, torch
from PIL import Image

from g2d.data.loading import Augment, PairLoader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_store(folder, n, size):
    "A phantom store, or (where g2d.data.phantom is absent) smooth random images under the same interface."
    try:
        from g2d.data.phantom import make_phantom_store
        base = make_phantom_store(folder/'store', min(n, 256), size=size, seed=0)
        kind, pixels = 'phantoms', np.asarray(base.images)
    except ImportError:
        noise = torch.rand(min(n, 256), 1, 12, 12, generator=torch.Generator().manual_seed(0))
        kind, pixels = 'smooth random images', (torch.nn.functional.interpolate(noise, (size, size), mode='bicubic').clamp(0, 1)*255).byte()[:, 0].numpy()
    out = np.lib.format.open_memmap(folder/'images.npy', mode='w+', dtype=np.uint8, shape=(n, size, size))
    for i in range(0, n, len(pixels)): out[i:i + len(pixels)] = pixels[:n - i]     # repeated: the content does not matter for speed
    out.flush()
    index = pd.DataFrame(dict(text=pd.array(['No acute findings.']*n, dtype='string'), split=pd.array(['train']*n, dtype='string')))
    return kind, SimpleNamespace(images=np.load(folder/'images.npy', mmap_mode='r'), index=index)


class PerImage(torch.utils.data.Dataset):
    "The released data set: one memory map, PIL, transforms of torchvision."
    def __init__(self, store, name, channels):
        from torchvision import transforms as T
        chains = dict(as_released=[T.CenterCrop(256), T.RandomAffine(degrees=15, shear=15), T.ColorJitter(brightness=0.2, contrast=0.2), T.ToTensor()],
                      as_paper=[T.Resize(256), T.CenterCrop(224), T.RandomGrayscale(), T.RandomPerspective(), T.RandomAutocontrast(), T.ToTensor()])
        if channels == 1: chains['as_paper'].pop(2)    # grayscale: nothing to do
        last = [T.Lambda(three)] if channels == 1 else []
        if name == 'as_released': last.append(T.Normalize(MEAN, STD))
        self.images, self.texts, self.mode, self.transform = store.images, store.index['text'].tolist(), 'RGB' if channels == 3 else 'L', T.Compose(chains[name] + last)
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return dict(image=self.transform(Image.fromarray(self.images[i]).convert(self.mode)), raw_text=self.texts[i])


def three(x): return x.expand(3, -1, -1)


def reference_epoch(loader, device):
    n = 0
    for batch in loader: n += len(batch['image'].to(device, non_blocking=True))
    if device != 'cpu': torch.cuda.synchronize()
    return n


def our_epoch(loader, augment, device, same=None):
    "Until the encoder's input, [b, 1, h, w] in [0, 1]; `same` (buffer, scale, shift) goes on to the reference's tensor of three channels."
    n = 0
    for batch in loader:
        x, _ = augment(batch.images.to(device, non_blocking=True), batch.global_step)
        if same is not None:
            buffer, scale, shift = same
            for i in range(0, len(x), 2):                                        # in pieces that fit the cache
                if scale is None: buffer[i:i + 2] = x[i:i + 2]
                else: torch.mul(x[i:i + 2], scale, out=buffer[i:i + 2]).sub_(shift)
        n += len(x)
    if device != 'cpu': torch.cuda.synchronize()
    return n


def channels_and_scale(name, batch_size, size, device):
    "A buffer for three channels, and scale and shift of `Normalize` (as_paper has none)."
    buffer = torch.empty(batch_size, 3, size, size, device=device)
    if name != 'as_released': return buffer, None, None
    mean, std = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return buffer, 1/std, mean/std


def read_epoch(loader): return sum(len(batch) for batch in loader)


def through_processes(loader, workers):
    "The same batches through the processes of a DataLoader instead of threads."
    class Steps(torch.utils.data.Dataset):
        def __len__(self): return len(loader)
        def __getitem__(self, step): return loader.batch(0, step).images
    return torch.utils.data.DataLoader(Steps(), batch_size=None, num_workers=workers, persistent_workers=True)


def rates(contestants, rounds):
    "For each contestant (images a second of each round, CPU milliseconds an image in this process); they take turns."
    seen, cpu = ({name: [] for name in contestants} for _ in range(2))
    for run in contestants.values(): run()                                       # start workers, fill caches
    for _ in range(rounds):
        for name, run in contestants.items():
            start, busy = time.perf_counter(), time.process_time()
            n = run()
            seen[name].append(n/(time.perf_counter() - start))
            cpu[name].append((time.process_time() - busy)/n*1e3)
    return {name: (seen[name], median(cpu[name])) for name in contestants}


OURS, SAME = 'g2d, to the encoder', 'g2d, same tensor'

def compare(store, name, processes, arguments):
    "One recipe with a number of processes: prints a row for each side; returns the factors (to the encoder, same tensor)."
    torch.set_num_threads(max(1, processes))
    device, size = arguments.device, {'as_released': 256, 'as_paper': 224}[name]
    sets = {f'PIL, {c} channel{"s" if c > 1 else ""}': PerImage(store, name, c) for c in (3, 1)}
    loader = lambda data: torch.utils.data.DataLoader(data, arguments.batch_size, shuffle=True, drop_last=True, num_workers=processes if processes > 1 else 0,
                                                      persistent_workers=processes > 1, pin_memory=device != 'cpu')
    theirs = {side: (lambda l=loader(data): reference_epoch(l, device)) for side, data in sets.items()}
    pairs, augment, same = PairLoader(store, arguments.batch_size, workers=1 if processes > 1 else 0), Augment(name, size), channels_and_scale(name, arguments.batch_size, size, device)
    found = rates({**theirs, OURS: lambda: our_epoch(pairs, augment, device), SAME: lambda: our_epoch(pairs, augment, device, same)}, arguments.rounds)
    released, released_cpu = median(found['PIL, 3 channels'][0]), found['PIL, 3 channels'][1]
    for side, (values, cpu) in found.items():
        work = f'{cpu:6.2f} ms CPU an image ({released_cpu/cpu:4.1f} x less)' if processes == 1 and device == 'cpu' else ''
        print(f'{name:12} {processes:2d} process{"es" if processes > 1 else "  "}  {side:19} {median(values):7.0f} images/s ({min(values):.0f} to {max(values):.0f})  {median(values)/released:5.1f} x  {work}', flush=True)
    return median(found[OURS][0])/released, median(found[SAME][0])/released


def reading(store, arguments):
    "What reading alone costs, and what is best at it."
    plain = PairLoader(store, arguments.batch_size)
    contestants = {'no worker': lambda: read_epoch(plain)}
    for workers in (1, 2): contestants[f'{workers} thread{"s" if workers > 1 else ""}'] = lambda l=PairLoader(store, arguments.batch_size, workers=workers): read_epoch(l)
    contestants['2 processes'] = lambda l=through_processes(plain, 2): read_epoch(l)
    for side, (values, _) in rates(contestants, arguments.rounds).items(): print(f'reading only, {side:12} {median(values):8.0f} images/s', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=1024)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--processes', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--device', default='cpu')
    arguments = parser.parse_args()
    gpu = f', {torch.cuda.get_device_name()}' if arguments.device != 'cpu' else ''
    cpu = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')), platform.processor()) if os.path.exists('/proc/cpuinfo') else platform.processor()
    print(f'$ python {" ".join(sys.argv)}\n{cpu}, {len(os.sched_getaffinity(0))} cores{gpu}; Python {platform.python_version()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}')
    with tempfile.TemporaryDirectory() as folder:
        kind, store = make_store(Path(folder), arguments.images, 256)
        print(f'{arguments.images} {kind} of 256 x 256, batch {arguments.batch_size}, medians of {arguments.rounds} rounds')
        found = {(name, processes): compare(store, name, processes, arguments) for name in ('as_released', 'as_paper') for processes in arguments.processes}
        reading(store, arguments)
    for i, side in enumerate((OURS, SAME)):
        print(f'{side} against PIL, 3 channels: ' + ', '.join(f'{name} with {processes}: {both[i]:.1f} x' for (name, processes), both in found.items()))
    print('wanted: at least 5 x, to the encoder (which brings one channel into the form of its first convolution itself)')
    return 0 if min(both[0] for both in found.values()) >= 5 else 1


if __name__ == '__main__': sys.exit(main())
