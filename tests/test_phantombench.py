"PhantomBench: rows from runs, means, claim, paired ideas and attention against plain arithmetic, the command line, and the batch tables."
import json, math, re, sys
from pathlib import Path
import numpy as np, pandas as pd
import pytest
from g2d.files import write_json
from g2d.phantombench import BENCH_COLUMNS, attention_table, bench_folder, bench_means, bench_rows, bench_text, claim_table, method_tables, paired_table, update_bench, verdict
from g2d.runs import plan_rows, read_rows
from g2d.settings import G2DError

TABLES = Path(__file__).parents[1]/'nbs'/'experiments'/'tables'
T2 = 4.302652729911275         # Student's 97.5 % point at two degrees of freedom


def line(method, seed, task, fraction, metric, value): return dict(zip(BENCH_COLUMNS, (method, seed, task, fraction, metric, value, float('nan'), float('nan'))))


@pytest.fixture
def rows():
    "g2d is far ahead of gloria at 100 %, level with mgca, behind imagenet; three seeds each."
    found = []
    for method, values in dict(g2d=(.50, .52, .51), gloria=(.30, .32, .31), mgca=(.50, .54, .49), ImageNet=(.80, .81, .79)).items():
        for seed, value in enumerate(values):
            for fraction in (.01, 1.): found.append(line(method, seed, 'segmentation, encoder', fraction, 'dice_positives', value - .4*(method == 'g2d' and fraction < 1)))
            if method == 'g2d': found += [line(method, seed, 'segmentation, encoder + decoder', .01, 'dice_positives', value), line(method, seed, 'segmentation, encoder + decoder', .01, 'iou_positives', .9)]
            found.append(line(method, seed, 'retrieval', float('nan'), 'image_to_text_R@1', value/10))
    return pd.DataFrame(found)


def test_means_and_methods(rows):
    means = bench_means(rows).set_index(['method', 'task', 'fraction', 'metric'])
    found = means.loc[('mgca', 'segmentation, encoder', 1., 'dice_positives')]
    values = np.array([.50, .54, .49])
    assert found['mean'] == pytest.approx(values.mean()) and found['half'] == pytest.approx(T2*values.std(ddof=1)/math.sqrt(3)) and found['seeds'] == 3
    table = method_tables(rows)['segmentation, encoder']
    assert list(table.index) == ['g2d', 'gloria', 'mgca', 'ImageNet'] and list(table) == ['dice_positives at 1 %', 'dice_positives at 100 %']
    assert table.loc['g2d'].tolist() == ['0.110 ± 0.025', '0.510 ± 0.025']
    assert list(method_tables(rows)['retrieval']) == ['image_to_text_R@1'] and list(method_tables(rows)['segmentation, encoder + decoder']) == ['dice_positives at 1 %']


@pytest.mark.parametrize('a, b, said', [((.5, .1), (.3, .05), 'leads'), ((.3, .05), (.5, .1), 'behind'), ((.5, .1), (.4, .05), 'intervals overlap'), ((.5, .1), (.36, .05), "intervals overlap"),
                                        ((.5, float('nan')), (.3, .1), 'one seed'), ((.5, .1), (.3, float('nan')), 'one seed')])
def test_verdict(a, b, said): assert verdict(*a, *b) == said


def test_claim_takes_the_decoder_where_there_is_one(rows):
    claim = claim_table(rows).set_index('peer')
    assert claim['verdict'].to_dict() == dict(gloria='leads', mgca='intervals overlap', ImageNet='behind')
    assert claim['at 1 %'].unique().tolist() == ['0.510 ± 0.025'] and claim.loc['gloria', 'difference'] == '+0.200' and set(claim['task']) == {'segmentation'}
    assert len(claim_table(rows[rows['fraction'] != 1.])) == 0
    assert claim_table(rows[rows['seed'] == 0])['verdict'].unique().tolist() == ['one seed']


