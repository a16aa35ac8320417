"Run folders become one table; a page of pictures opens from disk."
import json, shutil, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from g2d.settings import G2DError
from g2d.files import write_json
from g2d.results import collect, keep, of_table, over_seeds, beside_published, render, write_page


def make_run(root, experiment, key, metrics=None, rows=None, figures=0, failed=None, **parameters):
    folder = Path(root)/experiment/key
    (folder/'figures').mkdir(parents=True)
    write_json(folder/'parameters.json', parameters)
    if metrics: write_json(folder/'metrics.json', metrics)
    if rows: pd.DataFrame(rows).to_csv(folder/'results.csv', index=False)
    for k in range(figures): Image.fromarray(np.full((20, 30), 40*k, np.uint8)).save(folder/'figures'/f'picture_{k}.png')
    if failed: write_json(folder/'failed.json', dict(error=failed, cell=3))
    else: write_json(folder/'done.json', dict(seconds=3., parameters=parameters))
    return folder


@pytest.fixture
def outputs(tmp_path):
    root = tmp_path/'out puts' # a blank in a path must not break the links
    for seed in range(3):
        rows = [dict(start=s, fraction=.01, seed=seed, metric='dice_published', value=v + .01*seed, low=v - .1, high=v + .1) for s, v in (('random', .2), ('G2D encoder', .5))]
        make_run(root, 'segmentation', f's{seed}', rows=rows, figures=2, store='/data/siim', protocol='as_paper', fraction=.01, seed=seed)
    make_run(root, 'pretrain', 'p0', metrics={'loss': 1.5, 'start': 'random', 'nothing': None, 'flag': True}, store='phantoms', seed=1)
    make_run(root, 'pretrain', 'p1', failed='ValueError: <b>bad</b>', store='phantoms')
    return root


def test_collect_is_tidy(outputs):
    frame = collect(outputs)
    assert len(frame) == 7 and set(frame[frame.experiment == 'pretrain'].metric) == {'loss'}
    assert frame[frame.experiment == 'segmentation'].dataset.unique().tolist() == ['siim']
    assert len(collect(outputs, 'pretrain')) == 1
    with pytest.raises(G2DError, match='There is no folder'): collect(outputs/'nowhere')
    (outputs/'segmentation'/'s1'/'results.csv').write_text('\x00\x01"')
    frame = collect(outputs)
    assert len(frame) <= 5 and sorted(set(frame[frame.experiment == 'segmentation'].key)) == ['s0', 's2']


def test_means_and_intervals_are_students(outputs):
    from scipy import stats
    table = over_seeds(collect(outputs, 'segmentation')).set_index('method')
    low, high = stats.t.interval(.95, 2, loc=.51, scale=stats.sem([.5, .51, .52]))
    assert table.loc['G2D encoder', 'mean'] == pytest.approx(.51) and table.loc['G2D encoder', 'half'] == pytest.approx((high - low)/2) and table.loc['random', 'seeds'] == 3
    one = over_seeds(keep(collect(outputs), ['metric=loss'])).iloc[0]
    assert one['seeds'] == 1 and one['half'] != one['half']
    twice = pd.concat([collect(outputs, 'segmentation')]*2)
    assert over_seeds(twice).set_index('method').loc['random', 'seeds'] == 3


def test_filters(outputs):
    frame = collect(outputs)
    assert set(keep(frame, ['method~^G2D']).method) == {'G2D encoder'} and len(keep(frame, ['seed=1', 'experiment=segmentation'])) == 2
    assert len(keep(frame, ['store=phantoms'])) == 1
    for bad, match in (('method', 'not understood'), ('colour=red', 'No run has'), ('method~(', 'no regular expression')):
        with pytest.raises(G2DError, match=match): keep(frame, [bad])


