"""Make a store from CheXpert: see README.md beside this file.

    python data_prep/chexpert/prepare.py CheXpert-v1.0-small --out outputs/stores/chexpert
"""
import argparse, sys
from g2d.settings import G2DError
from g2d.data.prepare import prepare


def main():
    "Read the arguments, prepare, say what came out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', help='folder CheXpert-v1.0 or CheXpert-v1.0-small, or the one above it')
    p.add_argument('--out', required=True, help='folder of the store')
    p.add_argument('--size', type=int, default=256, help='side of the stored images in pixels')
    p.add_argument('--how', default='pad', choices=['pad', 'stretch', 'crop'], help='how a film is fitted into the square')
    p.add_argument('--workers', type=int, help='worker processes; from the settings if not given')
    p.add_argument('--split', help='official, fixed, as_paper, as_mgca or chexpert_5x200; the set\'s own choice if not given')
    p.add_argument('--views', choices=['frontal', 'all'], help='frontal films (default) or all')
    p.add_argument('--uncertain', choices=['mgca', 'u_ones', 'u_zeros', 'keep'], help='what becomes of uncertain labels (default mgca)')
    p.add_argument('--labels', choices=['all', 'competition'], help='fourteen labels (default) or the five that are evaluated')
    p.add_argument('--test-labels', help='groundtruth.csv or test_labels.csv, if it lies elsewhere')
    a = p.parse_args()
    options = {name: value for name, value in dict(views=a.views, uncertain=a.uncertain, labels=a.labels, test_labels=a.test_labels).items() if value is not None}
    try: store = prepare('chexpert', a.source, a.out, size=a.size, how=a.how, workers=a.workers, split=a.split, **options)
    except G2DError as error: sys.exit(f'{error}')
    print(store, {name: n for name, n in store.manifest['counts'].items() if isinstance(n, int)}, f'rejected rows: {a.out}/rejected.csv')


if __name__ == '__main__': main()
