"""Make a store from the SIIM-ACR Pneumothorax Segmentation challenge (stage 1): see README.md beside this file.

    python data_prep/siim/prepare.py siim-acr-pneumothorax --out outputs/stores/siim
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
    p.add_argument('--split', help='split that fills the column split: fixed (if not given), as_paper, as_mgca (leaks); all of them are stored')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--side', type=int, default=1024, help='height and width of the films, where a mirror made them smaller')
    p.add_argument('--headers', action='store_true', help='read view, age and sex from the DICOM headers')
    a = p.parse_args()
    options = dict(side=a.side, headers=a.headers)
    if not a.check and not a.out: p.error('--out is needed, unless --check is given')
    try:
        if a.check: print(check_counts('siim', a.source, **options).to_string(index=False)); return
        store = prepare('siim', a.source, a.out, size=a.size, how=a.how, split=a.split, workers=a.workers, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
