"Profiles: the sixteen differences of paper and code, sources, and that every setting is used somewhere."
import re
from pathlib import Path
import pytest
from g2d.profiles import NAMES, Profile, differences, profile, sources
from g2d.settings import G2DError

# reference/g2d_and_mpma_papers.md A9, in its order: (number, settings, as_paper, as_released)
SIXTEEN = [
    (1, ['heads'], [3], [4]),
    (2, ['crop_size'], [224], [256]),
    (3, ['lr', 'schedule'], [2e-4, 'cosine'], [2e-5, 'cosine_restarts']),
    (4, ['batch_size'], [128], [64]),
    (5, ['epochs'], [50], [52]),
    (6, ['augment'], ['as_paper'], ['as_released']),
    (7, ['normalise'], ['unit'], ['imagenet']),
    (8, ['body_mask'], [True], [False]),
    (9, ['smooth'], [True], [False]),
    (10, ['strict'], [False], [True]),
    (11, ['dice_weight', 'bce_weight', 'dice_on_logits'], [.5, .5, False], [1., .2, True]),
    (12, ['direction'], ['image_to_text'], ['both']),
    (13, ['global_only_steps'], [0], [200]),
    (14, ['pool_query'], ['cls'], ['mean']),
    (15, ['train_split'], ['train'], ['all']),
    (16, ['frozen_layers'], [0], [9]),
]


@pytest.mark.parametrize('number, names, paper, released', SIXTEEN, ids=[str(row[0]) for row in SIXTEEN])
def test_sixteen_differences(number, names, paper, released):
    a, b = profile('as_paper'), profile('as_released')
    assert [getattr(a, n) for n in names] == paper
    assert [getattr(b, n) for n in names] == released
    table = differences()
    for n in names: assert n in table.index, f'difference {number}: {n} is not in the table'
    for n in names:
        assert a.source(n).split()[0].rstrip(':') in ('paper', 'ours'), (n, a.source(n))
        assert b.source(n).startswith('code'), (n, b.source(n))


def test_three_heads_fit_the_width():
    "Difference 1: 3 does not divide 128, so the width of a head is set."
    p = profile('as_paper')
    assert p.embed_dim % p.heads and p.head_dim and abs(p.heads*p.head_dim - p.embed_dim) < p.heads


@pytest.mark.parametrize('name', NAMES)
def test_every_field_has_a_source(name):
    table = sources(name)
    assert len(table) == len(Profile.__dataclass_fields__) - 1
    assert table['source'].str.len().gt(3).all() and table['meaning'].str.len().gt(3).all()


def test_every_setting_is_used():
    "A setting that nothing reads would be a promise nobody keeps."
    top = Path(__file__).parents[1]
    code = '\n'.join(p.read_text(encoding='utf-8') for p in (top/'g2d').rglob('*.py') if p.name != 'profiles.py')
    code += '\n'.join(p.read_text(encoding='utf-8') for p in (top/'nbs'/'experiments').glob('*.ipynb'))
    unused = [n for n in Profile.__dataclass_fields__ if n != 'name' and not re.search(rf'\b(p|profile)\.{n}\b', code)]
    assert not unused, f'settings that nothing reads: {unused}'


@pytest.mark.parametrize('name', NAMES)
def test_round_trip_through_json(name):
    import json
    p = profile(name, seed=7, lr=0.5)
    assert Profile.from_dict(json.loads(json.dumps(p.to_dict()))) == p
    assert p.source('lr') == 'override' and p.source('heads') != 'override'


@pytest.mark.parametrize('change, sentence', [(dict(epoch=1), 'Unknown setting "epoch"'), (dict(epochs='ten'), 'expected int'), (dict(smooth=1), 'expected bool'),
                                              (dict(lr='1e-4'), 'expected float'), (dict(epochs=True), 'expected int')])
def test_bad_changes_are_refused(change, sentence):
    with pytest.raises(G2DError, match=sentence): profile('demo', **change)


def test_profiles_cannot_change():
    with pytest.raises(AttributeError): profile('demo').lr = 1
