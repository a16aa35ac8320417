"The experiment notebooks run through papermill, on phantoms and on the real films, and the demo makes its page."
import json, re
from pathlib import Path
import pytest
from g2d.runs import check_parameters, find_notebook, run_key, run_notebook
from g2d.settings import G2DError
from g2d.files import read_json

TINY = dict(image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers=0, text_pool='cls', image_size=64, crop_size=64, epochs=1, global_only_steps=2, batch_size=16, decoder_channels=[32, 16, 16, 8])


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    "An output root of the test's own, also for the kernels that papermill starts."
    import g2d.settings
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    return tmp_path


def images_of(page):
    return re.findall(r'data:image/png;base64,([A-Za-z0-9+/=]+)', page)


def test_demo_makes_its_page(outputs):
    "All runs of the demo in small; a second call runs nothing again."
    from g2d.demo import demo
    page = demo(images=80, real=False, quick=True)
    text = page.read_text(encoding='utf-8')
    assert len(images_of(text)) >= 8 and 'pointing game' in text and 'average training mask' in text and 'G2D encoder + decoder' in text
    assert 'http://' not in text and 'https://' not in text and '<script' not in text
    done = {p: p.stat().st_mtime_ns for p in outputs.rglob('done.json')}
    assert len(done) == 3
    demo(images=80, real=False, quick=True)
    assert done == {p: p.stat().st_mtime_ns for p in outputs.rglob('done.json')}
    metrics = read_json(next(outputs.glob('pretrain/*/metrics.json')))
    assert {'image_to_text_R@1', 'times_chance', 'pointing_attention', 'untrained_pointing_attention', 'mask_agreement', 'first_loss', 'last_loss'} <= set(metrics)


def test_real_pairs_through_papermill(outputs, data_root):
    "The 248 real pairs of the shared data: prepare, pre-train, gallery."
    folder = run_notebook('pretrain', dict(store='real', overrides=TINY | dict(text_sections=['findings'])), progress=False)   # a list of one, too
    metrics = read_json(folder/'metrics.json')
    assert metrics['steps'] >= 5 and (folder/'training'/'masks'/'epoch_001.png').exists()
    from g2d.data.store import RadiographStore
    store = RadiographStore.open(metrics['store'])
    assert store.index['text'].notna().sum() == 248
    gallery = run_notebook('pseudo_mask_gallery', dict(store='real', checkpoint=str(folder/'training'), split='', films=4), progress=False)
    assert {'steps.png', 'gallery.png', 'words.png', 'mean_mask.png'} <= {p.name for p in (gallery/'figures').iterdir()}


def test_unknown_parameter_and_notebook_are_refused(outputs):
    with pytest.raises(G2DError, match='no parameter "epochs"'): run_notebook('pretrain', dict(epochs=3))
    with pytest.raises(G2DError, match='There is no experiment "pretrian"; known are .*pretrain'): find_notebook('pretrian')
    assert not list(outputs.iterdir())


def test_a_failing_notebook_says_which_and_leaves_a_record(outputs):
    with pytest.raises(G2DError, match='pretrain.ipynb failed: G2DError: Unknown profile "best"'): run_notebook('pretrain', dict(profile_name='best'), progress=False)
    folder = next(outputs.glob('pretrain/*'))
    assert (folder/'failed.json').exists() and not (folder/'done.json').exists()


def test_key_depends_on_code_and_parameters_not_on_prose(tmp_path):
    source = find_notebook('pretrain')
    doc = json.loads(Path(source).read_text())
    copy = tmp_path/'pretrain.ipynb'
    copy.write_text(json.dumps(doc))
    first = run_key(copy, dict(seed=1))
    assert run_key(copy, dict(seed=2)) != first
    next(c for c in doc['cells'] if c['cell_type'] == 'markdown')['source'] = ['# Another title']
    copy.write_text(json.dumps(doc)); assert run_key(copy, dict(seed=1)) == first
    next(c for c in doc['cells'] if c['cell_type'] == 'code')['source'].append('\nx = 1')
    copy.write_text(json.dumps(doc)); assert run_key(copy, dict(seed=1)) != first


@pytest.mark.parametrize('notebook', sorted((Path(__file__).parents[1]/'nbs'/'experiments').glob('*.ipynb')), ids=lambda p: p.stem)
def test_papermill_understands_every_parameter(notebook):
    "papermill drops a line that it cannot read (a comment with an equals sign, say) with a mere log message."
    import ast, papermill
    cell = next(c for c in json.loads(notebook.read_text())['cells'] if 'parameters' in c['metadata'].get('tags', []))
    written = [node.target.id for node in ast.parse(''.join(cell['source'])).body]
    assert list(papermill.inspect_notebook(str(notebook))) == written
