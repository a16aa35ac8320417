"""Make a store from ChestX-Det: see README.md beside this file.

    python data_prep/chestx_det/prepare.py ChestX-Det-Dataset --out outputs/stores/chestx_det
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('chestx_det', __doc__)