def test_ideas_are_paired_by_seed():
    values = {'mask as paper': (.30, .50, .40), 'sentences': (.33, .53, .44), 'teacher': (.20, .70, .40), 'one': (.6,)}
    rows = pd.DataFrame([line(m, s, 'segmentation, encoder + decoder', .01, 'dice_positives', v) for m, vs in values.items() for s, v in enumerate(vs)] + [line('random', 0, 'retrieval', float('nan'), 'image_to_text_R@1', 0.)])
    table = paired_table(rows).set_index('method')
    d = np.array([.03, .03, .04])
    half = T2*d.std(ddof=1)/math.sqrt(3)
    assert table.loc['sentences', ['difference', 'low', 'high']].tolist() == pytest.approx([d.mean(), d.mean() - half, d.mean() + half])
    assert table['verdict'].to_dict() == dict(sentences='higher', teacher='not separated', one='one seed') and set(table['reference']) == {'mask as paper'}
    assert paired_table(rows, 'sentences').set_index('method').loc['mask as paper', 'verdict'] == 'lower'
    with pytest.raises(G2DError, match='no method "best"'): paired_table(rows, 'best')


def test_attention_long_rows():
    frame = pd.DataFrame([dict(method=m, step=s, seed=k, metric=n, value=v + k*.1) for m, v in (('g2d', .2), ('mpma', .1)) for s in ('attention', 'smooth') for n in ('pointing', 'entropy') for k in range(3)])
    table = attention_table(frame)
    assert list(table) == ['method', 'step', 'pointing', 'entropy'] and len(table) == 4
    assert table.iloc[0].tolist() == ['g2d', 'attention', f'0.300 ± {T2*.1/math.sqrt(3):.3f}', f'0.300 ± {T2*.1/math.sqrt(3):.3f}']
    assert list(attention_table(frame[frame.step == 'smooth'].drop(columns='step'))) == ['method', 'pointing', 'entropy']
    with pytest.raises(G2DError, match='no column "value"'): attention_table(frame.drop(columns='value'))


def number(row, experiment, metric, value, **more):
    return dict(row=row, experiment=experiment, metric=metric, value=value, task=experiment, method=None, fraction=None, seed=None, low=None, high=None, parameters='{}') | more


def test_names_of_rows_become_methods():
    start = 'run:mpma without memory, seed 2/training'
    frame = pd.DataFrame([
        number('mpma without memory, seed 2', 'pretrain', 'image_to_text_R@1', .1), number('mpma without memory, seed 2', 'pretrain', 'untrained_image_to_text_R@1', .01),
        number('g2d, seed 2', 'pretrain', 'untrained_image_to_text_R@1', .5), number('g2d, seed 2', 'pretrain', 'minutes', 9.),
        number(f'classification, {start}', 'classification', 'auroc', .6, task='linear', method='MPMA-style without memory encoder', fraction=.1, seed=0, low=.5, high=.7),
        number(f'classification, {start}', 'classification', 'auroc/nodule', .6, task='linear', method='MPMA-style without memory encoder', fraction=.1, seed=0),
        number(f'segmentation on 100 %, {start}', 'segmentation', 'dice_positives', .2, method='G2D encoder + decoder', fraction=1., seed=0), number(f'segmentation on 100 %, {start}', 'segmentation', 'dice_positives', .4, method='G2D encoder + decoder', fraction=1., seed=1),
        number(f'detection, {start}', 'detection', 'map', .3, method='MPMA-style encoder (yolov3)', fraction=.01, seed=0),
        number(f'zero-shot, {start}', 'zero_shot', 'auroc_macro', .7, method='MPMA-style (own, embedding)', seed=0), number(f'zero-shot, {start}', 'zero_shot', 'auroc_macro', .5, method='untrained (own, embedding)', seed=0),
        number(f'grounding attention, {start}', 'grounding', 'pointing', .25, method='MPMA-style (attention)', parameters='{"map": "attention"}'), number(f'grounding attention, {start}', 'grounding', 'pointing', .35, method='average mask', parameters='{"map": "attention"}'),
        number('segmentation, random, ImageNet and G2D', 'segmentation', 'dice_positives', .11, method='ImageNet', fraction=.01, seed=1), number('segmentation, random, ImageNet and G2D', 'segmentation', 'dice_positives', .9, method='G2D encoder', fraction=.01, seed=1),
        number('gallery', 'pretrain', 'image_to_text_R@1', .9)])
    rows = bench_rows(frame)
    assert list(rows) == list(BENCH_COLUMNS)
    found = {(r['method'], r['seed'], r['task'], None if r['fraction'] != r['fraction'] else r['fraction']): r['value'] for r in rows.to_dict('records')}
    m = 'mpma without memory'
    assert found == {(m, 2, 'retrieval', None): .1, ('random', 2, 'retrieval', None): .01, (m, 2, 'linear', .1): .6, (m, 2, 'segmentation, encoder + decoder', 1.): pytest.approx(.3), (m, 2, 'detection', .01): .3,
                     (m, 2, 'zero-shot, own, embedding', None): .7, ('random', 0, 'zero-shot, own, embedding', None): .5, (m, 2, 'grounding, attention', None): .25, ('average mask', 0, 'grounding, attention', None): .35,
                     ('ImageNet', 1, 'segmentation, encoder', .01): .11}
    assert rows.set_index('task').loc['linear', ['low', 'high']].tolist() == [.5, .7]
    with pytest.raises(G2DError, match='nothing for the benchmark'): bench_rows(frame[frame.row == 'gallery'])


