"g2d.data.phantom: the image, its masks and its report say the same, and always the same."
import hashlib, json, os, re, subprocess, sys
from dataclasses import replace
import numpy as np
import pytest
import g2d.data.phantom as ph
from g2d.data.phantom import PHANTOM_FINDINGS, finding_prompt, make_phantom_store, patient_of, phantom
from g2d.settings import G2DError

# ---------------------------------------------------------------- a reader of reports that shares nothing with the grammar
words = {'consolidation': r'consolidation|airspace opacity|confluent opacity', 'nodule': r'nodule|nodular', 'mass': r'\bmass\b', 'pleural effusion': r'effusion', 'pneumothorax': r'pneumothorax',
         'cardiomegaly': r'cardiomegaly|enlarged|enlargement', 'atelectasis': r'atelectasis', 'edema': r'edema', 'foreign object': r'foreign object'}
lungs = [label for label in words if label not in ('cardiomegaly', 'foreign object')]
absent = {r'lungs are clear|clear lungs|no focal abnormality': lungs, r'heart size is (normal|within)|silhouette is normal|contours are within': ['cardiomegaly'],
          r'costophrenic angles are sharp': ['pleural effusion'], r'no acute (cardiopulmonary|abnormality of the chest)': list(words)}
negative = r'\bno\b|\bneither\b|\bwithout\b|\bnot\b|has resolved|no longer'
empty = (r'osseous|bony thorax|soft tissues|upper abdomen|technical quality|attention on follow|clinical (?:correlation|picture)|portable technique|no prior study|comparison: none|'
         r'no previous images|there is no change|no new abnormality')
truths = {r'portable': lambda p, plan: p.portable, r'\bAP\b': lambda p, plan: p.view == 'AP', r'\bPA\b': lambda p, plan: p.view == 'PA',
          r'low lung volumes|volumes are low|shallow': lambda p, plan: plan[1].breath < -.5, r'well expanded|good inspiratory': lambda p, plan: plan[1].breath > .3,
          r'rotated|rotation': lambda p, plan: abs(plan[1].turn) > .015, r'aort': lambda p, plan: plan[0].knob > .7, r'leads (overlie|project)': lambda p, plan: 'ECG leads' in p.devices,
          r'sternotomy': lambda p, plan: 'sternal wires' in p.devices, r'central venous': lambda p, plan: 'central line' in p.devices, r'pacemaker': lambda p, plan: 'pacemaker' in p.devices}

def sentences(text):
    text = re.sub(r'\b[1-5]\. (?=[A-Z0-9])', '', text)
    return [s for s in re.split(r'\.(?:\s+|$)', re.sub(r'(\d)\.(\d)', r'\1<dot>\2', text)) if s]

def attributes(clause):
    "What a clause says of a finding."
    out = {}
    if m := re.search(r'\b(right|left)\b', clause): out['side'] = m[1]
    if m := re.search(r'\b(upper|mid|lower)\b|\b(base)\b|\b(apical)\b', clause): out['zone'] = m[1] or ('lower' if m[2] else 'upper')
    if m := re.search(r'\b(mild|moderate|severe)(ly)?\b', clause): out['grade'] = m[1]
    if m := re.search(r'\b(small|large)\b(?! rounded)', clause): out['grade'] = m[1]
    if m := re.search(r'(\d+) mm', clause): out['size_mm'] = int(m[1])
    if m := re.search(r'(\d+)<dot>(\d) cm', clause): out['size_mm'] = int(m[1] + m[2])
    if m := re.search(r'ratio (?:of about )?0<dot>(\d\d)', clause): out['ratio'] = int(m[1])/100
    for key in ('linear', 'plate-like', 'subsegmental', 'lobar'):
        if key in clause: out['kind'] = 'lobar' if key == 'lobar' else 'linear'
    for key in ('coin', 'ring', 'pin', 'screw'):
        if re.search(rf'\b{key}-', clause): out['kind'] = key
    return out

