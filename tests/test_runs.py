"Tables of runs: everything wrong is told at once, nothing done is done twice, kills and failures cost nothing else."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import nbformat as nbf, pytest
from g2d.settings import G2DError
from g2d.files import read_json, write_json
from g2d.notebooks import parameters_of, run_key, key_parts, why_again, find_notebook, environment, end_old_kernel
from g2d.runs import read_rows, plan_rows, run_table, _Runner, _progress

experiments = sorted((Path(__file__).parents[1]/'nbs'/'experiments').glob('*.ipynb'))


def notebook(path, parameters, *code):
    nb = nbf.v4.new_notebook(cells=[nbf.v4.new_code_cell(parameters, metadata=dict(tags=['parameters'])), *(nbf.v4.new_code_cell(c) for c in code)])
    nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
    nbf.write(nb, path)
    return path


@pytest.fixture
def square(tmp_path):
    "A notebook that writes n squared, waits a little, and keeps a diary outside its folder."
    return notebook(tmp_path/'square.ipynb', 'n: int = 2\nwait: float = 0.0\ndiary: str = ""\nfolder: str = "."',
                    'import time, os\nif diary: open(diary, "a").write(f"begin {n}\\n")\ntime.sleep(wait)\nassert n < 1000, f"{n} is too large"',
                    'import json, pathlib\nfrom g2d.files import write_json\nwrite_json(pathlib.Path(folder)/"metrics.json", dict(square=n*n))\nif diary: open(diary, "a").write(f"end {n}\\n")')


def table(path, rows, columns='experiment,name,n,wait,diary'):
    path.write_text('\n'.join([columns, *(','.join(map(str, row)) for row in rows)]) + '\n')
    return path


@pytest.mark.parametrize('path', experiments, ids=lambda p: p.stem)
def test_parameters_are_read_as_papermill_reads_them(path):
    import ast, papermill
    theirs, ours = papermill.inspect_notebook(str(path)), parameters_of(path)
    assert list(ours) == list(theirs)
    for name, p in ours.items(): assert p.default == ast.literal_eval(theirs[name]['default']) and p.type == theirs[name]['inferred_type_name'].split('[')[0]


def test_all_problems_at_once(square, tmp_path):
    bad = table(tmp_path/'t.csv', [[square, 'a', 'five', '', ''], ['nothing', 'b', 1, '', ''], [square, 'a', 1, 'x', ''], [square, 'c', 1, '', 'run:zzz/a']])
    with pytest.raises(G2DError) as error: read_rows(bad)
    text = str(error.value)
    for part in ("row 2: n is 'five', expected int", 'row 3: There is no experiment "nothing"', "row 4: wait is 'x', expected float", 'both called "a"', 'needs "zzz"'): assert part in text
    table(bad, [[square, 'a', 1, '', 'run:b/x'], [square, 'b', 1, '', 'run:a/x']])
    with pytest.raises(G2DError, match='circle'): read_rows(bad)
    table(bad, [[square, 1]], 'experiment,m')
    with pytest.raises(G2DError, match='no parameter "m"; it has n, wait'): read_rows(bad)
    for content, match in (('experiment: 3', 'block needs'), ('- {experiment: x, grit: {}}', 'it has "grit"'), (': : :', 'not valid YAML'), (f'{{experiment: {square}, name: "a{{q}}", grid: {{n: [1]}}}}', 'not in the grid')):
        (tmp_path/'t.yaml').write_text(content)
        with pytest.raises(G2DError, match=match): read_rows(tmp_path/'t.yaml')
    with pytest.raises(G2DError, match='There is no table'): read_rows(tmp_path/'absent.csv')
    with pytest.raises(G2DError, match='no executor'): run_table(bad, executor='moon')
    with pytest.raises(G2DError, match='sink "paper"'): run_table(bad, sink='paper')
    assert not (tmp_path/'square').exists()


