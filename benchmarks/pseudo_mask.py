"""Speed of the pseudo-mask processor against (a) a plain scikit-image loop over films and (b) the released processor.

    python benchmarks/pseudo_mask.py [--threads 2] [--batch 64] [--size 256] [--heads 4] [--repeats 9] [--loop-films 8] [--device cpu]

(a) does all steps of the paper film by film with scikit-image, scipy and numpy, same choices as `PseudoMask()`.
(b) does what the released code does (`as_released`): head mean, nearest resize, np.quantile, `>`; no body, no smoothing.
They run one after the other in every repeat, so that a busy machine slows all of them; medians of wall-clock time are printed, and
of processor time (all threads of the process), which other programs disturb less; with `--threads 1` the two agree on an idle machine. (a) is timed
on `--loop-films` films a repeat and scaled up, since its cost is the same for every film."""
import argparse, json, os, platform, sys, time
import numpy as np, torch
from g2d.pseudo_mask import PseudoMask


def plain_film(attention, film, q=.85, window=9, sigma_color=1., sigma_space=3.):
    "All steps of the paper for one film: [heads, h, w] and [H, W] -> [H, W]."
    from scipy.ndimage import binary_fill_holes
    from skimage.filters import threshold_otsu
    from skimage.restoration import denoise_bilateral
    from skimage.transform import resize
    scores = resize(attention.mean(0), film.shape, order=1, mode='edge', anti_aliasing=False)
    grey = np.round(255*film).astype(np.uint8)
    body = binary_fill_holes(grey > threshold_otsu(grey[grey > 0])//2)
    scores = scores*body
    kept = (scores >= np.quantile(scores, q)) & body
    return denoise_bilateral(kept.astype(np.float32), win_size=window, sigma_color=sigma_color, sigma_spatial=sigma_space, mode='reflect')


def released(attention):
    "What the released processor computes, with the same libraries: torchvision's nearest resize and numpy."
    from torchvision.transforms import Resize, InterpolationMode
    scores = Resize((SIZE, SIZE), interpolation=InterpolationMode.NEAREST)(attention.detach().cpu().sum(1)/attention.shape[1]).numpy()
    threshold = np.quantile(scores, .85, axis=(1, 2), keepdims=True)
    above = scores > threshold
    scores[above], scores[~above] = 1, 0
    return torch.tensor(scores[:, None])


def films_and_attention(n, size, heads):
    "Phantoms (32 different ones) and random attention maps."
    from g2d.data.phantom import phantom
    films = torch.stack([torch.from_numpy(phantom(seed, size).image) for seed in range(min(n, 32))])[:, None]/255
    attention = (2*torch.randn(n, heads, 64, generator=torch.manual_seed(0))).softmax(-1).view(n, heads, 8, 8)
    return attention, films.repeat(-(-n//len(films)), 1, 1, 1)[:n].contiguous()


def seconds(work, cuda=False):
    if cuda: torch.cuda.synchronize()
    start = time.perf_counter(), time.process_time(); work()
    if cuda: torch.cuda.synchronize()
    return np.array([time.perf_counter() - start[0], time.process_time() - start[1]])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(threads=2, batch=64, size=256, heads=4, repeats=9, loop_films=8).items(): parser.add_argument('--' + name.replace('_', '-'), type=int, default=default)
    parser.add_argument('--device', default='cpu')
    a = parser.parse_args()
    SIZE = a.size
    torch.set_num_threads(a.threads)
    attention, films = films_and_attention(a.batch, a.size, a.heads)
    processor, reduced = PseudoMask(), PseudoMask.as_released()
    on = [x.to(a.device) for x in (attention, films)]
    k = min(a.loop_films, a.batch)
    works = {'g2d, all steps of the paper': lambda: processor(*on), 'g2d, as_released': lambda: reduced(*on), '(b) released processor': lambda: released(attention),
             f'(a) scikit-image loop, {k} films scaled to {a.batch}': lambda: [plain_film(x, f[0]) for x, f in zip(attention[:k].numpy(), films[:k].numpy())]}
    for work in works.values(): work()
    times = {name: [] for name in works}
    for _ in range(a.repeats):
        for name, work in works.items(): times[name].append(seconds(work, a.device != 'cpu')*(a.batch/k if name.startswith('(a)') else 1))
    median = {name: np.median(t, axis=0) for name, t in times.items()}
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if os.path.exists('/proc/cpuinfo') else platform.processor()
    print(f'python {" ".join(sys.argv)}\n{cpu}, {os.cpu_count()} cores, {a.threads} threads, torch {torch.__version__}, device {torch.cuda.get_device_name() if a.device.startswith("cuda") else "cpu"}')
    print(f'batch {a.batch}, attention 8x8 x {a.heads} heads, films {a.size}x{a.size}; medians of {a.repeats} repeats')
    for name, (wall, processor_time) in median.items(): print(f'{1e3*wall:8.1f} ms wall {1e3*processor_time:8.1f} ms processor  {name}')
    full, b, loop = (median[next(n for n in works if n.startswith(s))] for s in ('g2d, all', '(b)', '(a)'))
    for i, kind in enumerate(('wall', 'processor')):
        print(json.dumps({'time': kind, 'times_faster_than_scikit_image_loop': round(loop[i]/full[i], 1), 'times_faster_than_released': round(b[i]/full[i], 2)}))