def clauses(sentence):
    "Split what is said of two effusions, and the parts of a comparison."
    s = sentence.lower()
    if m := re.search(r'(small|moderate|large) right and a (small|moderate|large) left pleural effusion', s): return [f'{m[1]} right pleural effusion', f'{m[2]} left pleural effusion']
    if m := re.search(r'bilateral pleural effusions, (\w+) (?:on the )?right and (\w+) (?:on the )?left', s): return [f'{m[1]} right pleural effusion', f'{m[2]} left pleural effusion']
    if m := re.search(r'(small|moderate|large) bilateral pleural effusions|bilateral (small|moderate|large) pleural effusions', s): return [f'{m[1] or m[2]} {side} pleural effusion' for side in ('right', 'left')]
    if re.match(r'(compared with|since the previous|in comparison)', s): return re.split(r', | and (?=the )', s)[1:]
    return [s]

def matches(f, said):
    grade = said.get('grade')
    return all((key == 'grade' and grade in (f.severity, f.size)) or (key != 'grade' and getattr(f, key) == value) for key, value in said.items())

changed = dict(new=r'is new|has developed', unchanged=r'unchanged|stable', increased=r'increased|progressed', decreased=r'decreased|improved')

def errors(p, plan):
    "Everything that the report of `p` says and the image does not show, or the other way round."
    out = []
    for part in re.split(r'IMPRESSION: ', p.text.removeprefix('FINDINGS: ')):
        seen = {id(f): {} for f in p.findings}
        for sentence in sentences(part.strip()):
            known = bool(re.search(empty, sentence, re.I))
            for pattern, true in truths.items():
                if re.search(pattern, sentence, 0 if pattern.isupper() or '\\b' in pattern else re.I):
                    known = True
                    if not true(p, plan) and 'technique' not in sentence: out.append(f'untrue: {sentence}')
            for pattern, labels in absent.items():
                if re.search(pattern, sentence, re.I):
                    known = True
                    out += [f'"{sentence}" but {f.label}' for f in p.findings if f.label in labels]
            for clause in clauses(sentence):
                labels = [label for label, pattern in words.items() if re.search(pattern, clause)]
                if labels: known = True
                if re.search(negative, clause):
                    said = attributes(clause)
                    out += [f'"{clause}" but {f.label}' for f in p.findings if f.label in labels and matches(f, {k: v for k, v in said.items() if k in ('side', 'zone')})]
                    continue
                for label in labels:
                    said = attributes(clause)
                    found = [f for f in p.findings if f.label == label and matches(f, said)]
                    if not found: out.append(f'"{clause}" has no finding: {label} {said}')
                    for f in found: seen[id(f)] |= said
                    for change, pattern in changed.items():
                        if re.search(pattern, clause) and not any(f.change == change for f in found): out.append(f'"{clause}" but not {change}')
            if not known: out.append(f'not understood: {sentence}')
        for f in p.findings:
            needed = {'side', 'zone'} if f.zone in ('upper', 'mid', 'lower') and f.label != 'pleural effusion' else {'side'} if f.side in ('right', 'left') else set()
            needed |= {'grade'} if f.severity or f.size else {'size_mm'}
            if not needed <= set(seen[id(f)]): out.append(f'{f.label}: {needed - set(seen[id(f)])} not said in "{part[:40]}"')
    return out

@pytest.fixture(scope='module')
def many(): return [(phantom(11, 96, i), ph._plan(11, i)) for i in range(400)]

def test_reports_are_true(many):
    wrong = [(p.image_id, e) for p, plan in many for e in errors(p, plan)]
    assert not wrong, wrong[:5]

def test_more_reports_without_drawing():
    "The text does not need the pixels: 2,000 more reports through the same checker."
    wrong = []
    for i in range(2000):
        body, shot, findings, gone, follow_up = plan = ph._plan(5, i)
        sides = {name: 'right' for name in shot.devices}
        text = ph._report(ph._rng(5, 3, i), findings, gone, body, shot, sides, follow_up)
        p = ph.Phantom(np.zeros((1, 1)), text, findings, shot.view, '', '', '', body.age, body.sex, shot.portable, shot.devices, {}, gone)
        wrong += [(i, e) for e in errors(p, plan)]
    assert not wrong, wrong[:5]