def test_yaml_grid(square, tmp_path):
    (tmp_path/'t.yaml').write_text(f'- {{experiment: {square}, name: "n{{n}}w{{wait}}", grid: {{n: [1, 2, 3], wait: [0, 0.5]}}, parameters: {{diary: x}}}}\n- {{experiment: {square}, parameters: {{n: 9}}}}\n')
    rows = read_rows(tmp_path/'t.yaml')
    assert [r.name for r in rows] == ['n1w0', 'n1w0.5', 'n2w0', 'n2w0.5', 'n3w0', 'n3w0.5', 'run 7']
    assert rows[1].parameters == dict(diary='x', n=1, wait=.5) and isinstance(rows[0].parameters['wait'], float)


def test_key_covers_cells_parameters_version_and_store(square, tmp_path, monkeypatch):
    first = run_key(square, dict(n=3))
    assert run_key(square, dict(n=4)) != first and run_key(square, dict(n=3, wait=0.)) == first
    store = notebook(tmp_path/'s.ipynb', 'store: str = ""', 'pass')
    (tmp_path/'data').mkdir(); (tmp_path/'data'/'manifest.json').write_text(json.dumps(dict(sha256=dict(a='1'))))
    one = run_key(store, dict(store=str(tmp_path/'data')))
    (tmp_path/'data'/'manifest.json').write_text(json.dumps(dict(sha256=dict(a='2'))))
    assert run_key(store, dict(store=str(tmp_path/'data'))) != one
    import g2d
    monkeypatch.setattr(g2d, '__version__', '99')
    assert run_key(square, dict(n=3)) != first
    assert {'python', 'versions', 'commit', 'command', 'cores'} <= set(environment())


def test_threads_of_a_row_are_those_of_its_kernel_and_of_its_key(tmp_path):
    "Whatever the number of workers: a row that names its cores computes on them."
    book = notebook(tmp_path/'cores.ipynb', 'n: int = 2\nfolder: str = "."', 'import os, pathlib\nfrom g2d.files import write_json\nwrite_json(pathlib.Path(folder)/"metrics.json", dict(threads=int(os.environ.get("OMP_NUM_THREADS", 0))))')
    (tmp_path/'t.yaml').write_text(f'- {{experiment: {book}, name: one, threads: 1}}\n- {{experiment: {book}, name: three, threads: 3, parameters: {{n: 3}}}}\n- {{experiment: {book}, name: any, parameters: {{n: 2}}}}\n')
    rows = read_rows(tmp_path/'t.yaml')
    assert [r.threads for r in rows] == [1, 3, None] and all('threads' not in r.parameters for r in rows)
    plans = plan_rows(rows, tmp_path/'out')
    assert plans[0].folder != plans[2].folder and plans[2].folder.name == run_key(book, dict(n=2))
    assert run_table(tmp_path/'t.yaml', workers=1, output_root=tmp_path/'out', progress=False)['state'].tolist() == ['done']*3
    found = [(read_json(p.folder/'metrics.json')['threads'], read_json(p.folder/'environment.json')['threads']) for p in plans]
    assert found[:2] == [(1, '1'), (3, '3')] and found[2][0] != 3
    assert 'computes on 3 threads instead of any number' in why_again(plans[2].parts | dict(threads=3), plans[2].folder.parent)
    for text in ('0', 'two', '1.5', 'true'):
        (tmp_path/'t.yaml').write_text(f'- {{experiment: {book}, threads: {text}}}\n')
        with pytest.raises(G2DError, match='threads is'): read_rows(tmp_path/'t.yaml')
    table(tmp_path/'t.csv', [[book, 'a', 3, 2], [book, 'b', 3, '']], 'experiment,name,n,threads')
    assert [r.threads for r in read_rows(tmp_path/'t.csv')] == [2, None]


def test_one_row_and_what_it_needs(square, tmp_path, monkeypatch, capsys):
    from g2d.cli import main
    rows = table(tmp_path/'t.csv', [[square, 'first', 1, '', ''], [square, 'second, [x]', 2, '', 'run:first/metrics.json'], [square, 'third', 3, '', '']], 'experiment,name,n,wait,diary')
    rows.write_text(rows.read_text().replace('second, [x]', '"second, [x]"'))
    found = run_table(rows, output_root=tmp_path/'out', progress=False, only=['second*'], dry_run=True)
    assert found['name'].tolist() == ['first', 'second, [x]'] and found['row'].tolist() == [2, 3]
    for word, code, said in (('third', 0, '1 done of 1'), ('third', 0, '1 done of 1'), ('fourth', 2, 'No row of')):
        monkeypatch.setattr(sys, 'argv', ['g2d', 'run', str(rows), '--output', str(tmp_path/'out'), '--only', word])
        with pytest.raises(SystemExit) as stop: main()
        printed = capsys.readouterr()
        assert stop.value.code in ((0, None) if code == 0 else (code,)) and said in printed.out + printed.err
    assert len(list((tmp_path/'out'/'square').glob('*/done.json'))) == 1


