"""Make a store from Object-CXR: see README.md beside this file.

    python data_prep/object_cxr/prepare.py object-CXR --out outputs/stores/object_cxr
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import check_counts, prepare


def main():
    "Read the arguments, prepare (or check the counts), say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', help='folder of the unpacked data set')
    p.add_argument('--out', help='folder of the store')
    p.add_argument('--check', action='store_true', help='compare counts with the published ones, and decode nothing')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--split', help='split that fills the column split: fixed (if not given), as_paper, as_mgca, official; all of them are stored')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--masks', default='shapes', choices=['shapes', 'none'], help='filled shapes as masks')
    a = p.parse_args()
    options = dict(masks=a.masks)
    if not a.check and not a.out: p.error('--out is needed, unless --check is given')
    try:
        if a.check: print(check_counts('object_cxr', a.source, **options).to_string(index=False)); return
        store = prepare('object_cxr', a.source, a.out, size=a.size, how=a.how, split=a.split, workers=a.workers, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