def test_the_checker_finds_faults(many):
    "A lie of each kind put into a true report is noticed."
    def caught(p, plan, text): return bool(errors(replace(p, text=text), plan))
    tried = dict.fromkeys(('side', 'zone', 'grade', 'size', 'negation', 'missing', 'invented'), 0)
    for p, plan in many:
        one = [f for f in p.findings if f.side in ('right', 'left')]
        if len(p.findings) == 1 and one and not p.devices:
            other = dict(right='left', left='right')
            assert caught(p, plan, re.sub(r'\b(right|left)\b', lambda m: other[m[1]], re.sub(r'\b(Right|Left)\b', lambda m: m[1].lower(), p.text))), p.text; tried['side'] += 1
            if one[0].zone in ('upper', 'mid') and one[0].label != 'pneumothorax': assert caught(p, plan, re.sub('(upper|mid) (lung zone|zone|lung)', 'lower zone', p.text)), p.text; tried['zone'] += 1
        for f in p.findings:
            if f.severity == 'mild' and len(p.findings) == 1: assert caught(p, plan, re.sub('mild', 'severe', re.sub('Mild', 'Severe', p.text))); tried['grade'] += 1
            if f.label == 'nodule': assert caught(p, plan, p.text.replace(f'{f.size_mm} mm', f'{f.size_mm + 3} mm')); tried['size'] += 1
            assert caught(p, plan, p.text + {'cardiomegaly': ' Heart size is normal.', 'edema': ' No pulmonary edema.'}.get(f.label, f' No {f.label}.')); tried['negation'] += 1
        if p.findings: assert caught(p, plan, f'FINDINGS: The upper abdomen is unremarkable.\nIMPRESSION: {p.text.split("IMPRESSION: ")[1]}'); tried['missing'] += 1
        label = next(label for label in ('mass', 'pneumothorax', 'consolidation', 'nodule') if label not in p.labels)
        assert caught(p, plan, p.text + f' There is a right {label}.'); tried['invented'] += 1
    assert min(tried.values()) > 5, tried

def test_reports_are_varied(many):
    length = np.array([len(p.text.split()) for p, _ in many])
    assert length.min() >= 35 and length.max() <= 95 and 45 < length.mean() < 70
    assert len({p.text for p, _ in many}) > .95*len(many)
    assert all(re.fullmatch(r'FINDINGS: \S.*\nIMPRESSION: \S.*\.', p.text) and '{' not in p.text and '  ' not in p.text and 'None' not in p.text for p, _ in many)
    vocabulary = {w for p, _ in many for w in re.findall('[a-z]+', p.text.lower())}
    assert len(vocabulary) > 180
    assert any(re.search('may represent|possibly|likely|cannot be excluded|suspicious', p.text) for p, _ in many)

def test_shares(many):
    found = [p.findings for p, _ in many]
    assert .22 < np.mean([not f for f in found]) < .34
    assert max(map(len, found)) == 3
    count = {label: sum(any(f.label == label for f in fs) for fs in found) for label in PHANTOM_FINDINGS}
    assert min(count.values()) >= .03*len(found), count
    assert {f.side for fs in found for f in fs} == {'right', 'left', 'bilateral', None}
    assert all(f.change is None for p, plan in many if not plan[4] for f in p.findings) and any(plan[4] for _, plan in many)

# ---------------------------------------------------------------- masks and boxes
def test_masks_are_where_the_report_says(many):
    for p, plan in many:
        for f in p.findings:
            assert f.mask.any() and f.mask.shape == p.image.shape
            y, x = np.nonzero(f.mask)
            assert f.box == dict(label=f.label, x=x.min(), y=y.min(), w=x.max() - x.min() + 1, h=y.max() - y.min() + 1)
            if f.side not in ('right', 'left'): continue
            right, left = p.lungs['right'], p.lungs['left']
            centre = .5*(np.nonzero(right)[1].max() + np.nonzero(left)[1].min())
            share = np.mean(x < centre) if f.side == 'right' else np.mean(x > centre)
            assert share > .9, (p.image_id, f.label, share)
            body, shot = plan[:2]
            g = ph._geometry(body, shot, 96, .45, [.03*any(o.kind == 'lobar' and o.side == s for o in p.findings) for s in ('right', 'left')])
            v = (float(g.y[int(round(y.mean())), 0]) - g.apex)/(g.dome[f.side == 'left'] - g.apex)
            if f.zone in ('upper', 'mid', 'lower') and f.label != 'pneumothorax':
                low, high = dict(upper=(0, .38), mid=(.30, .70), lower=(.62, 1.2))[f.zone]
                assert (low < v < high) or f.size == 'large' or f.size == 'moderate' and v > .55, (p.image_id, f.label, f.zone, v)

