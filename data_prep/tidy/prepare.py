"""Make a store from your own table of films (CSV, TSV or parquet): see README.md beside this file.

    python data_prep/tidy/prepare.py films.csv --out outputs/stores/mine --column image=path --column text=report
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import parse_options, prepare


def main():
    "Read the arguments, prepare, say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', nargs='+', help='one table, or several that go into one store')
    p.add_argument('--out', required=True, help='folder of the store')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--column', action='append', default=[], metavar='OURS=YOURS', help='map a column, e.g. image=path (repeatable)')
    p.add_argument('--mask', action='append', default=[], metavar='LABEL=COLUMN', help='a column of mask paths, e.g. lung=lung_mask (repeatable)')
    p.add_argument('--option', action='append', default=[], metavar='NAME=VALUE', help='other options, e.g. report=true (repeatable)')
    a = p.parse_args()
    try:
        options = parse_options('tidy', [f'columns.{word}' for word in a.column] + [f'masks.{word}' for word in a.mask] + a.option)
        store = prepare('tidy', a.source if len(a.source) > 1 else a.source[0], a.out, size=a.size, how=a.how, workers=a.workers, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