def test_real_films_are_tasks_of_their_own_and_folds_are_seeds():
    found = []
    for fold in (1, 2, 3):
        for films, target in (('kermany', 'lungs'), ('covid', 'lesions')):
            more = dict(task='segmentation', seed=0, parameters=json.dumps(dict(store=f'real:{films}:{fold}/3')))
            for fraction in (.01, 1.):
                for method, start, value in (('global_only', 'global-only encoder', .2), ('g2d', 'G2D encoder', .3), ('g2d', 'G2D encoder + decoder', .5), ('g2d', 'random', .1)):
                    found.append(number(f'{target} at {fraction}, run:{method}, seed {fold}/training', 'segmentation', 'dice_positives', value + .01*fold + .1*(films == 'covid'), method=start, fraction=fraction, **more))
    rows = bench_rows(pd.DataFrame(found))
    assert set(rows['task']) == {f'segmentation, encoder{d}, {f}' for d in ('', ' + decoder') for f in ('kermany', 'covid')} and set(rows['seed']) == {1, 2, 3}
    assert len(rows[rows['method'] == 'random']) == 12          # a start without a pre-training has a fold, too
    claim = claim_table(rows).set_index(['task', 'peer'])
    assert set(claim.index) == {(f'segmentation, {f}', p) for f in ('kermany', 'covid') for p in ('global_only', 'random')}      # each set against itself
    assert claim['at 1 %'].to_dict()['segmentation, kermany', 'global_only'].startswith('0.520') and claim['at 1 %'].to_dict()['segmentation, covid', 'random'].startswith('0.620')
    assert set(claim['verdict']) == {'leads'}


def test_whole_networks_are_tasks_of_their_own(tmp_path):
    "A fine-tuning of all weights is not mixed with one of the decoder."
    found, names = [], {'random and ImageNet': (('random', .30), ('ImageNet', .35)), 'run:g2d, seed {}/training': (('G2D encoder', .50), ('G2D encoder + decoder', .60)), 'run:shuffled, seed {}/training': (('G2D encoder + decoder', .55),)}
    for freeze, more in (('no', .1), ('weights', 0.)):
        for fraction in (.01, 1.):
            for row, starts in names.items():
                for start, value in starts:
                    for k in range(3):
                        found.append(number('Dice, ' + row.format(k), 'segmentation', 'dice_positives', value + more + .001*k + .05*(fraction == 1.), method=start, fraction=fraction, seed=0 if '{}' in row else k, parameters=json.dumps(dict(freeze=freeze))))
    rows = bench_rows(pd.DataFrame(found))
    at = {(r.method, r.task): round(r.value, 6) for r in rows[(rows.fraction == .01) & (rows.seed == 1)].itertuples()}
    whole = ', whole network'
    assert at == {('random', 'segmentation, encoder'): .301, ('random', 'segmentation, encoder' + whole): .401, ('ImageNet', 'segmentation, encoder'): .351, ('ImageNet', 'segmentation, encoder' + whole): .451,
                  ('g2d', 'segmentation, encoder'): .501, ('g2d', 'segmentation, encoder' + whole): .601, ('g2d', 'segmentation, encoder + decoder'): .601, ('g2d', 'segmentation, encoder + decoder' + whole): .701,
                  ('shuffled', 'segmentation, encoder + decoder'): .551, ('shuffled', 'segmentation, encoder + decoder' + whole): .651}
    claim = claim_table(rows).set_index(['task', 'peer'])
    assert claim.loc[('segmentation' + whole, 'random'), 'difference'] == '+0.250' and claim.loc[('segmentation' + whole, 'shuffled'), 'verdict'] == 'intervals overlap' and len(claim) == 6
    assert set(paired_table(rows, 'shuffled')['method']) == {'g2d'}       # a start without pre-training shares no seed with one that has it
    rows.to_csv(tmp_path/'tuning.csv', index=False)
    text = bench_text(tmp_path)
    for part in ('Fine-tuning given time: segmentation, encoder, whole network', 'Fine-tuning given time, the claim', 'Fine-tuning given time: against "shuffled", paired by seed'): assert part in text, part