def test_sizes_are_as_stated():
    "The diameter measured on the mask, in mm, is the one in the report."
    ratio = {'nodule': [], 'mass': []}
    for i in range(60):
        for label in ratio:
            f = ph._new_finding(ph._rng(8, i), label); body = ph.sample_body(ph._rng(8, i, 0)); shot = replace(ph.sample_shot(ph._rng(8, i, 1), body), frame=(0, 0, 0, 0), devices=[])
            g, D, drawn = ph._depth(body, shot, [f], 256); E = np.exp(-shot.exposure*D)
            ph._mark(g, D, E, drawn, [f], 1.)
            ratio[label].append(2*np.sqrt(f.mask.sum()/np.pi)*ph.FIELD_MM/256/f.size_mm)
    for label, values in ratio.items():
        assert abs(np.median(values) - 1) < .08, (label, np.median(values))
        assert np.mean(np.abs(np.array(values) - 1) < .2) > .9, (label, np.round(values, 2))

def test_heart_width_is_the_ratio(many):
    for p, plan in many:
        for f in p.findings:
            if f.label != 'cardiomegaly' or any(g.label in ('pleural effusion', 'pneumothorax') for g in p.findings): continue
            body, shot = plan[:2]; g = ph._geometry(body, shot, 96, f.ratio)
            width = np.nonzero(f.mask.any(0))[0]; chest = 2*float(g.U.max())*shot.zoom*96
            assert abs((width[-1] - width[0] + 1)/chest - f.ratio) < .035, (p.image_id, f.ratio)

def test_mask_is_exactly_what_is_visible():
    "Against brute force: draw the film with and without the finding and compare grey levels pixel by pixel."
    tried = 0
    for i in range(120):
        body, shot, findings, *_ = ph._plan(21, i)
        for k, f in enumerate(findings):
            if f.label not in ('consolidation', 'nodule', 'mass', 'edema', 'foreign object', 'atelectasis') or f.kind == 'lobar' or len(findings) > 1: continue
            shot = replace(shot, frame=(0, 0, 0, 0))
            g, D, drawn = ph._depth(body, shot, findings, 128)
            with_it = np.exp(-shot.exposure*D.copy()); before = D.copy()
            ph._mark(g, D, with_it.copy(), drawn, findings, 1.1)
            if not np.array_equal(before, D): continue # it had to be made denser
            without = np.exp(-shot.exposure*ph._depth(body, shot, [], 128)[1])
            change = 255*1.1*np.abs(with_it.astype(float) - without)
            assert (change[f.mask] > ph.VISIBLE - .05).all() and (change[~f.mask] < ph.VISIBLE + .05).all(), (i, f.label)
            tried += 1
    assert tried > 20

@pytest.mark.parametrize('label, brighter', [('consolidation', True), ('mass', True), ('pleural effusion', True), ('pneumothorax', False), ('atelectasis', True), ('edema', True), ('foreign object', True), ('nodule', True)])
def test_findings_change_the_image_the_right_way(label, brighter):
    body = ph.sample_body(ph._rng(3, 0)); shot = replace(ph.sample_shot(ph._rng(3, 1), body), frame=(0, 0, 0, 0), devices=[])
    for i in range(6):
        f = ph._new_finding(ph._rng(3, 2, i), label)
        g, D, drawn = ph._depth(body, shot, [f], 128); healthy = ph._depth(body, shot, [], 128)[1]
        ph._mark(g, D, np.exp(-shot.exposure*D), drawn, [f], 1.)
        change = (D - healthy)[f.mask].mean()
        assert (change > .08) if brighter else (change < -.03), (label, i, change)

