"The site: Sphinx, MyST and myst-nb. Pages that follow from the package, the notebooks and the results are written by pages.py before each build."
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import g2d

project, author, copyright = 'g2d', 'The g2d authors', 'The g2d authors, Apache-2.0'
version = release = g2d.__version__
extensions = ['myst_nb', 'pages', 'mathml']
exclude_patterns = ['_build']
suppress_warnings = ['mystnb.unknown_mime_type']
nitpicky = False

myst_enable_extensions = ['amsmath', 'attrs_block', 'attrs_inline', 'colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 3
myst_links_external_new_tab = False
nb_execution_mode = 'off'           # pictures are committed; make docs EXECUTE=1 runs the notebooks, and keeps the outputs
nb_execution_cache_path = str(Path(__file__).parent/'_build'/'cache')
nb_execution_timeout = 600
nb_execution_excludepatterns = ['*/experiments/*', 'experiments/*']   # they are for g2d run
nb_execution_raise_on_error = True
nb_merge_streams = True
html_math_renderer = 'mathml'       # no script from a network: the pages read offline

html_theme = 'pydata_sphinx_theme'
html_title = 'g2d'
html_static_path = ['_static']
html_css_files = ['g2d.css']
html_copy_source = False
html_show_sourcelink = False
html_theme_options = dict(header_links_before_dropdown=8, navbar_align='left', navigation_depth=3, show_toc_level=2, show_nav_level=1,
                          logo=dict(text='g2d'), footer_start=['copyright'], footer_end=['sphinx-version'], navbar_persistent=[], navbar_end=['search-button', 'theme-switcher'], back_to_top_button=False)
html_sidebars = {'index': [], 'tutorial': [], 'changelog': []}
pygments_style = 'tango'
linkcheck_timeout, linkcheck_workers, linkcheck_anchors = 20, 4, False