def test_the_longer_run_and_the_real_films_are_printed(rows, tmp_path):
    both = pd.concat([rows.replace(dict(method=dict(gloria='g2d shuffled'))), rows.replace(dict(method=dict(gloria='finer grid', mgca='finer grid shuffled')))])
    both.drop_duplicates(['method', 'seed', 'task', 'fraction', 'metric']).to_csv(tmp_path/'longer.csv', index=False)
    rows.assign(task=rows['task'] + ', kermany').replace(dict(method=dict(mgca='global_only'))).to_csv(tmp_path/'real.csv', index=False)
    rows.replace(dict(method=dict(gloria='last stage dilated'))).to_csv(tmp_path/'stage.csv', index=False)
    text = bench_text(tmp_path)
    assert re.search(r'## The stage that is pooled: against "last stage dilated", paired by seed\n\n\|[^\n]*\n[^\n]*\n\| g2d \|', text) and '## The stage that is pooled: segmentation, encoder' in text
    for part in ('Longer run: "g2d" against the masks of other films', 'Longer run: "finer grid" against the masks of other films', 'Real films: segmentation, encoder, kermany', 'Real films, the claim', 'Real films: against "global_only", paired by fold'): assert part in text, part


def call(monkeypatch, capsys, *words):
    from g2d.cli import main
    monkeypatch.setattr(sys, 'argv', ['g2d', 'results', *words])
    with pytest.raises(SystemExit) as stop: main()
    found = capsys.readouterr()
    return stop.value.code, found.out, found.err


def test_command_prints_the_tables(rows, tmp_path, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, 'phantombench', '--results', str(tmp_path))
    assert code == 2 and 'There are no results of PhantomBench in' in err and err.count('\n') == 1
    rows.to_csv(tmp_path/'methods.csv', index=False)
    rows.replace(dict(method=dict(gloria='finer grid'))).to_csv(tmp_path/'ideas.csv', index=False)
    pd.DataFrame([dict(method='g2d', seed=0, metric='entropy', value=.5)]).to_csv(tmp_path/'attention.csv', index=False)
    code, out, _ = call(monkeypatch, capsys, 'phantombench', '--results', str(tmp_path))
    assert code in (0, None) and '4 methods, 3 seeds, from' in out and '| gloria | 0.310 ± 0.025 | 0.310 ± 0.025 |' in out and '| leads |' in out and '| finer grid |' in out and '| g2d | 0.500 |' in out
    assert 'Ideas against "g2d", paired by seed' in out and out == bench_text(tmp_path)
    assert call(monkeypatch, capsys, 'phantombench', '--results', str(tmp_path), '--format', 'latex', '--out', str(tmp_path/'t.tex'))[0] in (0, None) and r'\begin{tabular}' in (tmp_path/'t.tex').read_text()
    assert 'no results of "phantoms"' in call(monkeypatch, capsys, 'phantoms')[2] and '--update needs --table' in call(monkeypatch, capsys, 'phantombench', '--update')[2]
    assert 'belong to: g2d results phantombench' in call(monkeypatch, capsys, '--update')[2]
    rows.drop(columns='task').to_csv(tmp_path/'methods.csv', index=False)
    with pytest.raises(G2DError, match='no column "task"'): bench_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'results'/'phantombench').mkdir(parents=True); rows.to_csv(tmp_path/'results'/'phantombench'/'ideas.csv', index=False)
    assert bench_folder().name == 'phantombench'


