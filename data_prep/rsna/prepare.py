"""Make a store from the RSNA Pneumonia Detection Challenge (stage 2): see README.md beside this file.

    python data_prep/rsna/prepare.py rsna-pneumonia --out outputs/stores/rsna
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('rsna', __doc__)
