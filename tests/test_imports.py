"Rooms import only what stands to their left, nothing goes round in circles, and `g2d --help` does not wait for torch."
import ast, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
# DESIGN 2 and 3: data <- models <- pseudo_mask, losses <- pretrain <- tasks <- runs <- results; a module may use its own room and those to the left
rooms = ['settings files profiles threads fork_server', 'views', 'data', 'models', 'pseudo_mask losses local_alignment', 'metrics validation checkpoint', 'pretrain', 'tasks', 'notebooks runs',
         'results published compare phantombench evidence', 'explorer demo bench', 'cli']
rank = {name: i for i, names in enumerate(rooms) for name in names.split()}


def modules():
    return {'.'.join(('g2d', *p.relative_to(root/'g2d').with_suffix('').parts)): p for p in sorted((root/'g2d').rglob('*.py')) if p.name[0] != '_'}


def imports(name, path, known):
    "The modules of g2d that `name` imports, at the top or inside a function."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): targets = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name.split('.')[:-node.level] if node.level else []
            base = '.'.join(base + ([node.module] if node.module else []))
            targets = [base] + [f'{base}.{a.name}' for a in node.names]
        else: continue
        found |= {t for t in targets if t in known and t != name}
    return found


def graph():
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def room(name): return name.split('.')[1]


def test_every_module_has_a_room():
    homeless = [name for name in modules() if room(name) not in rank]
    assert not homeless, f'say in tests/test_imports.py which room {homeless} belong to'


def test_imports_go_to_the_left():
    wrong = [f'{a} imports {b}' for a, targets in graph().items() for b in targets if rank.get(room(b), 99) > rank.get(room(a), 99)]
    assert not wrong, wrong


def cycle(links):
    "One cycle as a list of names, or None."
    state, path = {}, []
    def visit(name):
        state[name] = 'open'; path.append(name)
        for target in sorted(links[name]):
            if state.get(target) == 'open': return path[path.index(target):] + [target]
            if target not in state and (found := visit(target)): return found
        state[name] = 'done'; path.pop()
    for name in links:
        if name not in state and (found := visit(name)): return found


def test_no_cycles():
    assert cycle(graph()) is None, ' -> '.join(cycle(graph()))
    assert cycle(dict(a={'b'}, b={'c'}, c={'a'})) == ['a', 'b', 'c', 'a']          # the search itself can find one


def test_package_init_imports_nothing():
    for path in (root/'g2d').rglob('__init__.py'):
        assert not [n for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, (ast.Import, ast.ImportFrom))], path


heavy = 'torch torchvision timm transformers matplotlib sklearn skimage pandas accelerate'.split()


@pytest.mark.parametrize('code', ['import g2d', 'from g2d.settings import settings, G2DError; settings.data_root',
                                  'import sys; sys.argv = ["g2d", "--help"]\nfrom g2d.cli import main\ntry: main()\nexcept SystemExit as stop: assert not stop.code'],
                         ids=['import', 'settings', 'help'])
def test_light_start(code):
    done = subprocess.run([sys.executable, '-c', f'{code}\nimport sys\nprint("heavy:", [m for m in {heavy} if m in sys.modules])'],
                          cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == 'heavy: []'