def test_update_writes_what_the_runs_hold(tmp_path, monkeypatch, capsys):
    "Two of the four runs of a table are done; the file has their numbers, and the command says what is open."
    table = tmp_path/'few_ideas.yaml'
    table.write_text('''- name: "g2d, seed {overrides[seed]}"
  experiment: pretrain
  parameters: {store: "phantoms:60", profile_name: "demo"}
  grid: {overrides: [{"seed": 0}, {"seed": 1}]}
- name: "segmentation, {checkpoint}"
  experiment: segmentation
  parameters: {store: "phantoms:60", baselines: false, fraction: 0.01}
  grid: {checkpoint: ["run:g2d, seed 0/training", "run:g2d, seed 1/training"]}
''')
    plans = {p.row.name: p for p in plan_rows(read_rows(table), tmp_path/'runs')}
    for name in ('g2d, seed 0', 'segmentation, run:g2d, seed 0/training'):
        folder = plans[name].folder
        folder.mkdir(parents=True); write_json(folder/'done.json', dict(seconds=1, parameters=plans[name].parameters))
        if name.startswith('g2d'): write_json(folder/'metrics.json', {'image_to_text_R@1': .123456789, 'steps': 84, 'iou_pseudo': .2})
        else: (folder/'results.csv').write_text('start,fraction,seed,metric,value,low,high\nG2D encoder + decoder,0.01,0,dice_positives,0.4,0.3,0.5\n')
    code, out, err = call(monkeypatch, capsys, 'phantombench', '--update', '--table', str(table), '--output', str(tmp_path/'runs'), '--results', str(tmp_path/'bench'))
    assert code in (0, None) and 'ideas.csv' in out and '2 rows of the table are not finished' in err
    text = (tmp_path/'bench'/'ideas.csv').read_text().splitlines()
    assert text[0] == ','.join(BENCH_COLUMNS) and 'g2d,0,retrieval,,image_to_text_R@1,0.123457,,' in text and 'g2d,0,"segmentation, encoder + decoder",0.01,dice_positives,0.4,0.3,0.5' in text and len(text) == 4
    assert update_bench(table, tmp_path/'runs', tmp_path/'again')[0].read_bytes() == (tmp_path/'bench'/'ideas.csv').read_bytes()


def test_update_writes_the_file_from_its_table_alone(tmp_path):
    "What another table left in the file is gone."
    def done(stem, value, methods):
        table = tmp_path/f'{stem}.yaml'
        table.write_text(''.join(f'- name: "{m}, seed 1"\n  experiment: pretrain\n  parameters: {{store: "phantoms:60+real:pairs:1/3", profile_name: "demo", method: "{m}"}}\n' for m in methods))
        for plan in plan_rows(read_rows(table), tmp_path/stem):
            plan.folder.mkdir(parents=True); write_json(plan.folder/'done.json', dict(seconds=1, parameters=plan.parameters)); write_json(plan.folder/'metrics.json', {'image_to_text_R@1': value})
        path = update_bench(table, tmp_path/stem, tmp_path/'bench')[0]
        return path.name, [(r.method, r.value) for r in pd.read_csv(path).itertuples()]
    for name in ('real', 'ideas'):
        assert done(f'{name}_a', .1, ['g2d', 'mgca']) == (f'{name}.csv', [('g2d', .1), ('mgca', .1)])
        assert done(f'{name}_b', .2, ['mgca', 'mrm']) == (f'{name}.csv', [('mgca', .2), ('mrm', .2)])


