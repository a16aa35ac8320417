"""Make a store from VinDr-CXR (PhysioNet) or VinBigData (Kaggle): see README.md beside this file.

    python data_prep/vindr_cxr/prepare.py vindr-cxr/1.0.0 --out outputs/stores/vindr_cxr
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import prepare


def main():
    "Read the arguments, prepare, say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', help='folder with annotations, train and test (PhysioNet), or with train.csv and train (Kaggle)')
    p.add_argument('--out', required=True, help='folder of the store')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--split', help='official, fixed, as_cxr_clip or as_benchx; the set\'s own choice if not given')
    p.add_argument('--vote', choices=['any', 'majority'], help='a label is positive when any reader gave it (default), or the majority')
    p.add_argument('--boxes', choices=['merged', 'readers'], help='one box a finding (default), or every box as it was drawn')
    a = p.parse_args()
    options = {name: value for name, value in dict(vote=a.vote, boxes=a.boxes).items() if value is not None}
    try: store = prepare('vindr_cxr', a.source, a.out, size=a.size, how=a.how, workers=a.workers, split=a.split, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
