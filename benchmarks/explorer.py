"""How fast the explorer answers: a redraw for each control after the first pass, and the time from `g2d explore` to the first picture.

    python benchmarks/explorer.py                        # both, with the best checkpoint below the output folder
    python benchmarks/explorer.py --no-start --checkpoint outputs/first --threads 2
A redraw is everything between the change of a control and the new pictures handed to the browser: processor, figures, pictures, encoding."""
import argparse, json, os, re, shutil, subprocess, sys, time
import numpy as np

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')   # as the command line and the app do, before torch is there


def redraws(explorer, repeats):
    "Seconds of each redraw by the clock and of the processor, by control."
    c, seconds = explorer.controls, {}
    def timed(name, value):
        start = time.perf_counter(), time.process_time(); c[name].value = value
        seconds.setdefault(name, []).append((time.perf_counter() - start[0], time.process_time() - start[1]))
    heads = [value for _, value in c['head'].options]
    for k in range(repeats):
        timed('percentile', round(.5 + .49*((k*37 + 1) % 97)/97, 4))            # never a value that was there before
        timed('sigma_space', .3 + .0731*(k + 1)); timed('sigma_color', .4 + .0137*(k + 1))
        timed('upsample', ('bilinear', 'nearest', 'bicubic')[k % 3]); timed('head', heads[k % len(heads)])
        timed('phrase', f'opacity number {k}'); timed('report', f'FINDINGS: report number {k}. IMPRESSION: effusion on the left.')
        timed('place', 2 + k % (c['place'].max - 1))
    return seconds


def line(name, values):
    values, used = 1e3*np.asarray(values).T
    return f'{np.median(values):6.0f} ms median {np.quantile(values, .95):6.0f} ms 95 % {values.max():6.0f} ms worst of {len(values):4}; {np.median(used):6.0f} ms of the processor  {name}'


def first_picture(words):
    "Seconds from the command to the film, and to all pictures, in a real browser."
    from playwright.sync_api import sync_playwright
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, '-c', 'from g2d.cli import main; main()', 'explore', '--no-browser', *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        with sync_playwright() as p:       # the browser starts beside the server, as a user's is open already
            page = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu']).new_page()
            address = re.search(r'http\S+', process.stdout.readline())[0]
            served = time.perf_counter() - start
            page.goto(address, timeout=120_000)
            page.wait_for_selector('.g2d-mask img', timeout=120_000); film = time.perf_counter() - start
            page.wait_for_selector('.g2d-steps img', timeout=120_000)
            return dict(server=served, film=film, all_pictures=time.perf_counter() - start)
    finally:
        process.terminate(); process.wait(20)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--checkpoint'); parser.add_argument('--store')
    parser.add_argument('--repeats', type=int, default=40); parser.add_argument('--threads', type=int, default=2); parser.add_argument('--starts', type=int, default=3)
    parser.add_argument('--no-start', action='store_true', help='redraws only, without a browser')
    a = parser.parse_args()
    print(f'python {" ".join(sys.argv)}\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}')
    if not a.no_start:
        for _ in range(a.starts):
            times = first_picture([word for flag, value in (('--checkpoint', a.checkpoint), ('--store', a.store)) if value for word in (flag, value)])
            print(json.dumps({name: round(value, 1) for name, value in times.items()}), f'seconds after the command, load {os.getloadavg()[0]:.1f}')
    import torch
    from g2d.explorer import Explorer
    torch.set_num_threads(a.threads)
    explorer = Explorer(a.checkpoint, a.store, wait=True)
    print(f'{a.threads} threads, {explorer.controls["model"].label}, the model sees {explorer.session.model(explorer.choice.model).profile.crop_size} pixels, load {os.getloadavg()[0]:.1f}')
    for compare in (False, True):
        if compare: explorer.pin()
        seconds = redraws(explorer, a.repeats)
        print('two sides' if compare else 'one side')
        for name, values in seconds.items(): print(line(name, values))
        print(line('all', np.concatenate(list(seconds.values()))))
