"""Make a store from VQA-RAD: see README.md beside this file.

    python data_prep/vqa_rad/prepare.py VQA_RAD --out outputs/stores/vqa_rad
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('vqa_rad', __doc__)
