"""Make a store from PadChest: see README.md beside this file.

    python data_prep/padchest/prepare.py PadChest --out outputs/stores/padchest
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('padchest', __doc__)
