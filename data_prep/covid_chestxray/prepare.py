"""Make a store from the COVID-19 image data collection: see README.md beside this file.

    python data_prep/covid_chestxray/prepare.py covid-chestxray-dataset --out outputs/stores/covid_chestxray
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import prepare


def main():
    "Read the arguments, prepare, say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', help='folder of the cloned repository')
    p.add_argument('--out', required=True, help='folder of the store')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--frontal', action='store_true', help='only PA, AP and AP Supine')
    p.add_argument('--lungvae', action='store_true', help='take the lung masks of annotations/lungVAE-masks (output of a model)')
    a = p.parse_args()
    try: store = prepare('covid_chestxray', a.source, a.out, size=a.size, how=a.how, workers=a.workers, frontal=a.frontal, lungvae=a.lungvae)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
