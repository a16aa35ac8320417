"""Make a store from your own table of films (CSV, TSV or parquet): see README.md beside this file.

    python data_prep/tidy/prepare.py films.csv --out outputs/stores/mine --column image=path --column text=report
"""
from g2d.data.prepare import prepare_command

if __name__ == '__main__': prepare_command('tidy', __doc__)
