"""Make a store from Open-I: see README.md beside this file.

    python data_prep/open_i/prepare.py NLMCXR_reports.tgz NLMCXR_png --out outputs/stores/open_i
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import check_counts, prepare


def main():
    "Read the arguments, prepare, say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', nargs='+', help='NLMCXR_reports.tgz or ecgen-radiology, and the folder of films')
    p.add_argument('--out', help='folder of the store')
    p.add_argument('--check', action='store_true', help='only compare the counts with the published ones')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--split', help='which split fills the column split')
    p.add_argument('--sections', nargs='+', help='sections of the text, in order; findings impression if not given')
    p.add_argument('--views', choices=['all', 'frontal'], help='frontal needs --views-table')
    p.add_argument('--views-table', help='a table that tells the view of a film')
    p.add_argument('--annotation', help='annotation.json of R2Gen, for the split as_r2gen')
    p.add_argument('--reports-table', help='also write the texts of all reports here')
    a = p.parse_args()
    if not (a.out or a.check or a.reports_table): p.error('--out is needed, or --check')
    source = a.source if len(a.source) > 1 else a.source[0]
    options = {name: value for name in ('sections', 'views', 'views_table', 'annotation') if (value := getattr(a, name)) not in (None, False)}
    try:
        if a.reports_table:
            from g2d.data.sets.open_i import write_reports
            write_reports(source, a.reports_table, a.sections or ('findings', 'impression'))
        if a.check:
            table = check_counts('open_i', source, **options)
            print(table.to_string(index=False))
            sys.exit(int((table['verdict'] == 'DIFFERS').any()))
        if not a.out: return
        store = prepare('open_i', source, a.out, size=a.size, how=a.how, workers=a.workers, split=a.split, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
