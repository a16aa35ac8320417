"""Make a store from PadChest: see README.md beside this file.

    python data_prep/padchest/prepare.py PadChest --out outputs/stores/padchest
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import prepare


def main():
    "Read the arguments, prepare, say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', help='folder with the label table and the films')
    p.add_argument('--out', required=True, help='folder of the store')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--split', help='fixed or as_kad; the set\'s own choice if not given')
    p.add_argument('--views', choices=['frontal', 'pa', 'lateral', 'all'], help='PA, AP and AP_horizontal (default), PA only, lateral or all')
    p.add_argument('--labelled', choices=['all', 'physician'], help='all films (default) or those labelled by physicians')
    p.add_argument('--report', action='store_true', default=None, help='take the report (Spanish, stemmed) as text')
    a = p.parse_args()
    options = {name: value for name, value in dict(views=a.views, labelled=a.labelled, report=a.report).items() if value is not None}
    try: store = prepare('padchest', a.source, a.out, size=a.size, how=a.how, workers=a.workers, split=a.split, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