def test_real_films_have_every_method_in_every_fold():
    "All pre-trainings and tasks of the table of real films, with the films of one fold left out of its pre-training."
    rows = read_rows(TABLES/'real_methods.yaml')
    trained = {r.name: r.parameters['store'] for r in rows if r.experiment == 'pretrain'}
    assert set(trained) == {f'{m}, seed {k}' for m in ('g2d', 'shuffled', 'global_only', 'mgca', 'gloria', 'mrm', 'mpma', 'reconstruction', 'g2d real pairs only') for k in (1, 2, 3)}
    assert all(store.endswith(f'real:pairs:{name[-1]}/3') for name, store in trained.items())
    for name in trained:
        tested = [r for r in rows if r.parameters.get('checkpoint') == f'run:{name}/training']
        assert all(r.parameters['store'].endswith(f':{name[-1]}/3') for r in tested)
        films = [(r.parameters['store'].split(':')[1], f) for r in tested for f in np.atleast_1d(r.parameters['fraction'])]
        assert sorted(films) == sorted((s, f) for s in ('kermany', 'nih', 'covid') for f in (.01, .1, 1.)), name


def test_a_fine_tuning_has_the_seed_of_its_pre_training():
    "Else every interval over seeds would leave out what the decoder began with, which is the same draw for all of one seed."
    seen = 0
    for name in ('phantom_methods', 'phantom_ideas', 'phantom_attention', 'phantom_longer', 'phantom_tuning', 'phantom_stage', 'real_methods', 'phantombench'):
        for r in read_rows(TABLES/f'{name}.yaml'):
            named = re.search(r'run:.+, seed (\d+)/', str(r.parameters.get('checkpoint') or ''))
            if r.experiment != 'segmentation' or named is None or r.parameters['seeds'] > 1: continue     # rows of three seeds are for random and ImageNet
            seen += 1
            assert r.parameters.get('first_seed', 0) == int(named[1]), (name, r.name)
    assert seen > 250


def test_fine_tuning_is_the_only_difference_of_the_table_that_gives_it_time():
    "The pre-trainings are those of the longer run; every start is tuned alike, on both shares."
    tuning, longer = read_rows(TABLES/'phantom_tuning.yaml'), read_rows(TABLES/'phantom_longer.yaml')
    known = {json.dumps(r.parameters, sort_keys=True) for r in longer if r.experiment == 'pretrain'}
    assert all((json.dumps(r.parameters, sort_keys=True) in known) == (r.parameters['method'] != 'global_only') for r in tuning if r.experiment == 'pretrain')
    tuned = [r.parameters for r in tuning if r.experiment == 'segmentation']
    assert {(p['store'], p['size'], p['protocol'], p['steps'], p['limit']) for p in tuned} == {('phantoms:2600', 96, 'demo', 400, 200)}
    starts = {key: {p.get('checkpoint', p.get('network')) for p in tuned if (p['freeze'], p['fraction']) == key} for key in (('no', .01), ('no', 1.), ('weights', .01), ('weights', 1.))}
    assert {s for s in starts['no', .01] if 'shuffled' not in s} == starts['no', 1.] == starts['weights', .01] == starts['weights', 1.] and sum(map(len, starts.values())) == len(tuned)       # the control with few masks alone


def test_the_stages_differ_in_the_network_alone():
    "Both rows that the longer run has are the same runs; each network is tuned alike; the last stage and the one before have cells of the same size."
    from g2d.profiles import profile
    stage, longer = read_rows(TABLES/'phantom_stage.yaml'), read_rows(TABLES/'phantom_longer.yaml')
    as_text = lambda r: json.dumps(dict(r.parameters, checkpoint=None), sort_keys=True)
    known = {r.name: as_text(r) for r in longer}
    assert {r.name.split(', seed')[0] for r in stage if known.get(r.name) == as_text(r) and r.experiment == 'pretrain'} == {'g2d', 'finer grid'}
    nets = {r.name: r.parameters for r in stage if r.experiment == 'pretrain'}
    shape = {name.split(',')[0]: (q.encoder_depth, q.output_stride) for name, p in nets.items() for q in [profile('demo', **p['overrides'])]}
    assert shape == {'g2d': (4, 32), 'finer grid': (4, 8), 'coarser grid': (5, 32), 'last stage dilated': (5, 16), 'last stage dilated shuffled': (5, 16)}
    network = ('encoder_depth', 'output_stride', 'decoder_channels')
    assert len({json.dumps({k: v for k, v in p['overrides'].items() if k not in network}, sort_keys=True) for p in nets.values()}) == 3       # one a seed
    tuned = [r.parameters for r in stage if r.experiment == 'segmentation']
    assert {(p.get('freeze'), p['steps']) for p in tuned} == {(None, 120), ('no', 400)}
    for name in nets: assert sorted(p['fraction'] for p in tuned if p['checkpoint'] == f'run:{name}/training' and p['steps'] == 120) == [.01, 1.], name


