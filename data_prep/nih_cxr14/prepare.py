"""Make a store from NIH ChestX-ray14: see README.md beside this file.

    python data_prep/nih_cxr14/prepare.py ChestX-ray14 --out outputs/stores/nih_cxr14
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import prepare


def main():
    "Read the arguments, prepare, say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', help='folder with Data_Entry_2017_v2020.csv')
    p.add_argument('--out', required=True, help='folder of the store')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--split', help='official, fixed, as_paper, as_cxr_clip or as_mrm; the set\'s own choice if not given')
    p.add_argument('--side', type=int, help='side of your copies in pixels, if they were resized (default 1024)')
    p.add_argument('--mrm-lists', help='folder with train_list.txt, val_list.txt and test_list.txt of MRM')
    a = p.parse_args()
    options = {name: value for name, value in dict(side=a.side, mrm_lists=a.mrm_lists).items() if value is not None}
    try: store = prepare('nih_cxr14', a.source, a.out, size=a.size, how=a.how, workers=a.workers, split=a.split, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
