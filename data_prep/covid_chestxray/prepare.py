"""Make a store from the COVID-19 image data collection: see README.md beside this file.

    python data_prep/covid_chestxray/prepare.py covid-chestxray-dataset --out outputs/stores/covid_chestxray
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('covid_chestxray', __doc__)