def test_one_failure_among_twelve(square, tmp_path, monkeypatch, capsys):
    from g2d.cli import main
    diary = tmp_path/'diary'
    path = table(tmp_path/'t.csv', [[square, '', 5000 if k == 4 else k, '', diary] for k in range(12)])
    command = ['g2d', 'run', str(path), '--workers', '2', '--output', str(tmp_path/'out')]
    monkeypatch.setattr(sys, 'argv', command)
    with pytest.raises(SystemExit) as stop: main()
    assert stop.value.code == 1 and 'row 6' in capsys.readouterr().err
    done, failed = list(tmp_path.glob('out/square/*/done.json')), list(tmp_path.glob('out/square/*/failed.json'))
    assert len(done) == 11 and len(failed) == 1
    why = read_json(failed[0])
    assert why['cell'] == 3 and '5000 is too large' in why['error'] and 'AssertionError' in ''.join(why['traceback']) and 'assert n < 1000' in why['source']
    before = diary.read_text().splitlines()
    with pytest.raises(SystemExit): main()
    assert diary.read_text().splitlines()[len(before):] == ['begin 5000']
    found = run_table(path, output_root=tmp_path/'out', dry_run=True)
    assert found.state.value_counts().to_dict() == dict(done=11, failed=1) and found.estimate.notna().sum() == 1
    monkeypatch.setattr(sys, 'argv', [*command, '--dry-run'])
    with pytest.raises(SystemExit) as stop: main()
    assert stop.value.code == 0 and '1 of 12 to run' in capsys.readouterr().out


@pytest.mark.parametrize('silent, began, error', [(1, False, None), (3, False, "Kernel didn't respond"), (1, True, "Kernel didn't respond")])
def test_a_kernel_that_does_not_answer_is_started_again(square, tmp_path, monkeypatch, silent, began, error):
    "Twice, and never once a cell has begun: its work would be done again."
    import papermill
    from g2d.notebooks import run_notebook
    true, calls, folder = papermill.execute_notebook, [], tmp_path/'out'/'run'
    def execute(*words, **named):
        calls.append(1)
        if len(calls) > silent: return true(*words, **named)
        if began: write_json(folder/'state.json', dict(cell=1, cells=3, time=0.))
        raise RuntimeError("Kernel didn't respond in 60 seconds")
    monkeypatch.setattr(papermill, 'execute_notebook', execute)
    if error is None:
        run_notebook(square, dict(n=3), folder=folder, progress=False)
        assert (folder/'done.json').is_file() and len(calls) == 2 and 'a new kernel is started' in (folder/'log.txt').read_text()
    else:
        with pytest.raises(G2DError, match=error): run_notebook(square, dict(n=3), folder=folder, progress=False)
        assert read_json(folder/'failed.json')['error'].endswith('in 60 seconds') and len(calls) == (1 if began else 3)


def test_changed_cell_says_why(square, tmp_path, monkeypatch):
    path = table(tmp_path/'t.csv', [[square, 'a', 3, '', '']])
    monkeypatch.chdir(tmp_path)
    assert run_table(path, output_root='out', progress=False).state.tolist() == ['done'] # a relative folder, although kernels stand elsewhere
    doc = json.loads(square.read_text()); doc['cells'][-1]['source'] = doc['cells'][-1]['source'] + ('\npass' if isinstance(doc['cells'][-1]['source'], str) else ['\npass'])
    square.write_text(json.dumps(doc))
    found = run_table(path, output_root=tmp_path/'out', dry_run=True)
    assert found.state.tolist() == ['new'] and found.why[0].startswith('code cell 3 changed since')


