"One page a public module, from its signatures, docstrings and the comments beside its parameters; and the command line, from typer."
import ast, dataclasses, importlib, inspect, pkgutil, re, textwrap
from functools import lru_cache
from pathlib import Path
from pages import root

HIDDEN = ('g2d._modidx',)


@lru_cache
def modules():
    "Names of all public modules, in the order of their folders."
    import g2d
    names = [m.name for m in pkgutil.walk_packages(g2d.__path__, 'g2d.') if not m.ispkg and not m.name.rpartition('.')[2].startswith('_')]
    return tuple(sorted((n for n in names if n not in HIDDEN), key=lambda n: (n.count('.'), n)))


def notebook_modules():
    "Path of a notebook under nbs/ -> the module that is exported from it."
    found = {}
    for name in modules():
        path = root/'g2d'/Path(*name.split('.')[1:]).with_suffix('.py')
        if match := re.search(r'File to edit: (?:\.\./)+nbs/(\S+\.ipynb)', path.read_text(encoding='utf-8')): found[match[1]] = name
    return found


def public(module): return [n for n in getattr(module, '__all__', [n for n in vars(module) if not n.startswith('_')]) if hasattr(module, n)]


@lru_cache
def known():
    "Bare name -> full name, for names that only one module has."
    found = {}
    for name in modules():
        for n in public(importlib.import_module(name)): found.setdefault(n, []).append(f'{name}.{n}')
    return {n: full[0] for n, full in found.items() if len(full) == 1}


def marked(text, inside=''):
    "A docstring or comment as MyST: what is no code is escaped, a known name in backticks becomes a link."
    parts = re.split(r'(`[^`]*`)', ' '.join(text.split()))
    for i, part in enumerate(parts):
        if i % 2: parts[i] = f'{{py:obj}}`{part[1:-1]} <{known()[part[1:-1]]}>`' if part[1:-1] in known() and part[1:-1] != inside else part.replace('|', r'\|')
        else: parts[i] = re.sub(r'([*<>${}|\\_^~#])', r'\\\1', part)
    return ''.join(parts)


def _tree(thing):
    "The syntax tree of a function or class, or nothing where there is no source."
    try: return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except (OSError, TypeError, SyntaxError): return None


def _comments(thing):
    from fastcore.docments import docments
    try: return {k: v for k, v in docments(thing).items() if v}
    except Exception: return {}   # no source, or a form that docments does not read: then there is no comment to show


def _code(text): return '`' + text.replace('|', r'\|').replace('`', "'") + '`' if text else ''


def parameters(function):
    "(name, type, default, comment) of each parameter, (type, comment) of what is returned, and the short signature."
    tree, comments = _tree(function), _comments(function)
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        try: names = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError): return [], ('', ''), '()'
        return [(p.name, '', '', comments.get(p.name, '')) for p in names], ('', ''), f'({", ".join(str(p.replace(annotation=p.empty, default=p.empty)) for p in names)})'
    a, rows, short = tree.args, [], []
    plain = a.posonlyargs + a.args
    defaults = dict(zip([x.arg for x in plain[len(plain)-len(a.defaults):]], a.defaults)) | {x.arg: d for x, d in zip(a.kwonlyargs, a.kw_defaults) if d is not None}
    order = [('', x) for x in plain] + ([('*', a.vararg)] if a.vararg else []) + [('', x) for x in a.kwonlyargs] + ([('**', a.kwarg)] if a.kwarg else [])
    for star, x in order:
        if x.arg in ('self', 'cls'): continue
        if x in a.kwonlyargs and not a.vararg and '*' not in short: short.append('*')
        default = ast.unparse(defaults[x.arg]) if x.arg in defaults else ''
        rows.append((star + x.arg, ast.unparse(x.annotation) if x.annotation else '', default, comments.get(x.arg, '')))
        short.append(star + x.arg + (f'={default if len(default) <= 24 else "..."}' if default else ''))
    back = (ast.unparse(tree.returns).strip("'\"") if tree.returns else '', comments.get('return', ''))
    return rows, back, f'({", ".join(short)})'


