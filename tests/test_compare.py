"Comparison: nothing of phantoms is drawn beside published numbers, and every difference is said."
import numpy as np
import pandas as pd
import pytest
from g2d.compare import NOTHING, SAME, compare, comparison_figure, data_kind, read_results
from g2d.files import read_json, write_json
from g2d.published import published
from g2d.runs import run_notebook
from g2d.settings import G2DError


def results(path, **columns):
    "A small results.csv of a segmentation."
    rows = [dict(start=s, fraction=f, seed=k, metric=m, value=v + .1*k, low=v - .05, high=v + .05) | columns
            for s, v in (('random', .2), ('G2D encoder', .5)) for f in (.01, 1.) for k in (0, 1) for m in ('dice_positives', 'dice_published', 'dice_all_empty', 'hausdorff95_positives')]
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def a_run(root, store, protocol, experiment='segmentation', key='abc', **more):
    results(root/experiment/key/'results.csv')
    write_json(root/experiment/key/'parameters.json', dict(store=store, protocol=protocol) | more)
    write_json(root/experiment/key/'done.json', dict(seconds=1, parameters=dict(store=store, protocol=protocol) | more))
    return root/experiment/key


def test_printed_names_are_published():
    for task, names in SAME.items():
        have = set(published(task)['metric'])
        printed = {p for p, _ in names.values()}
        assert printed & have, task
        if task not in ('retrieval', 'finetune', 'zero_shot'): assert printed <= have | {'ACC', 'AUC'}, task
    assert all(p in {q for names in SAME.values() for q, _ in names.values()} for p, _ in NOTHING.values())


def test_files_runs_and_the_whole_folder_give_the_same(tmp_path):
    run = a_run(tmp_path, 'layout:siim', 'fixed')
    one, whole, file = read_results(run), read_results(tmp_path), read_results(run/'results.csv')
    assert len(one) == len(whole) == len(file) == 32 and one['value'].tolist() == whole['value'].tolist() == file['value'].tolist()
    assert set(one['kind']) == {'phantoms'} and set(one['protocol']) == {'fixed'} and set(one['task']) == {'segmentation'}
    assert set(file['kind']) == {'unknown'} and set(file['task']) == {'segmentation'} and one['value'].max() == pytest.approx(60)
    assert len(read_results(tmp_path, task='detection')) == 0 and len(read_results()) == 0
    other = a_run(tmp_path, 'phantoms:60', 'demo', key='other')
    assert len(read_results(tmp_path)) == 64 and len(read_results(other)) == 32


def test_bad_results(tmp_path):
    (tmp_path/'a.csv').write_text('method,value\nx,1\n')
    with pytest.raises(G2DError, match='has no column "metric"'): read_results(tmp_path/'a.csv')
    (tmp_path/'empty.csv').write_text('')
    with pytest.raises(G2DError, match='is no CSV'): read_results(tmp_path/'empty.csv')
    with pytest.raises(G2DError, match='There is no file'): read_results(tmp_path/'none.csv')
    with pytest.raises(G2DError, match='There is no folder'): read_results(tmp_path/'none')
    with pytest.raises(G2DError, match='no task "vqa"'): compare(read_results(), 'vqa')
    with pytest.raises(G2DError, match='Nothing is published for dataset "MIMIC"'): compare(read_results(), 'linear', 'MIMIC')
    with pytest.raises(G2DError, match='nothing to draw'): comparison_figure(compare(read_results(), 'segmentation', 'SIIM', ['nothing']))


@pytest.mark.parametrize('store, protocol, says, panels', [
    ('phantoms:60', 'as_paper', 'PHANTOMS: not to be compared', 2), ('layout:siim', 'as_paper', 'PHANTOMS: not to be compared', 2), ('mine/store', 'as_paper', 'films not known', 2),
    ('real:kermany', 'as_paper', 'other films than the published (real:kermany)', 2), ('real:siim', 'fixed', 'films of real:siim: whether', 1), ('real:siim', 'as_paper', 'films of real:siim: whether', 1)])
