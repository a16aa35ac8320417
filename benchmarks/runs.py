"""What the runner costs over bare papermill, and how soon a finished table is recognised, in one run.

    python benchmarks/runs.py                 # 20 runs of about 5 s, one at a time, both ways; then 200 finished rows

Bare papermill is a loop over `papermill.execute_notebook` in one process, with no check, key, lock or record. The runner is
`g2d.runs.run_table` with one worker: a start of the worker, checks, keys, locks, records. The two take turns run by run
(`--rounds` blocks), so that a busy moment of the machine hits both. Ends with status 1 where the overhead is above 10 %,
or the finished table takes 2 s or more (a fresh Python process, its imports included).
"""
import argparse, os, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat as nbf, pandas as pd


def notebook(path, seconds):
    "A notebook that keeps one core busy in three cells, as an experiment does."
    work = f'import time\nend = time.time() + {seconds/3}\nx = 0\nwhile time.time() < end: x += 1'
    nb = nbf.v4.new_notebook(cells=[nbf.v4.new_code_cell('n: int = 0\nfolder: str = ""', metadata=dict(tags=['parameters']))] + [nbf.v4.new_code_cell(work) for _ in range(3)])
    nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
    nbf.write(nb, path)
    return path


def table(path, source, numbers):
    path.write_text('experiment,n\n' + ''.join(f'{source},{n}\n' for n in numbers))
    return path


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', type=int, default=20); p.add_argument('--seconds', type=float, default=5.); p.add_argument('--rounds', type=int, default=2); p.add_argument('--rows', type=int, default=200)
    p.add_argument('--csv', help='append the figures to this file')
    a = p.parse_args()
    import logging, papermill
    from g2d.bench import machine
    from g2d.files import write_json
    from g2d.notebooks import _kernel_config
    from g2d.runs import plan_rows, read_rows, run_table
    logging.getLogger('papermill').setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        folder, ours, bare = Path(folder), 0., 0.
        source = notebook(folder/'busy.ipynb', a.seconds)
        blocks = [range(k*a.runs//a.rounds, (k + 1)*a.runs//a.rounds) for k in range(a.rounds)]
        for block in blocks:
            started = time.perf_counter()
            for n in block: papermill.execute_notebook(str(source), str(folder/f'{n}.ipynb'), dict(n=n + 1), kernel_name='python3', progress_bar=False, config=_kernel_config())
            bare += time.perf_counter() - started
            started = time.perf_counter()
            found = run_table(table(folder/'t.csv', source, [n + 1 for n in block]), 1, output_root=folder/'out', progress=False)
            ours += time.perf_counter() - started
            assert (found.state == 'done').all()
        many = table(folder/'many.csv', source, range(1, a.rows + 1))
        for plan in plan_rows(read_rows(many), folder/'out'):
            plan.folder.mkdir(parents=True, exist_ok=True)
            write_json(plan.folder/'done.json', dict(seconds=1, parameters=plan.parameters))
        times = []
        for _ in range(5):
            started = time.perf_counter()
            text = subprocess.run([sys.executable, '-c', 'from g2d.cli import main; main()', 'run', str(many), '--output', str(folder/'out')], capture_output=True, text=True, check=True).stdout
            times.append(time.perf_counter() - started)
            assert f'{a.rows} done of {a.rows}' in text, text
    overhead, recognised = ours/bare - 1, sorted(times)[len(times)//2]
    row = dict(command='python benchmarks/runs.py ' + ' '.join(sys.argv[1:]), machine=machine(), runs=a.runs, bare_s=round(bare, 2), runner_s=round(ours, 2), overhead=round(overhead, 4),
               rows=a.rows, recognised_s=round(recognised, 3), slowest_s=round(max(times), 3))
    for key, value in row.items(): print(f'{key:14} {value}')
    if a.csv: pd.DataFrame([row]).to_csv(a.csv, mode='a', header=not Path(a.csv).exists(), index=False)
    sys.exit(int(overhead > .1 or recognised >= 2))


if __name__ == '__main__': main()