def fields(cls):
    "The same for the fields of a dataclass or a named tuple."
    comments, tree = _comments(cls), _tree(cls)
    if dataclasses.is_dataclass(cls) and not isinstance(tree, ast.ClassDef):
        return [(f.name, '', repr(f.default) if f.default is not dataclasses.MISSING else '', f.metadata.get('doc', '')) for f in dataclasses.fields(cls)]
    return [(x.target.id, ast.unparse(x.annotation), ast.unparse(x.value) if x.value else '', comments.get(x.target.id) or '')
            for x in tree.body if isinstance(x, ast.AnnAssign) and not x.target.id.startswith('_')]


def table(rows, back=('', ''), head='parameter', inside=''):
    "The table of a signature; a function without parameters and without a described result has none."
    if not rows and not any(back): return ''
    lines = [f'| {head} | type | default | meaning |', '|---|---|---|---|']
    lines += [f'| {_code(name)} | {_code(kind)} | {_code(default)} | {marked(comment or "", inside)} |' for name, kind, default, comment in rows]
    if any(back): lines.append(f'| **returns** | {_code(back[0])} | | {marked(back[1] or "", inside)} |')
    return '\n'.join(lines)


def _entry(kind, signature, body, colons, options=''):
    fence = ':'*colons
    return f'{fence}{{py:{kind}}} {signature}\n{options}\n' + '\n\n'.join(b for b in body if b) + f'\n{fence}'


def _function(name, function, kind='function', colons=4, options=''):
    rows, back, short = parameters(function)
    bare = name.rpartition('.')[2]
    return _entry(kind, name + short, [marked(inspect.getdoc(function) or '', bare), table(rows, back, inside=bare)], colons, options)


def _own(cls, name):
    "Whether the class itself, and not a library above it, has the method."
    return any(name in vars(c) for c in cls.__mro__ if (c.__module__ or '').startswith('g2d'))


def _class(name, cls):
    is_tuple = issubclass(cls, tuple) and hasattr(cls, '_fields')
    if dataclasses.is_dataclass(cls) or is_tuple:
        rows = fields(cls)
        body, short = [table(rows, head='field', inside=name)], f'({", ".join(r[0] for r in rows)})' if len(rows) < 12 else '(...)'
    elif _own(cls, '__init__'):
        rows, back, short = parameters(cls.__init__)
        body = [table(rows, inside=name)]
    else: body, short = [], '()'
    text = vars(cls).get('__doc__') or ''
    if is_tuple and text.startswith(f'{name}('): text = ''
    body = [marked(text.partition(' Fields: ')[0], name)] + body
    for method in [n for c in cls.__mro__ if (c.__module__ or '').startswith('g2d') for n in vars(c)]:
        if method.startswith('_') and method != '__call__' or f' {method}(' in str(body) or f'.{method}' in str(body) or any(r[0] == method for r in (rows if is_tuple or dataclasses.is_dataclass(cls) else ())): continue
        thing = inspect.getattr_static(cls, method)
        if isinstance(thing, property): body.append(_entry('property', method, [marked(inspect.getdoc(thing) or '')], 3))
        elif isinstance(thing, (staticmethod, classmethod)): body.append(_function(method, thing.__func__, 'method', 3, f':{type(thing).__name__}:\n'))
        elif inspect.isfunction(thing): body.append(_function(method, thing, 'method', 3))
    kind = 'exception' if issubclass(cls, BaseException) else 'class'
    return _entry(kind, name + ('' if kind == 'exception' else short), body, 4)


def _value(name, value):
    "A constant: plain values are shown, everything else by its type."
    if isinstance(value, (str, int, float, bool, tuple, frozenset)): shown = repr(value) if len(repr(value)) < 300 else f'{type(value).__name__} of {len(value)}'
    elif isinstance(value, (dict, list, set)):
        keys = ', '.join(map(str, list(value)[:12])) if all(isinstance(v, str) for v in value) else ''
        shown = f'{type(value).__name__} of {len(value)}' + (f': {keys}' + (', ...' if len(value) > 12 else '') if keys else '')
    else: shown = f'{type(value).__module__}.{type(value).__name__}'
    return _entry('data', name, [_code(shown)], 4)


