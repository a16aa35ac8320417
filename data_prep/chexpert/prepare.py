"""Make a store from CheXpert: see README.md beside this file.

    python data_prep/chexpert/prepare.py CheXpert-v1.0-small --out outputs/stores/chexpert
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('chexpert', __doc__)