def test_more_severe_is_more():
    body = ph.sample_body(ph._rng(4, 0)); shot = replace(ph.sample_shot(ph._rng(4, 1), body), frame=(0, 0, 0, 0), devices=[])
    def area(f):
        g, D, drawn = ph._depth(body, shot, [f], 128); ph._mark(g, D, np.exp(-D), drawn, [f], 1.); return f.mask.sum()
    shape = (.5,)*10
    for label, key, scale, more in (('pleural effusion', 'size', ph._amounts, dict(side='right', zone='lower')), ('pneumothorax', 'size', ph._amounts, dict(side='left')),
                                    ('consolidation', 'severity', ph._grades, dict(side='left', zone='mid')), ('edema', 'severity', ph._grades, dict(side='bilateral', zone='perihilar'))):
        areas = [area(ph.Finding(label, shape=shape, **{key: grade}, **more)) for grade in scale]
        assert areas[0] < areas[1] < areas[2], (label, areas)

# ---------------------------------------------------------------- same seed, same bytes
def digest(p): return hashlib.sha256(p.image.tobytes() + p.text.encode() + p.mask.tobytes() + json.dumps(p.boxes).encode()).hexdigest()

def test_same_bytes_in_another_process():
    code = 'import sys; sys.path.insert(0, "tests"); from test_phantom import *; print(*[digest(phantom(9, 128, i)) for i in (7, 4, 0)])'
    there = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=os.environ | dict(PYTHONHASHSEED='77'), cwd=os.path.dirname(os.path.dirname(__file__)))
    assert there.stdout.split() == [digest(phantom(9, 128, i)) for i in (7, 4, 0)]

def test_seeds_and_indices_differ():
    assert len({digest(phantom(seed, 64, i)) for seed in range(4) for i in range(10)}) == 40

@pytest.mark.parametrize('size', [64, 100, 224, 512])
def test_sizes(size):
    for i in (5, 12, 56):
        p, q = phantom(0, size, i), phantom(0, 256, i)
        assert p.image.shape == (size, size) and p.image.dtype == np.uint8 and p.text == q.text
        for f, g in zip(p.findings, q.findings):
            assert f.mask.any()
            for key, span in (('x', 'w'), ('y', 'h')):
                assert abs((f.box[key] + f.box[span]/2)/size - (g.box[key] + g.box[span]/2)/256) < .04, (f.label, f.box, g.box)

def test_image_has_range(many):
    for p, _ in many[:100]: assert p.image.std() > 35 and np.percentile(p.image, 97) > 180 and np.percentile(p.image, 3) < 60

@pytest.mark.parametrize('bad', [dict(size=32), dict(size=600), dict(seed=-1), dict(index=-1)])
def test_bad_arguments(bad):
    with pytest.raises(G2DError): phantom(**(dict(seed=0) | bad))

# ---------------------------------------------------------------- follow-up
def test_second_study_is_the_same_patient_and_comparison_is_true():
    steps = dict(zip(('small', 'moderate', 'large', 'mild', 'severe'), (0, 1, 2, 0, 2)))
    seen = set()
    for i in range(4, 600, 5):
        (body, _, findings, gone, follow_up), (before_body, _, before, _, _) = ph._plan(2, i), ph._plan(2, i - 1)
        assert follow_up and body == before_body and patient_of(i) == patient_of(i - 1)
        for f in findings:
            seen.add(f.change)
            old = [g for g in before if (g.label, g.side, g.shape) == (f.label, f.side, f.shape)]
            assert (f.change == 'new') == (not old)
            if old:
                a, b = (g.size_mm or steps.get(g.size or g.severity) for g in (old[0], f))
                assert {'unchanged': a == b, 'increased': a < b, 'decreased': a > b}[f.change]
        seen |= {'gone'} if gone else set()
        assert all(not any((f.label, f.side, f.zone) == (g.label, g.side, g.zone) for f in findings) for g in gone)
        assert len(findings) + len(gone) >= len(before)
    assert seen == {'new', 'unchanged', 'increased', 'decreased', 'gone'}