def test_what_may_share_an_axis(tmp_path, store, protocol, says, panels):
    table = compare(read_results(a_run(tmp_path, store, protocol)), 'segmentation', 'siim')
    mine = table[(table['who'] == 'ours')]
    said = mine['remark'].str.contains('only films with a finding')
    assert said.sum() == (~said).sum() == 4 and (mine['seeds'] == 2).all()
    for remark in mine[~said]['remark']: assert remark.startswith(says) and ('protocol "fixed", not the published one' in remark) == (protocol == 'fixed')
    plain = table[~table.index.isin(mine[said].index)]
    figure = comparison_figure(plain, 'Dice', 'a title')
    assert len(figure.axes) == panels
    assert says.split(' (')[0] in figure.get_suptitle().replace('\n', ' ') and figure._suptitle.get_color() == '#b00020'
    if panels == 2: assert not {t.get_text() for t in figure.axes[0].get_yticklabels()} & {'MGCA', 'ConVIRT'}
    else: assert {'MGCA', 'G2D encoder'} <= {t.get_text() for t in figure.axes[0].get_yticklabels()}


def test_a_name_for_published_numbers_does_not_make_phantoms_real(tmp_path):
    for store, says in (('layout:siim', 'PHANTOMS: not to be compared'), ('real:kermany', 'films of real:kermany: whether')):
        run = a_run(tmp_path/store[:4], store, 'fixed', dataset='SIIM')
        table = compare(read_results(run), 'segmentation', 'siim').query('who == "ours"')
        assert table['remark'].str.startswith(says).all(), table['remark'].tolist()
    path = results(tmp_path/'x.csv', published_as='SIIM', store='real:mine', protocol='as_paper', task='segmentation')
    assert 'films of real:mine: whether they are the published test set is not checked' in set(compare(read_results(path), 'segmentation', 'siim').query('who == "ours"')['remark'])


def test_means_over_seeds_and_free_baselines(tmp_path):
    table = compare(read_results(a_run(tmp_path, 'real:siim', 'as_paper')), 'segmentation', 'SIIM')
    row = table[(table.who == 'ours') & (table.method == 'G2D encoder') & (table.fraction == .01) & ~table.remark.str.contains('only films')].iloc[0]
    assert (row.value, row.low, row.high) == pytest.approx((55, 45, 55)) and row.metric == 'Dice'
    free = table[table.who == 'ours, no knowledge']
    assert set(free.method) == {'all-empty prediction'} and len(free) == 4                   # value differs by start and fraction in this made-up file
    printed = table[table.who == 'published films, no knowledge']
    assert printed.value.round(1).tolist() == [75.0, 76.9]
    assert not table.remark.str.startswith('ablation').any() and (table.who == 'published').sum() == len(published('segmentation', 'SIIM').query('~note.str.startswith("ablation")'))
    names = table[table.who == 'published'].set_index('method')
    assert {'MedKLIP', 'MedKLIP (as_medklip)', 'LoVT (lovt), frozen', 'LoVT (lovt), fine-tuned'} <= set(names.index)
    all_sets = compare(read_results(), 'segmentation')
    assert all_sets.remark.str.startswith(('SIIM', 'RSNA', 'Object-CXR', 'TBX')).all()


def test_every_task_has_a_table_and_a_figure():
    for task in SAME:
        table = compare(read_results(), task)
        assert len(table) and comparison_figure(table, title=task).axes


def test_notebook(tmp_path, monkeypatch):
    import g2d.settings
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path/'out'))
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    run = a_run(tmp_path/'out', 'layout:siim', 'fixed')
    folder = run_notebook('compare', dict(results=[str(run)], task='segmentation', dataset='siim', metrics=['Dice']), progress=False)
    metrics, table = read_json(folder/'metrics.json'), pd.read_csv(folder/'comparison.csv')
    assert metrics['ours'] == metrics['ours_with_remark'] == 8 and metrics['published'] == (table.who == 'published').sum() > 30
    assert (folder/'figures'/'Dice.png').stat().st_size > 5000