def test_needs(square, tmp_path):
    reader = notebook(tmp_path/'reader.ipynb', 'of: str = ""\nfolder: str = "."', 'import json\nfrom g2d.notebooks import write_metrics\nwrite_metrics(folder, got=json.load(open(of))["square"])')
    path = table(tmp_path/'t.csv', [[reader, 'late', '', 'run:early/metrics.json'], [square, 'early', 7, ''], [square, 'broken', 7000, ''], [reader, 'never', '', 'run:broken/metrics.json']], 'experiment,name,n,of')
    found = run_table(path, workers=2, output_root=tmp_path/'out', progress=False).set_index('name')
    assert found.state.to_dict() == dict(late='done', early='done', broken='failed', never='blocked')
    assert read_json(Path(found.folder['late'])/'metrics.json') == dict(got=49)
    (tmp_path/'out').rename(tmp_path/'elsewhere') # keys do not hold paths
    assert run_table(path, output_root=tmp_path/'elsewhere', dry_run=True).state.tolist() == ['done', 'done', 'failed', 'new']


def test_submitit_runs_the_same_table(square, tmp_path):
    pytest.importorskip('submitit')
    path = table(tmp_path/'t.csv', [[square, '', k, '', ''] for k in (1, 2, 5000)])
    found = run_table(path, workers=2, executor='submitit', output_root=tmp_path/'out', progress=False)
    assert found.state.tolist() == ['done', 'done', 'failed'] and 'too large' in found.error[2]


def test_sink_gets_parameters_and_metrics(square, tmp_path, monkeypatch):
    import types, importlib.machinery
    seen = []
    fake = types.ModuleType('trackio'); fake.__spec__ = importlib.machinery.ModuleSpec('trackio', None)
    fake.init, fake.log, fake.finish = (lambda **k: seen.append(k)), seen.append, (lambda: None)
    monkeypatch.setitem(sys.modules, 'trackio', fake)
    run_table(table(tmp_path/'t.csv', [[square, 'a', 3, '', '']]), output_root=tmp_path/'out', progress=False, sink='trackio')
    assert seen[0]['config'] == dict(n='3') and seen[1] == dict(square=9)


def children(pid):
    "All processes below one."
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        try: parent = int(path.read_text().rpartition(')')[2].split()[1])
        except OSError: continue
        found.append((int(path.parent.name), parent))
    below, todo = [], [pid]
    while todo:
        here = todo.pop(); more = [c for c, p in found if p == here]
        below += more; todo += more
    return below


def kind(pid):
    try: text = Path(f'/proc/{pid}/cmdline').read_text()
    except OSError: return ''
    return 'kernel' if 'ipykernel' in text else 'worker' if 'g2d.runs' in text else ''


@pytest.mark.skipif(not Path('/proc').exists(), reason='needs /proc to find kernels')
def test_kills_cost_nothing_that_was_done(square, tmp_path):
    "24 runs, 2 workers; the runner, workers and kernels are killed ten times."
    diary, out, rng = tmp_path/'diary', tmp_path/'out', random.Random(3)
    path = table(tmp_path/'t.csv', [[square, '', k, .4, diary] for k in range(24)])
    command = [sys.executable, '-c', 'from g2d.cli import main; main()', 'run', str(path), '--workers', '2', '--output', str(out)]
    finished, kills = {}, 0
    def look(): return {p.parent.name: (p.stat().st_mtime_ns, (p.parent/'metrics.json').read_bytes()) for p in out.glob('square/*/done.json')}
    def check():
        now = look()
        assert all(now.get(key) == value for key, value in finished.items()), 'a finished run was done again'
        finished.update(now)
    for attempt in range(40):
        runner = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while runner.poll() is None and kills < 10:
            time.sleep(rng.uniform(.8, 3.))
            below = children(runner.pid)
            victims = dict(runner=[runner.pid], worker=[p for p in below if kind(p) == 'worker'], kernel=[p for p in below if kind(p) == 'kernel'])
            who = rng.choice(['runner', 'worker', 'kernel', 'kernel'])
            if not victims[who] or runner.poll() is not None: continue
            try: os.kill(rng.choice(victims[who]), signal.SIGKILL)
            except ProcessLookupError: continue
            kills += 1
            check()
            if who == 'runner': break
        code = runner.wait(timeout=240)
        check()
        if code == 0: break
    assert code == 0 and kills >= 8
    assert len(finished) == 24 and not list(out.glob('square/*/failed.json'))
    assert sorted(json.loads(data)['square'] for _, data in finished.values()) == [k*k for k in range(24)]
    assert not [p for p in out.rglob('*.tmp')] or all('done' not in p.name for p in out.rglob('*.tmp'))
    ends = [line for line in diary.read_text().splitlines() if line.startswith('end')]
    done_twice = len(ends) - len(set(ends)) # the last cell ran, and the kill came before done.json was written
    assert done_twice <= kills