# ---------------------------------------------------------------- store
def content(store): return [(store.images[i].tobytes(), json.dumps(store.index.iloc[i].to_dict(), default=str, sort_keys=True)) for i in range(len(store))]

def test_store(tmp_path):
    store = make_phantom_store(tmp_path/'a', 30, size=64, seed=6, workers=0)
    assert len(store) == 30 and store.size == (64, 64) and store.index.image_id.is_unique
    assert store.index.groupby('patient_id').split.nunique().max() == 1 and store.index.patient_id.nunique() == 24
    assert set(store.index.source) == {'phantom'} and set(store.index.licence) == {'Apache-2.0'}
    for i in range(30):
        p = phantom(6, 64, i); row = store.index.iloc[i]
        assert np.array_equal(store.images[i], p.image) and row.text == p.text and list(row.labels) == p.labels
        assert np.array_equal(store.mask(i), p.mask) and [dict(b) for b in row.boxes] == p.boxes
        extra = json.loads(row.extra)
        assert extra['prompts'] == p.prompts and len(extra['prompts']) == len(p.boxes) == len(extra['findings'])
    assert any(len(labels) == 0 for labels in store.index.labels)

def test_store_is_reused_continued_and_independent_of_workers(tmp_path, monkeypatch):
    n = 80
    whole = make_phantom_store(tmp_path/'a', n, size=64, workers=0)
    assert make_phantom_store(tmp_path/'b', n, size=64, workers=2).hash == whole.hash
    drawn = []
    real = ph.phantom
    def dies(seed, size, index):
        drawn.append(index)
        if index == 33 and drawn.count(33) == 1: raise RuntimeError('killed here')
        return real(seed, size, index)
    monkeypatch.setattr(ph, 'phantom', dies)
    with pytest.raises(RuntimeError): make_phantom_store(tmp_path/'c', n, size=64, workers=0)
    again = make_phantom_store(tmp_path/'c', n, size=64, workers=0)
    assert again.hash == whole.hash and len(drawn) < n + 10
    monkeypatch.setattr(ph, 'phantom', lambda *a: pytest.fail('a finished store is drawn again'))
    assert make_phantom_store(tmp_path/'a', n, size=64).hash == whole.hash
    with pytest.raises(G2DError): make_phantom_store(tmp_path/'a', n, size=64, seed=1)

def test_a_longer_store_begins_like_a_shorter_one(tmp_path):
    a, b = (make_phantom_store(tmp_path/str(n), n, size=64, workers=0) for n in (10, 17))
    assert np.array_equal(a.images, b.images[:10]) and list(a.index.text) == list(b.index.text[:10])

@pytest.mark.parametrize('n, split, want', [(3500, dict(train=3000, test=500), (3000, 500)), (3500, dict(train=3000/3500, test=500/3500), (3000, 500)), (7, dict(train=.8, val=.1, test=.1), None),
                                            (1000, dict(train=.8, val=.1, test=.1), (800, 100, 100)), (5, dict(train=1.), (5,)), (1, dict(train=.8, val=.1, test=.1), None)])
def test_splits(n, split, want):
    names = ph._splits(n, 0, split)
    counts = [names.count(name) for name in split]
    assert sum(counts) == n and (want is None or tuple(counts) == want)
    assert all(names[i] == names[i - 1] for i in range(4, n, 5)) and names == ph._splits(n, 0, split)

@pytest.mark.parametrize('split', [dict(train=.8, test=.1), dict(train=10, test=5), dict(train=-.1, test=1.1)])
def test_bad_splits(split):
    with pytest.raises(G2DError, match='add up'): ph._splits(100, 0, split)

def test_prompts_are_true_and_tell_findings_apart(many):
    for p, _ in many:
        assert len(set(p.prompts)) == len(p.prompts)
        for f, prompt in zip(p.findings, p.prompts):
            clause = re.sub(r'(\d)\.(\d)', r'\1<dot>\2', prompt.lower())
            assert re.search(words[f.label], clause) and matches(f, attributes(clause)), prompt
    assert finding_prompt(ph.Finding('consolidation', 'right', 'lower', severity='moderate')) == 'Moderate consolidation in the right lower zone.'
