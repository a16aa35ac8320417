"""Images a second of the phantom generator, one core: image, masks, boxes and report.

    python benchmarks/phantom.py [--size 256] [--images 400] [--store]

Prints images/s by CPU time (what one free core gives) and by the wall clock (what this machine gave), the command and the machine. Wanted: 100.
"""
import argparse, os, sys, tempfile, time
for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'
from g2d.bench import machine
from g2d.data.phantom import make_phantom_store, phantom

def measure(size, images, repeats=3):
    "Best of `repeats`: (images/s by CPU time, by wall clock)."
    for i in range(40): phantom(0, size, i) # tiles and vessel trees are made once a process
    best = [0., 0.]
    for k in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        for i in range(images): phantom(k + 1, size, i)
        best = [max(a, images/b) for a, b in zip(best, (time.process_time() - cpu, time.perf_counter() - wall))]
    return best

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, default=256); parser.add_argument('--images', type=int, default=400); parser.add_argument('--store', action='store_true', help='also write a store')
    args = parser.parse_args()
    start = time.perf_counter(); phantom(0, args.size); first = time.perf_counter() - start
    by_cpu, by_wall = measure(args.size, args.images)
    print(f'{by_cpu:.0f} images/s a core by CPU time, {by_wall:.0f} by wall clock (size {args.size}, {args.images} images, best of 3; first image {first:.2f} s)')
    if args.store:
        with tempfile.TemporaryDirectory() as folder:
            cpu, wall = time.process_time(), time.perf_counter()
            make_phantom_store(folder + '/store', args.images, size=args.size, workers=0)
            print(f'store: {args.images/(time.process_time() - cpu):.0f} images/s by CPU time, {args.images/(time.perf_counter() - wall):.0f} by wall clock, one process')
    print(f'command: python {" ".join(sys.argv)}')
    print(f'machine: one core of {machine()}')
