"""Make a store from MS-CXR: see README.md beside this file.

    python data_prep/ms_cxr/prepare.py ms-cxr mimic-cxr-jpg/2.0.0 --out outputs/stores/ms_cxr
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import check_counts, prepare


def main():
    "Read the arguments, prepare, say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', nargs='+', help='folder of MS-CXR, and the folder of MIMIC-CXR-JPG')
    p.add_argument('--out', help='folder of the store')
    p.add_argument('--check', action='store_true', help='only compare the counts with the published ones')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--split', help='which split fills the column split')
    p.add_argument('--ending', help='of the films, .jpg if not given')
    p.add_argument('--resized', action='store_true', help='films of a shrunken copy: scale the boxes along')
    a = p.parse_args()
    if not (a.out or a.check): p.error('--out is needed, or --check')
    source = a.source if len(a.source) > 1 else a.source[0]
    options = {name: value for name in ('ending', 'resized') if (value := getattr(a, name)) not in (None, False)}
    try:
        if a.check:
            table = check_counts('ms_cxr', source, **options)
            print(table.to_string(index=False))
            sys.exit(int((table['verdict'] == 'DIFFERS').any()))
        if not a.out: return
        store = prepare('ms_cxr', source, a.out, size=a.size, how=a.how, workers=a.workers, split=a.split, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
