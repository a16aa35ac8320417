"""Make a store from Open-I: see README.md beside this file.

    python data_prep/open_i/prepare.py NLMCXR_reports.tgz NLMCXR_png --out outputs/stores/open_i
"""
from g2d.data.prepare import prepare_command
from g2d.data.sets.open_i import write_reports

def texts(source, path, options):
    "The texts of all reports, of the sections that were asked for."
    sections = options.get('sections', ['findings', 'impression'])
    write_reports(source, path, [sections] if isinstance(sections, str) else sections)


if __name__ == '__main__': prepare_command('open_i', __doc__, {'--reports-table': ('also write the texts of all reports here', texts)})
