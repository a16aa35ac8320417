"""Make a store from NIH ChestX-ray14: see README.md beside this file.

    python data_prep/nih_cxr14/prepare.py ChestX-ray14 --out outputs/stores/nih_cxr14
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('nih_cxr14', __doc__)
