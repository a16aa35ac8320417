"""Make a store from COVIDx: see README.md beside this file.

    python data_prep/covidx/prepare.py COVIDx --out outputs/stores/covidx
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('covidx', __doc__)
