"""Make a store from VQA-RAD: see README.md beside this file.

    python data_prep/vqa_rad/prepare.py VQA_RAD --out outputs/stores/vqa_rad
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import check_counts, prepare


def main():
    "Read the arguments, prepare, say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', help='folder of the public JSON and VQA_RAD Image Folder')
    p.add_argument('--out', help='folder of the store')
    p.add_argument('--check', action='store_true', help='only compare the counts with the published ones')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--split', help='which split fills the column split')
    p.add_argument('--organ', choices=['chest', 'head', 'abd', 'all'], help='chest if not given')
    p.add_argument('--text', choices=['all', 'train', 'none'], help='train: without test questions')
    p.add_argument('--rephrased', dest='rephrased_too', action='store_true', help='add the other wordings of training questions')
    a = p.parse_args()
    if not (a.out or a.check): p.error('--out is needed, or --check')
    options = {name: value for name in ('organ', 'text', 'rephrased_too') if (value := getattr(a, name)) not in (None, False)}
    try:
        if a.check:
            table = check_counts('vqa_rad', a.source, **options)
            print(table.to_string(index=False))
            sys.exit(int((table['verdict'] == 'DIFFERS').any()))
        if not a.out: return
        store = prepare('vqa_rad', a.source, a.out, size=a.size, how=a.how, workers=a.workers, split=a.split, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