def test_batch_tables():
    "The rows that both tables have are the same runs; every pre-training builds a profile; three seeds a method; all tasks at full size."
    from g2d.models.comparators import comparator
    ideas, small, full = (read_rows(TABLES/f'{name}.yaml') for name in ('phantom_ideas', 'phantom_methods', 'phantombench'))
    for name in ('phantom_methods', 'phantom_ideas', 'phantom_attention', 'phantom_mpma', 'phantom_longer', 'phantom_tuning', 'phantom_stage', 'phantom_over_training', 'real_methods'): assert {r.threads for r in read_rows(TABLES/f'{name}.yaml')} == {1}, f'{name}: figures repeat to the last digit on one thread only'
    known = {r.name: (r.experiment, json.dumps(r.parameters, sort_keys=True)) for r in small}
    for r in ideas:
        if r.name.startswith('g2d,'): assert known[r.name] == (r.experiment, json.dumps(r.parameters, sort_keys=True))
    one = {k: v for r in small if r.name == 'segmentation, run:g2d, seed 0/training' for k, v in r.parameters.items() if k not in ('checkpoint', 'first_seed')}
    assert all({k: v for k, v in r.parameters.items() if k not in ('checkpoint', 'first_seed')} == one for r in ideas if r.experiment == 'segmentation')
    for table in (ideas, full):
        seeds = {}
        for r in table:
            if r.experiment != 'pretrain': continue
            p = comparator(r.parameters['method'], r.parameters['profile_name'], **r.parameters['overrides'])
            assert r.name.endswith(f', seed {p.seed}') and p.train_split == 'train'
            seeds.setdefault(r.name.rsplit(', seed', 1)[0], set()).add(p.seed)
        assert set(map(len, seeds.values())) == {3}
    assert {r.experiment for r in full} == {'pretrain', 'segmentation', 'classification', 'detection', 'zero_shot', 'grounding', 'retrieval'} and len(seeds) == 10


def test_version_is_that_of_the_committed_file_and_of_the_store(monkeypatch):
    "The prints are made again from the phantoms, and the store draws what the version says."
    import g2d.data.phantom, g2d.tasks.stores as stores
    from g2d.phantombench import bench_version
    assert json.loads((Path(__file__).parents[1]/'results'/'phantombench'/'version.json').read_text()) == bench_version()
    asked = {}
    monkeypatch.setattr(g2d.data.phantom, 'make_phantom_store', lambda path, n, **more: asked.update(path=path, films=n, **more))
    stores.find_store('phantombench')
    v = bench_version(1)
    assert {k: asked[k] for k in ('films', 'size', 'seed', 'split')} == {k: v[k] for k in ('films', 'size', 'seed', 'split')} and asked['path'].name == 'phantombench_v1'
    assert bench_version(2)['films_sha256'] != bench_version(1)['films_sha256']


def test_attention_rows_name_map_step_and_control():
    from g2d.phantombench import ATTENTION_COLUMNS, attention_rows
    def row(metric, name='attention, run:a b, seed 2/training', method='G2D, 6x6 cells', experiment='attention'): return dict(row=name, experiment=experiment, method=method, metric=metric, value=1/3)
    told = attention_rows(pd.DataFrame([row('iou, attention head 3, cells'), row('iou, attention head 3, cells, another film'), row('entropy, report, masked'), row('iou, report, smooth, mean of the others'),
        row('iou, report, cells, random masks'), row('iou, attention, one finding, cells'), row('dice', experiment='segmentation'), row('iou, truth, cells', method='G2D, 6x6 cells, untrained')]))
    assert tuple(told) == ATTENTION_COLUMNS and told.values.tolist() == [['a b', 2, 'attention head 3', 'cells', 'own film', 'iou', .3333], ['a b', 2, 'report', 'masked', 'own film', 'entropy', .3333],
        ['a b', 2, 'report', 'smooth', 'mean of the others', 'iou', .3333], ['a b, untrained', 2, 'truth', 'cells', 'own film', 'iou', .3333]]
    with pytest.raises(G2DError, match='nothing for attention.csv'): attention_rows(pd.DataFrame([row('dice', experiment='segmentation')]))


