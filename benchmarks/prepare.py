"""Preparation of JPEG films: does time grow linearly, does memory stay flat, and what does it cost beyond decoding?

    python benchmarks/prepare.py                          # 2,000, then 8,000 films of 1,500 x 1,800 pixels, 2 workers: about 15 minutes on two quiet cores
    python benchmarks/prepare.py --films 100              # 100, then 400: a quick try
    python benchmarks/prepare.py --csv results/prepare.csv

60 different phantom films are enlarged, given grain until a JPEG has the size of a real one, and linked under as many names as
needed (so the files come from the disk cache: this measures decoding, not the disk). Three sides, in the same run:

  ours       `prepare("tidy", ...)` in a process of its own, with its start, checks, hashes, manifest, rejected.csv; side 256, how="pad"
  bare       as many processes that only do Image.open(path).convert("L").resize(...) to the same size with the same filter (no draft mode)
  released   one process of the kind of cheliu-computation/G2D-NeurIPS24 ext_data.py: crop, stretch, skimage resize, and np.save of the
             whole array inside the loop. Run for a few films on an array of the full length; the time for all films is extrapolated

Memory is the largest sum of PSS (shared pages counted once) over the process and its workers, read four times a second from /proc;
the sum of RSS, which counts shared pages once for each process, stands beside it. Wanted: time ratio of the two sizes at most 4.4,
memory under 600 MB, at least 0.8 of the bare speed. The shares of CPU time stand beside the speed, because they hold on a busy machine too. Ends with status 1 where one is missed.
"""
import argparse, csv, os, resource, subprocess, sys, tempfile, threading, time
for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image
from g2d.bench import machine

HEIGHT, WIDTH, SIDE = 1800, 1500, 256


