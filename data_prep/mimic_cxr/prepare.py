"""Make a store from MIMIC-CXR: see README.md beside this file.

    python data_prep/mimic_cxr/prepare.py mimic-cxr-jpg/2.0.0 mimic-cxr-reports.zip --out outputs/stores/mimic_cxr
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import check_counts, prepare


def main():
    "Read the arguments, prepare, say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', nargs='+', help='folder of MIMIC-CXR-JPG, and where the reports are')
    p.add_argument('--out', help='folder of the store')
    p.add_argument('--check', action='store_true', help='only compare the counts with the published ones')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--split', help='which split fills the column split')
    p.add_argument('--text', default='sections', choices=['sections', 'priority', 'report', 'none'], help='what becomes the text')
    p.add_argument('--sections', nargs='+', help='sections of the text, in order; findings impression if not given')
    p.add_argument('--rules', choices=['mit_lcp', 'g2d'], help='how a report is divided')
    p.add_argument('--views', nargs='+', help='frontal (default), all, or names of ViewPosition')
    p.add_argument('--labels', choices=['chexpert', 'negbio', 'radiologist', 'none'], help='whose labels')
    p.add_argument('--uncertain', choices=['u_zeros', 'u_ones', 'mgca', 'keep'], help='what an uncertain label becomes')
    p.add_argument('--pairs', action='store_true', help='only films with a text')
    p.add_argument('--held-out', nargs='+', help='lists of films whose patients stay out of the training part of fixed')
    p.add_argument('--ending', help='of the films, .jpg if not given')
    p.add_argument('--sectioned', help='also write the table of sections here')
    p.add_argument('--master', help='also write MGCA\'s master table here')
    a = p.parse_args()
    if not (a.out or a.check or a.sectioned or a.master): p.error('--out is needed, or --check')
    source = a.source if len(a.source) > 1 else a.source[0]
    options = {name: value for name in ('text', 'sections', 'rules', 'views', 'labels', 'uncertain', 'pairs', 'held_out', 'ending') if (value := getattr(a, name)) not in (None, False)}
    try:
        if a.views and len(a.views) == 1: options['views'] = a.views[0]
        if a.sectioned:
            from g2d.data.sets.mimic_cxr import write_sectioned
            write_sectioned(source, a.sectioned)
        if a.master:
            from g2d.data.sets.mimic_cxr import write_master
            write_master(source, a.master)
        if a.check:
            table = check_counts('mimic_cxr', source, **options)
            print(table.to_string(index=False))
            sys.exit(int((table['verdict'] == 'DIFFERS').any()))
        if not a.out: return
        store = prepare('mimic_cxr', source, a.out, size=a.size, how=a.how, workers=a.workers, split=a.split, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