def test_attention_over_training_comes_from_the_kept_epochs(tmp_path):
    from g2d.phantombench import OVER_COLUMNS, over_training_rows, over_training_table
    for seed in range(2):
        (tmp_path/str(seed)).mkdir()
        pd.DataFrame([dict(epoch=e, map=m, head=h, shown=s, step='cells', metric='entropy', value=v, low=0., high=1.) for e in (0, 1) for m, h, s, v in
                      (('attention', 'mean', 'own', .5 + seed + e), ('attention', '2', 'own', 9.), ('attention', 'mean', 'another film', .25), ('report', '', 'own', 9.), ('prediction', '', 'own', None if e == 0 else .75))]).to_csv(tmp_path/str(seed)/'course.csv', index=False)
    frame = pd.DataFrame([dict(row=f'attention over training, run:a b, seed {s}/training', experiment='attention', folder=str(tmp_path/str(s)), metric=m) for s in range(3) for m in ('x', 'y')] + [dict(row='a b, seed 0', experiment='pretrain', folder=str(tmp_path/'0'), metric='x')])
    rows = over_training_rows(frame)
    assert tuple(rows) == OVER_COLUMNS
    assert rows.values.tolist() == [['a b', s, *r] for s in range(2) for r in ([0, 'attention', 'cells', 'own film', 'entropy', .5 + s], [0, 'attention', 'cells', 'another film', 'entropy', .25],
        [1, 'attention', 'cells', 'own film', 'entropy', 1.5 + s], [1, 'attention', 'cells', 'another film', 'entropy', .25], [1, 'prediction', 'cells', 'own film', 'entropy', .75])]
    told = over_training_table(rows)
    assert told[['measure', 'method', 'epoch 0', 'epoch 1']].values.tolist() == [['entropy, cells', 'a b', 1., 2.]]
    with pytest.raises(G2DError, match='nothing for over_training.csv'): over_training_rows(frame[frame['experiment'] == 'pretrain'])


def test_course_comes_from_the_validation_of_each_epoch(tmp_path):
    from g2d.phantombench import COURSE_COLUMNS, course_rows, course_table
    for seed in range(2):
        (tmp_path/str(seed)/'training').mkdir(parents=True)
        pd.DataFrame(dict(epoch=[0, 1], step=[0, 9], val_loss=[3., 2.], iou_pseudo=[.1 + seed, .2 + seed], pointing_named=[None, .5])).to_csv(tmp_path/str(seed)/'training'/'validation.csv', index=False)
    frame = pd.DataFrame([dict(row=f'a b, seed {s}', experiment='pretrain', folder=str(tmp_path/str(s)), metric=m) for s in range(3) for m in ('x', 'y')] + [dict(row='segmentation, run:a b, seed 0/training', experiment='segmentation', folder=str(tmp_path/'0'), metric='x')])
    rows = course_rows(frame)
    assert tuple(rows) == COURSE_COLUMNS and rows.values.tolist() == [['a b', s, *r] for s in range(2) for r in ([0, 0, 'iou_pseudo', .1 + s], [1, 9, 'pointing_named', .5], [1, 9, 'iou_pseudo', .2 + s])]   # no loss, no empty value, no run without a file
    told = course_table(rows)
    assert told['metric'].tolist() == ['pointing_named', 'iou_pseudo'] and told['epoch 1'].tolist() == [.5, .7] and math.isnan(told['epoch 0'][0]) and told['epoch 0'][1] == .6
    assert not len(course_rows(frame[frame['experiment'] == 'segmentation']))