def write_films(folder, n, different=60, seed=0):
    "n JPEG films and their table; returns the table and the mean size of a file in bytes."
    from g2d.data.phantom import phantom
    rng = np.random.default_rng(seed)
    (folder/'films').mkdir()
    for k in range(min(n, different)):
        film = np.asarray(Image.fromarray(phantom(seed, 300, k).image[:, 25:275]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        film += rng.normal(0, 3.6, film.shape).astype(np.float32)
        Image.fromarray(np.clip(film, 0, 255).astype(np.uint8)).save(folder/'films'/f'{k}.jpg', quality=90)
    size = mean(path.stat().st_size for path in (folder/'films').iterdir())
    for k in range(different, n):
        try: os.link(folder/'films'/f'{k % different}.jpg', folder/'films'/f'{k}.jpg')
        except OSError: (folder/'films'/f'{k}.jpg').write_bytes((folder/'films'/f'{k % different}.jpg').read_bytes())
    return size


def write_list(folder, n):
    with open(folder/f'list{n}.csv', 'w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(['image', 'patient_id', 'text'])
        rows.writerows([f'films/{k}.jpg', k//2, f'Film {k}. No acute cardiopulmonary findings.'] for k in range(n))
    return folder/f'list{n}.csv'


def tree(pid):
    "A process and its descendants."
    found = [pid]
    for child in found:
        try: found += [int(p) for p in Path(f'/proc/{child}/task/{child}/children').read_text().split()]
        except OSError: pass
    return found


def memory(pid, kind):
    "kB of a process: Pss or Rss."
    try: return next(int(line.split()[1]) for line in open(f'/proc/{pid}/smaps_rollup') if line.startswith(f'{kind}:'))
    except (OSError, StopIteration): return 0


def spent():
    "CPU seconds of the processes that this one has started and that have ended."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def watched(command):
    "Run a command; returns seconds, CPU seconds, and the peaks of PSS and RSS of its process tree in MB."
    peaks, start, cpu = dict(Pss=0, Rss=0), time.perf_counter(), spent()
    process = subprocess.Popen(command)
    def watch():
        while process.poll() is None:
            pids = tree(process.pid)
            for kind in peaks: peaks[kind] = max(peaks[kind], sum(memory(pid, kind) for pid in pids)/1024)
            time.sleep(.25)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    status = process.wait()
    seconds = time.perf_counter() - start
    thread.join()
    if status: sys.exit(f'the preparation ended with status {status}')
    return seconds, spent() - cpu, peaks['Pss'], peaks['Rss']


def ours(folder, n, workers):
    out = folder/f'store{n}'
    call = f'from g2d.data.prepare import prepare; s = prepare("tidy", {str(folder/f"list{n}.csv")!r}, {str(out)!r}, size={SIDE}, workers={workers}, progress=False); assert len(s) == {n}'
    return watched([sys.executable, '-c', call])


def decode(path):
    small = Image.open(path).convert('L').resize((round(WIDTH*SIDE/HEIGHT), SIDE), Image.Resampling.BILINEAR)
    return int(np.asarray(small)[0, 0])


def bare(folder, n, workers):
    "Seconds and CPU seconds for the n films by processes that only decode and resize."
    start, cpu = time.perf_counter(), spent()
    with get_context('fork').Pool(workers) as pool:
        pool.map(decode, [folder/'films'/f'{k}.jpg' for k in range(n)], chunksize=8)
        pool.close(); pool.join()
    return time.perf_counter() - start, spent() - cpu


def released(folder, n, few):
    "Seconds a film when the whole array of n films is saved after each one."
    from skimage import transform
    array = np.zeros((n, SIDE, SIDE), np.uint8)
    start = time.perf_counter()
    for k in range(few):
        film = np.array(Image.open(folder/'films'/f'{k}.jpg'))
        ys, xs = np.nonzero(film)
        film = film[ys.min():ys.max() + 1, xs.min():xs.max() + 1]
        film = (film - film.min())*(1/(film.max() - film.min())*256)
        array[k] = transform.resize(film, (SIDE, SIDE), order=1, preserve_range=True, anti_aliasing=False).astype(np.uint8)
        np.save(folder/'released.npy', array)
    seconds = (time.perf_counter() - start)/few
    (folder/'released.npy').unlink()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--films', type=int, default=2000, help='films of the smaller set; the larger one has four times as many')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--released', type=int, default=20, help='films of the released kind; the rest is extrapolated; 0: leave out')
    parser.add_argument('--folder', help='where the films go (about 1 GB for 2,000); a temporary folder if not given')
    parser.add_argument('--csv', help='also write the figures as a table')
    a = parser.parse_args()
    if not Path('/proc/self/smaps_rollup').exists(): sys.exit('memory is read from /proc/PID/smaps_rollup, which this system does not have')
    print(f'$ python {" ".join(sys.argv)}\n{machine()}', flush=True)
    rows, few, many = [], a.films, 4*a.films
    def say(side, n, seconds, cpu='', pss='', rss='', note=''):
        rows.append(dict(side=side, films=n, workers=a.workers if side != 'released' else 1, seconds=round(seconds, 2), films_per_second=round(n/seconds, 2), cpu_ms_per_film=cpu and round(1000*cpu/n, 2), peak_pss_mb=pss and round(pss), sum_rss_mb=rss and round(rss), note=note))
        print(f'{side:9} {n:6,} films {seconds:9.1f} s {n/seconds:8.1f} films/s' + (f' {1000*cpu/n:6.1f} ms CPU a film' if cpu else '') + (f'  peak memory {pss:4.0f} MB (sum of RSS {rss:4.0f} MB)' if pss else '') + (f'  {note}' if note else ''), flush=True)
        return seconds, cpu
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        folder = Path(folder)
        size = write_films(folder, many)
        print(f'{min(many, 60)} different JPEG films of {WIDTH} x {HEIGHT} pixels, {size/1000:.0f} kB on average; stored at {SIDE} x {SIDE}, {a.workers} workers', flush=True)
        for n in (few, many): write_list(folder, n)
        bare(folder, min(few, 60), a.workers)                                             # fill the disk cache
        plain = [say('bare', few, *bare(folder, few, a.workers))]
        small, *rest = ours(folder, few, a.workers); say('ours', few, small, *rest); peak_small = rest[1]
        large, *rest = ours(folder, many, a.workers); say('ours', many, large, *rest); peak_large, work = rest[1], rest[0]/many
        plain.append(say('bare', few, *bare(folder, few, a.workers)))
        factor = {}
        for n in (few, many) if a.released else ():
            seconds = released(folder, n, min(a.released, n))
            factor[n] = say('released', n, seconds*n, note=f'extrapolated from {min(a.released, n)} films, one process')[0]/(small if n == few else large)
    ratio, speed, peak = large/small, (many/large)/(few/mean(s for s, _ in plain)), max(peak_small, peak_large)
    figures = [('time ratio of four times the films', ratio, '<= 4.4', ratio <= 4.4), ('peak memory in MB (PSS of all processes)', peak, '< 600', peak < 600),
               ('growth of the peak, larger by smaller set', peak_large/peak_small, '', True), ('speed against bare decoding and resizing (larger set)', speed, '>= 0.8', speed >= .8),
               ('CPU time of bare decoding and resizing as a share of ours (larger set)', mean(c for _, c in plain)/few/work, '', True)]
    figures += [(f'times faster than the released kind, {n:,} films (extrapolated)', f, '', True) for n, f in factor.items()]
    for name, value, wanted, met in figures: print(f'{name}: {value:.2f}' + (f' (wanted {wanted}{"" if met else ": NOT MET"})' if wanted else ''))
    if a.csv:
        from g2d.files import atomic_path
        with atomic_path(a.csv) as temporary, open(temporary, 'w', newline='') as file:
            table = csv.DictWriter(file, [*rows[0]]); table.writeheader(); table.writerows(rows)
            table.writerows(dict(side='figure', note=f'{name}: {value:.3f}') for name, value, *_ in figures)
    return 0 if all(met for *_, met in figures) else 1


if __name__ == '__main__': sys.exit(main())
