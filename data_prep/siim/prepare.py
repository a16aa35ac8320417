"""Make a store from the SIIM-ACR Pneumothorax Segmentation challenge (stage 1): see README.md beside this file.

    python data_prep/siim/prepare.py siim-acr-pneumothorax --out outputs/stores/siim
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('siim', __doc__)
