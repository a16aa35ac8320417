"Figures of a text that are asked for: every question has an answer, wrong ones are found, nothing is answered that is ambiguous."
import sys
import pandas as pd, pytest
from g2d.evidence import checked, found_page, look_up, plain, refresh_file, refreshed
from g2d.settings import G2DError


@pytest.fixture
def folder(tmp_path):
    (tmp_path/'phantombench').mkdir()
    rows = [dict(method=m, seed=s, task='linear', fraction=f, metric='auroc', value=v + .01*s, low=v - .1, high=v + .1) for m, v in (('g2d', .5), ('mask as paper', .6)) for s in range(3) for f in (.01, 1.)]
    rows += [dict(method='up', seed=s, task='linear', fraction=1., metric='auroc', value=v, low=v, high=v) for s, v in enumerate((.5, .7, .63))] + [dict(method='one', seed=1, task='linear', fraction=1., metric='auroc', value=1., low=1., high=1.)]
    pd.DataFrame(rows).to_csv(tmp_path/'phantombench'/'ideas.csv', index=False)
    pd.DataFrame(dict(figure=['R@1', 'minutes'], trained=[.084, 3], untrained=[.002, None])).to_csv(tmp_path/'demo_figures.csv', index=False)
    pd.DataFrame([dict(task='a', method='x, y', mean=.25, half=.5, seeds=3), dict(task='b', method='x, y', mean=.75, half=None, seeds=1)]).to_csv(tmp_path/'down.csv', index=False)
    return tmp_path


@pytest.mark.parametrize('question, answer', [
    ('ideas: method=g2d; fraction=0.01; metric=auroc', '0.510 ± 0.025'), ('ideas: method=g2d; fraction=1; metric=auroc => {mean:.1%} of {seeds} seeds', '51.0% of 3 seeds'),
    ('paired ideas: method=g2d; fraction=1 => {difference:+.3f} ({low:.3f} to {high:.3f})', '-0.100 (-0.100 to -0.100)'), ('paired ideas against g2d: method=mask as paper; fraction=1 => {difference:+.2f}', '+0.10'),
    ('ideas: method=mask as paper; fraction=0.01 minus method=g2d; fraction=1', '+0.100 (0.100 to 0.100)'), ('ideas: method=g2d; fraction=1 minus method=up; fraction=1 => {difference:+.2f} ± {half:.3f} of {seeds}', '-0.10 ± 0.237 of 3'),
    ('demo_figures: figure=R@1 => {trained:.3f}', '0.084'), ('down: task=a; method=x, y', '0.250 ± 0.500'), ('down: task=b', '0.750'),
    ('trivial: method=all-empty prediction; dataset=RSNA => {value:.1f}', '76.6')])
def test_answers(folder, question, answer): assert look_up(question, folder) == answer


@pytest.mark.parametrize('question, said', [
    ('ideas: metric=auroc; fraction=1', 'finds 4 measurements'), ('ideas: method=moon', 'finds no row'), ('lost: a=b', 'no file lost.csv'), ('ideas: star=1', 'asks for a column "star"'), ('ideas files: a=b', 'names no file'),
    ('demo_figures: trained=3 => {moon}', 'cannot be shown'), ('demo_figures: figure=R@1', 'cannot be shown|half'), ('paired ideas against moon: a=b', 'no method "moon"'),
    ('ideas: method=g2d minus method=up', 'several measurements'), ('ideas: method=g2d; fraction=1 minus method=one', 'finds 1 seeds'), ('down: task=a minus task=b', 'no columns seed and value'), ('ideas: method=up minus method=moon', 'finds no row'), ('ideas: method=up minus method=g2d minus method=one', 'has minus 2 times')])
def test_questions_without_an_answer(folder, question, said):
    with pytest.raises(G2DError, match=said): look_up(question, folder)


def test_a_text_is_checked_written_anew_and_printed(folder, capsys, monkeypatch):
    text = '| 0.084<!--demo_figures: figure=R@1 => {trained:.3f}--> | 0.111 ± 0.025<!--ideas: method=g2d; fraction=1--> |\n\nA plain <!-- word --> stays.\n'
    table = checked(text, folder)
    assert (table['shown'] == table['answer']).tolist() == [True, False] and table['answer'][1] == '0.510 ± 0.025'
    assert plain(refreshed(text, folder)) == '| 0.084 | 0.510 ± 0.025 |\n\nA plain <!-- word --> stays.\n'
    (folder/'found.md').write_text(text, encoding='utf-8')
    assert found_page(folder) == plain(refreshed(text, folder)) and (folder/'found.md').read_text(encoding='utf-8') == text
    def call(*words):
        from g2d.cli import main
        monkeypatch.setattr(sys, 'argv', ['g2d', 'results', 'found', '--results', str(folder), *words])
        with pytest.raises(SystemExit) as stop: main()
        return stop.value.code, capsys.readouterr()
    code, printed = call()
    assert code in (0, None) and '| 0.510 ± 0.025 |' in printed.out
    assert '1 figures of' in call('--update')[1].out and '0 figures of' in call('--update')[1].out and refresh_file(folder/'found.md', folder) == 0
    (folder/'README.md').write_text(text, encoding='utf-8')   # the text beside the tables is written anew with it
    assert '1 figures of' in call('--update')[1].out and plain((folder/'README.md').read_text(encoding='utf-8')) == plain(refreshed(text, folder))
    (folder/'found.md').write_text('lost <!--ideas: method=g2d; fraction=1-->', encoding='utf-8')
    with pytest.raises(G2DError, match='no figure right before'): refresh_file(folder/'found.md', folder)
    (folder/'found.md').unlink()
    code, printed = call()
    assert code == 2 and 'There is no text' in printed.err and printed.err.count('\n') == 1
