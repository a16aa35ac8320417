"""Make a store from MIMIC-CXR: see README.md beside this file.

    python data_prep/mimic_cxr/prepare.py mimic-cxr-jpg/2.0.0 mimic-cxr-reports.zip --out outputs/stores/mimic_cxr
"""
from g2d.data.prepare import prepare_command
from g2d.data.sets.mimic_cxr import write_master, write_sectioned


if __name__ == '__main__':
    prepare_command('mimic_cxr', __doc__, {
        '--sectioned': ('also write the table of sections here', lambda source, path, options: write_sectioned(source, path)),
        '--master': ("also write MGCA's master table here", lambda source, path, options: write_master(source, path))})
