"""Make a store from Object-CXR: see README.md beside this file.

    python data_prep/object_cxr/prepare.py object-CXR --out outputs/stores/object_cxr
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('object_cxr', __doc__)