def module_page(name):
    module = importlib.import_module(name)
    notebook = {m: n for n, m in notebook_modules().items()}.get(name)
    first = f'From the notebook [{notebook}](../notebooks/{notebook}), which explains it with examples and pictures.' if notebook else ''
    parts = [f'# {name}', f':::{{py:module}} {name}\n:::', marked((module.__doc__ or '').partition('\n\n')[0]) + ('.' if module.__doc__ and not module.__doc__.rstrip().endswith('.') else ''), first]
    for n in public(module):
        thing = getattr(module, n)
        parts.append(_class(n, thing) if inspect.isclass(thing) else _function(n, thing) if callable(thing) and inspect.isroutine(inspect.unwrap(thing)) else _value(n, thing))
    return '\n\n'.join(p for p in parts if p) + '\n'


def _cell(text): return re.sub(r'([|<>*_])', r'\\\1', ' '.join(str(text or '').split()))


def _kind(parameter):
    "Type of an option in a word."
    kind = parameter.type_descriptor.annotation if hasattr(parameter, 'type_descriptor') else parameter.type.name   # typer before 0.20 speaks click's language
    inner = [a for a in getattr(kind, '__args__', ()) if a is not type(None)] or [kind]
    word = inner[0] if isinstance(inner[0], str) else inner[0].__name__
    word = dict(Path='path', str='text', int='number', float='number', bool='flag', integer='number', boolean='flag').get(word, word)
    return word + (', may be repeated' if getattr(parameter, 'multiple', False) else '')


def command_line():
    "Every command of g2d with its options, as `--help` has them."
    import typer
    from g2d.cli import app
    group = typer.main.get_command(app)
    parts = ['# Command line', marked(group.help or ''), 'Every command has `--help`, shows its progress, and ends with one sentence and exit code 2 when something is wrong with what it was given.']
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == 'argument']
        options = [p for p in command.params if p.param_type_name == 'option']
        usage = ' '.join(['g2d', name, *((p.metavar or p.name.upper()).strip('{}') for p in arguments), *(['[OPTIONS]'] if options else [])])
        lines = ['| | type | default | meaning |', '|---|---|---|---|']
        for p in arguments + options:
            flags = ', '.join(p.opts + p.secondary_opts) if p in options else (p.metavar or p.name.upper()).strip('{}')
            kind = _kind(p)
            default = '' if p.default is None or callable(p.default) else f'`{p.default}`'
            lines.append(f'| `{flags}` | {_cell(kind)} | {"needed" if p.required else default} | {_cell(p.help)} |')
        parts += [f'## g2d {name}', marked((command.help or '').partition('\f')[0]), f'```text\n{usage}\n```', '\n'.join(lines) if len(lines) > 2 else '']
    return '\n\n'.join(p for p in parts if p) + '\n'


def pages():
    "Path under docs/ -> content."
    made = {f'reference/{name}.md': module_page(name) for name in modules()} | {'reference/command_line.md': command_line()}
    groups = {'g2d': 'Main modules', 'g2d.data': 'Data', 'g2d.data.sets': 'Data sets', 'g2d.models': 'Models', 'g2d.tasks': 'Tasks'}
    index = ['# Reference', 'Made from the package at each build: signatures, docstrings and the comments beside the parameters. '
             'Nothing here explains why; the [notebooks](../notebooks/index.md) do.', '- [Command line](command_line.md)\n- [Profiles](profiles.md): every setting of a pre-training with its source\n- [Protocols](protocols.md): how each task is tested, and by whose rules',
             ':::{toctree}\n:hidden:\n\ncommand_line\nprofiles\nprotocols\n:::']
    for package in dict.fromkeys([*groups, *(n.rpartition('.')[0] for n in modules())]):
        names = [n for n in modules() if n.rpartition('.')[0] == package]
        if not names: continue
        index += [f'## {groups.get(package, package)}', '\n'.join(f'- [{n}]({n}.md): {marked((importlib.import_module(n).__doc__ or "").partition(chr(10)*2)[0])}' for n in names),
                  f':::{{toctree}}\n:hidden:\n:caption: {groups.get(package, package)}\n\n' + '\n'.join(names) + '\n:::']
    return made | {'reference/index.md': '\n\n'.join(index) + '\n'}
