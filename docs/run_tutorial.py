"""Runs every command and every cell of tutorial.md in an empty folder and writes what they print back into the page.

    python docs/run_tutorial.py            (minutes; `make docs-tutorial`)

A fence `sh` or `py` is run; the fence `text` that follows it is replaced by its output. Pictures that the page shows from
images/tutorial_*.png are copied out of the folder. Nothing is written unless everything ran.
"""
import contextlib, io, os, re, subprocess, sys, tempfile
from pathlib import Path

docs = Path(__file__).resolve().parent
FENCE = re.compile(r'^```(sh|py)\n(.*?)^```\n(\n```text\n.*?^```\n)?', re.S | re.M)
SKIP = '# not run here'  # first line of a fence that changes the machine


def run_shell(code, folder):
    "Standard output of a script; stops on the first command that fails."
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(['bash', '-euo', 'pipefail', '-c', code], cwd=folder, text=True, capture_output=True, env=os.environ | dict(PATH=path, G2D_DATA='', COLUMNS='100'))
    if done.returncode: sys.exit(f'{code}\nfailed with {done.returncode}:\n{done.stdout}{done.stderr[-3000:]}')
    return done.stdout


def run_python(code, names):
    "What the lines print."
    with contextlib.redirect_stdout(io.StringIO()) as out: exec(code, names)
    return out.getvalue()


def small_png(source, target):
    "A picture with 256 colours: a third of the size, and nothing that is seen."
    from PIL import Image
    Image.open(source).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def main():
    page, names, parts, place = docs/'tutorial.md', {}, [], 0
    text = page.read_text(encoding='utf-8')
    os.environ['G2D_DATA'] = ''
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for fence in FENCE.finditer(text):
            kind, code = fence[1], fence[2]
            parts.append(text[place:fence.start()] + f'```{kind}\n{code}```\n')
            place = fence.end()
            if code.startswith(SKIP): continue
            print(f'== {code.strip().splitlines()[0]}', file=sys.stderr, flush=True)
            said = (run_shell(code, folder) if kind == 'sh' else run_python(code, names)).replace(folder, '~/first').rstrip()
            if said: parts.append(f'\n```text\n{said}\n```\n')
        for name in re.findall(r'images/(tutorial_\w+\.png)', text): small_png(Path(folder)/name, docs/'images'/name)
        os.chdir(docs)
    page.write_text(''.join(parts) + text[place:], encoding='utf-8')


if __name__ == '__main__': main()
