"""Make a store from VinDr-CXR (PhysioNet) or VinBigData (Kaggle): see README.md beside this file.

    python data_prep/vindr_cxr/prepare.py vindr-cxr/1.0.0 --out outputs/stores/vindr_cxr
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('vindr_cxr', __doc__)
