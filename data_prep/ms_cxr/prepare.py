"""Make a store from MS-CXR: see README.md beside this file.

    python data_prep/ms_cxr/prepare.py ms-cxr mimic-cxr-jpg/2.0.0 --out outputs/stores/ms_cxr
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('ms_cxr', __doc__)
