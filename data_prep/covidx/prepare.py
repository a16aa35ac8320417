"""Make a store from COVIDx: see README.md beside this file.

    python data_prep/covidx/prepare.py COVIDx --out outputs/stores/covidx
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import prepare


def main():
    "Read the arguments, prepare, say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', help='folder with the lists and the folders train, test (and val)')
    p.add_argument('--out', required=True, help='folder of the store')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--split', help='official, fixed or as_mgca; the set\'s own choice if not given')
    p.add_argument('--version', help='9A, 8B, CXR-3A, CXR-4, ... where lists of several versions lie there')
    a = p.parse_args()
    options = {name: value for name, value in dict(version=a.version).items() if value is not None}
    try: store = prepare('covidx', a.source, a.out, size=a.size, how=a.how, workers=a.workers, split=a.split, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