def test_two_runners_share_a_table(square, tmp_path):
    diary, out = tmp_path/'diary', tmp_path/'out'
    path = table(tmp_path/'t.csv', [[square, '', 5000 if k == 5 else k, .3, diary] for k in range(10)])
    command = [sys.executable, '-c', 'from g2d.cli import main; main()', 'run', str(path), '--output', str(out)]
    two = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    texts = [p.communicate(timeout=240)[0] for p in two]
    assert [p.returncode for p in two] == [1, 1], texts
    lines = diary.read_text().splitlines()
    assert sorted(lines) == sorted([f'end {k}' for k in range(10) if k != 5] + [f'begin {k}' for k in range(10) if k != 5] + ['begin 5000'])
    assert len(list(out.glob('square/*/done.json'))) == 9


def test_interrupt_ends_cleanly_and_a_second_run_continues(square, tmp_path):
    out = tmp_path/'out'
    path = table(tmp_path/'t.csv', [[square, '', k, 1.5, ''] for k in range(4)])
    command = [sys.executable, '-c', 'from g2d.cli import main; main()', 'run', str(path), '--output', str(out), '--workers', '2']
    runner = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # tests started with nohup hand on an ignored Ctrl-C
    for _ in range(400):
        if list(out.glob('square/*/done.json')): break
        time.sleep(.05)
    below = children(runner.pid)
    runner.send_signal(signal.SIGINT)
    text = runner.communicate(timeout=60)[1]
    assert runner.returncode == 130 and 'the same command continues' in text and 'Traceback' not in text
    for _ in range(100):
        alive = [p for p in below if kind(p)]
        if not alive: break
        time.sleep(.1)
    assert not alive
    assert run_table(path, 2, output_root=out, progress=False).state.tolist() == ['done']*4


def test_progress_is_read_from_the_log(tmp_path):
    (tmp_path/'state.json').write_text(json.dumps(dict(cell=3, cells=9, time=0)))
    (tmp_path/'log.txt').write_text('hello\rpre-training:  45%|####5     | 12/30 [00:10<00:20, 85.2img/s, loss=2.1]')
    assert _progress(tmp_path) == ('3/9', '12/30, 85.2img/s, 00:20 left')
    assert _progress(tmp_path/'absent') == ('', '')


@pytest.mark.parametrize('path', sorted((Path(__file__).parents[1]/'nbs'/'experiments'/'tables').glob('*.yaml')), ids=lambda p: p.stem)
def test_ready_tables_can_be_run(path, tmp_path):
    "Every row names a notebook, parameters and rows that exist; a paper table has a phantom twin that needs no data."
    rows = read_rows(path)
    plans = plan_rows(rows, tmp_path)
    assert len({p.folder for p in plans}) == len(plans), 'two rows are the same run'
    text = path.read_text()
    if path.stem.startswith('paper_'):
        assert (path.parent/f'phantom_{path.stem[6:]}.yaml').is_file() and 'Estimate' in text and 'store:' in text
    elif path.stem == 'phantombench': assert 'Estimate' in text and 'store: "phantombench"' in text   # for a GPU; needs no data
    elif path.stem not in ('ablations', 'methods', 'real_shared'): assert 'store:' not in text.replace('"store":', '').replace('store: "', ' ') and '"cuda"' not in text