def test_runs_of_one_table_by_the_names_of_its_rows(tmp_path, monkeypatch, capsys):
    from g2d.runs import plan_rows, read_rows
    table, root = tmp_path/'two.yaml', tmp_path/'out'
    table.write_text('- {name: first, experiment: retrieval, parameters: {size: 64}}\n- {name: second, experiment: retrieval, parameters: {size: 32}}\n')
    for plan, value in zip(plan_rows(read_rows(table), root), (.2, .4)):
        make_run(root, 'retrieval', plan.folder.name, metrics=dict(recall=value))
    make_run(root, 'retrieval', 'another', metrics=dict(recall=.9))
    found = of_table(collect(root), table, root)
    assert found[['row', 'value']].values.tolist() == [['first', .2], ['second', .4]] and not found.attrs['open']
    assert over_seeds(found)[['row', 'mean']].values.tolist() == [['first', .2], ['second', .4]] # not averaged: two settings, not two seeds
    (plan.folder/'done.json').unlink()
    assert of_table(collect(root), table, root).attrs['open'] == ['second']
    monkeypatch.setattr(sys, 'argv', ['g2d', 'results', '--table', str(table), '--format', 'csv', '--output', str(root)])
    from g2d.cli import main
    try: main()
    except SystemExit as stop: assert not stop.code
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith('row,') and 'first' in out and 'second' not in out and '1 rows of the table are not finished' in err


def test_published_numbers_stand_beside(outputs):
    table = beside_published(over_seeds(collect(outputs, 'segmentation')))
    row = table[table.method == 'G2D encoder'].iloc[0]
    assert row['published'] in (62.6, 65.6) and row['delta'] == pytest.approx(51 - row['published']) and 'G2D' in row['source']
    frame = collect(outputs, 'segmentation').assign(dataset='layout:siim')
    assert beside_published(over_seeds(frame))['published'].isna().all()


def test_formats(outputs):
    table = over_seeds(collect(outputs, 'segmentation'))[['method', 'metric', 'mean', 'half']]
    assert '| G2D encoder | dice_published | 0.510 ± 0.025 |' in render(table)
    tex = render(table, 'latex')
    assert tex.startswith('\\begin{tabular}{lll}') and 'dice\\_published' in tex and '$\\pm$' in tex
    assert pd.read_csv(__import__('io').StringIO(render(table, 'csv')))['mean'].iloc[0] == pytest.approx(.21)
    with pytest.raises(G2DError, match='no format'): render(table, 'word')


def test_command_line(outputs, capsys, monkeypatch):
    from g2d.cli import main
    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['g2d', 'results', '--output', str(outputs), *words])
        with pytest.raises(SystemExit) as stop: main()
        found = capsys.readouterr()
        return stop.value.code, found.out, found.err
    assert call('--where', 'metric~dice')[1].count('dice_published') == 2
    code, _, err = call('--where', 'metric=none')
    assert code == 2 and 'No finished run' in err
    assert call('--page')[1].strip().endswith('results.html')
    assert call('--format', 'latex', '--out', str(outputs/'t.tex'))[0] == 0 and 'tabular' in (outputs/'t.tex').read_text()


def test_page_in_a_browser(outputs):
    "Images load, filters work, and the console is silent."
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    playwright = pytest.importorskip('playwright.sync_api')
    if chromium is None: pytest.skip('no Chromium on this machine')
    page_file = write_page(outputs)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page, said = browser.new_page(), []
        page.on('console', lambda message: said.append(message.text)); page.on('pageerror', lambda error: said.append(str(error)))
        page.goto(page_file.resolve().as_uri())
        assert page.locator('#shown').inner_text() == '5 of 5 runs'
        for image in page.locator('img').all(): image.scroll_into_view_if_needed()
        page.wait_for_function('[...document.images].every(i => i.complete && i.naturalWidth > 0)', timeout=10000)
        assert page.locator('img').count() == 6 and all(image.get_attribute('alt') for image in page.locator('img').all())
        page.fill('#words', 'seed=1 segmentation')
        assert page.locator('section.run:visible').count() == 1
        page.fill('#words', ''); page.select_option('#kind', 'pretrain')
        assert page.locator('section.run:visible').count() == 2 and page.locator('#shown').inner_text() == '2 of 5 runs'
        assert '<b>bad</b>' in page.locator('section.failed').inner_text() # shown as text
        page.keyboard.press('Tab')
        assert not said
        browser.close()


def test_page_without_runs_or_outside(outputs, tmp_path):
    with pytest.raises(G2DError, match='must lie inside'): write_page(outputs, tmp_path/'x.html')
    (tmp_path/'empty').mkdir()
    with pytest.raises(G2DError, match='There are no runs'): write_page(tmp_path/'empty')
