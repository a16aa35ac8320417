"The explorer: what a change recomputes, what bad input does, rows that can be planned, and the real thing in a browser."
import base64, contextlib, io, json, os, re, shutil, subprocess, sys
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from g2d.settings import G2DError

TOP = Path(__file__).resolve().parents[1]
TINY = dict(image_encoder='resnet18', pretrained=False, text_encoder='tiny', frozen_layers='all', text_pool='cls', image_size=64, crop_size=64, encoder_depth=4,
            decoder_channels=[32, 16, 16, 8], epochs=2, batch_size=20)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "An output folder with a store of phantoms and a run that kept its epochs."
    from g2d.data.phantom import make_phantom_store
    from g2d.pretrain import pretrain
    from g2d.profiles import profile
    root = tmp_path_factory.mktemp('explorer')
    store = make_phantom_store(root/'stores'/'phantoms', 60, size=64, seed=5)
    import g2d.settings
    old = os.environ.get('G2D_OUTPUTS')
    os.environ['G2D_OUTPUTS'] = str(root)
    before, g2d.settings.settings = vars(g2d.settings).get('settings'), g2d.settings.load_settings()
    pretrain(store, profile('demo', **TINY), root/'pretrain'/'kept', device='cpu', keep_epochs=True, progress=False, val_images=8)
    yield root
    os.environ.pop('G2D_OUTPUTS') if old is None else os.environ.update(G2D_OUTPUTS=old)
    if before is None: vars(g2d.settings).pop('settings', None)
    else: g2d.settings.settings = before


@pytest.fixture
def session(home):
    from g2d.data.store import RadiographStore
    from g2d.explorer import Choice, Session, film_of, settings_of
    store = RadiographStore.open(home/'stores'/'phantoms')
    s = Session(store)
    s.show(film_of(store, next(i for i in range(60) if len(store.index['labels'].iloc[i] or []) == 2)))
    key = str((home/'pretrain'/'kept'/'checkpoint.safetensors').resolve())
    s.choice = Choice(key, **settings_of(s.model(key).profile))
    s.phrase = s.film.findings[0][0]
    return s


def did(session, work):
    "What a piece of work made the session compute."
    first = Counter(session.counts)
    work()
    return dict(session.counts - first)


def show(session, choice): session.figures(choice); return session.pictures(choice)


def test_only_what_changed_is_computed(session):
    c = session.choice
    made = show(session, c)
    assert session.counts['encoder'] == 1 and session.counts['text'] == 2 and session.counts['processor'] == 1 and session.counts['model'] == 1
    assert did(session, lambda: show(session, c)) == {}
    for changes, redrawn in ((dict(percentile=.7), {'mask', 'binary', 'smooth'}), (dict(sigma_color=.4), {'mask', 'smooth'}), (dict(kernel_size=9), {'mask', 'smooth'}),
                             (dict(upsample='nearest'), {'mask', 'upsampled', 'masked', 'binary', 'smooth'}), (dict(body_mask=False), {'mask', 'body', 'masked', 'binary', 'smooth'}),
                             (dict(head=1), {'mask', 'attention', 'prediction', 'averaged', 'upsampled', 'masked', 'binary', 'smooth'})):
        other = replace(c, **changes)
        assert did(session, lambda: show(session, other)) == dict(processor=1, picture=len(redrawn)), changes
        assert {name for name, p in show(session, other).items() if p is not made[name]} == redrawn
    session.phrase = 'left pleural effusion'
    assert did(session, lambda: show(session, c)) == dict(text=1, picture=1)
    session.text = 'An edited report with some words.'
    assert did(session, lambda: show(session, c)) == dict(text=1, picture=1)
    session.truth = ''
    assert set(did(session, lambda: show(session, c))) == {'picture'}


def test_steps_are_those_of_the_processor(session):
    "One truth for the mask: what the explorer shows is what `PseudoMask` makes of the model's attention."
    import torch
    from g2d.pseudo_mask import PseudoMask
    model, images = session.model(session.choice.model), session.seen(session.choice).images
    with torch.no_grad(): image_emb, patches, attention = model.encode_image(images)
    expected = PseudoMask(**session.choice.processor).steps(attention, images)
    for name, value in session.steps(session.choice).items(): assert np.array_equal(value, expected[name][0, 0].numpy()), name
    head = replace(session.choice, head=2)
    assert np.array_equal(session.steps(head)['smooth'], PseudoMask(**head.processor)(attention[:, 2:3], images)[0, 0].numpy())
    similar = model.similarity_map(images, [session.phrase])[0].numpy()
    from g2d.explorer import enlarge
    assert np.allclose(enlarge(session.grounded(session.choice, session.phrase), 64), similar, atol=1e-4)
    assert np.allclose(session.predicted(session.choice), model.predict_mask(images)[0, 0].numpy(), atol=1e-6)


def test_figures_by_hand(session):
    found, c = session.figures(session.choice), session.choice
    truth, mask = session.seen(c).truths['all findings'], session.steps(c)['smooth'] > .5
    assert np.array_equal(truth, session.film.truths['all findings'])
    assert found['IoU mask'] == pytest.approx((truth & mask).sum()/(truth | mask).sum()) and found['truth area'] == pytest.approx(truth.mean())
    assert set(found) == {'mask area', 'report match', 'truth area', 'IoU mask', 'IoU prediction', 'attention hits', 'phrase hits'}
    session.truth = ''
    assert set(session.figures(c)) == {'mask area', 'report match'}
    session.text = '  '
    assert set(session.figures(c)) == {'mask area'}


def test_every_picture_says_what_it_is(session):
    made = session.pictures(session.choice)
    assert {f'head {k}' for k in (1, 2, 3, 4)} < set(made) and len(made) == 17
    for name, picture in made.items():
        assert len(picture.alt) > 20 and picture.title
        assert Image.open(io.BytesIO(picture.data)).size == picture.pixels.shape[1::-1]
    session.phrase = ''
    assert 'No phrase was typed' in session.pictures(session.choice)['phrase'].alt


def test_a_file_is_cut_by_the_same_geometry_as_a_stored_film(session, tmp_path):
    "A file of the store's size gives the same pixels to the model as the stored film."
    from g2d.explorer import read_film
    stored = session.encoded(session.choice).attention
    Image.fromarray(session.film.grey).save(tmp_path/'same.png')
    session.show(read_film(tmp_path/'same.png'))
    assert np.array_equal(session.encoded(session.choice).attention, stored)
    wide = np.zeros((300, 500), np.uint8); wide[100:200, 200:300] = 200          # a square in the middle stays there
    Image.fromarray(wide).save(tmp_path/'wide.png')
    session.show(read_film(tmp_path/'wide.png'))
    seen = session.seen(session.choice)
    fine = np.asarray(seen.shown.resize((64, 64), Image.Resampling.BOX), float)/255
    assert np.abs(fine - seen.images[0, 0].numpy()).mean() < .02


def save(array, kind):
    file = io.BytesIO(); Image.fromarray(array).save(file, kind)
    return file.getvalue()


def test_bad_files_are_refused_in_a_sentence(tmp_path):
    from g2d.explorer import read_film
    png = save(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8), 'PNG')
    for name, data, match in (('a.png', b'', 'empty'), ('b.png', b'hello', 'not an image'), ('c.png', png[:200], 'image'), ('d.dcm', b'\0'*128 + b'DICM' + b'rubbish', 'DICOM'),
                              ('e.png', save(np.zeros((9, 9), np.uint8), 'PNG'), 'too few'), ('f.pdf', b'%PDF-1.4', 'not an image')):
        with pytest.raises(G2DError, match=f'{name} was not opened: .*{match}') as error: read_film(data, name)
        assert '\n' not in str(error.value) and str(tmp_path.parent) not in str(error.value)
    for path in (tmp_path, tmp_path/'none.png'):
        with pytest.raises(G2DError, match='was not opened'): read_film(path)


def test_a_colour_photograph_is_named_and_a_grey_one_in_rgb_is_not():
    from g2d.explorer import read_film
    grey = np.random.default_rng(0).integers(0, 255, (80, 80), dtype=np.uint8)
    photo = np.stack([grey, grey//3, 255 - grey], -1)
    assert 'colour photograph' in read_film(save(photo, 'PNG'), 'x.png').note and 'colour photograph' in read_film(save(photo, 'JPEG'), 'x.jpg').note
    assert 'colour' not in read_film(save(np.repeat(grey[..., None], 3, 2), 'JPEG'), 'x.jpg').note


@pytest.fixture(scope='module')
def large_dicom(tmp_path_factory):
    "A DICOM of 6,000 x 6,000 pixels and 16 bits."
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    from g2d.data.phantom import phantom
    path = tmp_path_factory.mktemp('dicom')/'large.dcm'
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, '1.2.840.10008.5.1.4.1.1.1.1', generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0'*128)
    data.Rows = data.Columns = 6000
    data.SamplesPerPixel, data.PhotometricInterpretation, data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 1, 'MONOCHROME2', 16, 12, 11, 0
    data.PixelData = (np.asarray(Image.fromarray(phantom(4, 500).image).resize((6000, 6000))).astype(np.uint16)*16).tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def test_a_dicom_of_6000_by_6000(session, large_dicom):
    from g2d.explorer import read_film
    film = read_film(large_dicom)
    assert film.grey.shape == (6000, 6000) and re.search(r'6000 x 6000 pixels, read in \d+\.\d s', film.note)
    session.show(film)
    assert show(session, session.choice)['mask'].pixels.shape == (480, 480, 3)


def test_the_row_can_be_planned_and_run(session, home, tmp_path):
    from g2d.runs import plan_rows, read_rows, run_table
    choice = replace(session.choice, percentile=.7, head=1)
    session.phrase = 'pleural effusion: "left", é'
    for kind in ('yaml', 'csv'):
        (tmp_path/f'row.{kind}').write_bytes(session.export([choice], kind))
        planned, = plan_rows(read_rows(tmp_path/f'row.{kind}'), tmp_path)
        assert planned.row.experiment == 'pseudo_mask_gallery' and planned.parameters == session.row(choice)['parameters']
        assert planned.parameters['overrides'] == dict(percentile=.7) and planned.parameters['head'] == 2
    found = run_table(tmp_path/'row.yaml', output_root=tmp_path/'runs')
    assert found['state'].tolist() == ['done'], found['error'].tolist()
    metrics = json.loads((Path(found['folder'][0])/'metrics.json').read_text())
    expected = (session.steps(choice)['smooth'] > .5).mean()
    assert metrics['films'] == 1 and metrics['mask_area'] == pytest.approx(expected, abs=1e-6) and metrics['iou_pseudo'] == pytest.approx(session.figures(choice)['IoU mask'], abs=1e-6)


def test_exported_figure(session):
    pair = [session.choice, replace(session.choice, upsample='nearest')]
    one, two = (Image.open(io.BytesIO(session.export(choices, 'png'))) for choices in (pair[:1], pair))
    assert two.size[1] > 1.7*one.size[1] and two.size[0] == one.size[0]
    svg = session.export(pair, 'svg').decode()
    assert 'upsample nearest' in svg and svg.count('<image') == 22
    with pytest.raises(G2DError, match='no export as "pdf"'): session.export(pair, 'pdf')


def test_checkpoints_are_found_and_epochs_kept(home):
    import torch
    from g2d.checkpoint import Checkpoint
    from g2d.explorer import epochs_of, find_models, read_header
    (home/'pretrain'/'broken').mkdir(exist_ok=True); (home/'pretrain'/'broken'/'checkpoint.safetensors').write_bytes(b'\x08\0\0\0\0\0\0\0{broken}')
    found = find_models(home)
    assert [Path(h['path']).parent.name for h in found] == ['kept']
    kept = epochs_of(found[0]['path'])
    assert sorted(kept.weights) == sorted(kept.pictures) == sorted(kept.figures) == [0, 1, 2]
    last, run = Checkpoint.load(kept.weights[2]), Checkpoint.load(home/'pretrain'/'kept')
    assert set(last.weights) == set(run.weights) and all(torch.equal(v, run.weights[k]) for k, v in last.weights.items())
    assert kept.weights[2].stat().st_size < .5*run.path.stat().st_size and read_header(kept.weights[0])['about']['step'] == 0
    assert not torch.equal(Checkpoint.load(kept.weights[0]).weights['pool.attention.weight'] if 'pool.attention.weight' in run.weights else next(v for k, v in Checkpoint.load(kept.weights[0]).weights.items() if k.startswith('image_encoder')),
                           next(v for k, v in run.weights.items() if k.startswith('image_encoder')))
    with pytest.raises(G2DError, match='no checkpoint'): read_header(home/'nothing')


# the widgets, without a browser

@pytest.fixture
def explorer(home):
    pytest.importorskip('ipywidgets')
    from g2d.explorer import Explorer
    e = Explorer(wait=True)
    e.words = lambda: re.sub('<[^>]+>', '', e.status.value)
    e.places = lambda: {name: e.now_side.places[name].value for name in ('mask', 'attention', 'phrase', 'body')}
    e.send = lambda name, data: setattr(e.controls['upload'], 'value', (dict(name=name, type='', size=len(data), content=memoryview(data), last_modified=datetime.now()),))
    return e


def test_controls_move_pictures(explorer):
    c, first = explorer.controls, explorer.places()
    assert 'ms' in explorer.words() and c['model'].label.startswith('demo, 2 epochs') and explorer.session.truth == 'all findings'
    c['percentile'].value = .6
    second = explorer.places()
    assert second['mask'] != first['mask'] and second['attention'] == first['attention'] and c['profile'].value == 'hand'
    c['profile'].value = 'as_released'
    assert c['upsample'].value == 'nearest' and c['strict'].value and not c['body_mask'].value and explorer.choice.upsample == 'nearest' and c['profile'].value == 'as_released'
    c['profile'].value = ''
    assert explorer.places()['mask'] == first['mask'] and explorer.choice.percentile == .85
    c['phrase'].value = 'left lower lung'
    assert explorer.places()['phrase'] != second['phrase']
    c['head'].value = 2; assert explorer.choice.head == 2
    c['head'].value = -1; assert explorer.choice.head is None and c['head'].index == 0
    name = explorer.session.film.name
    c['on'].click(); assert explorer.session.film.name != name and c['report'].value == explorer.session.film.text
    c['back'].click(); assert explorer.session.film.name == name
    c['report'].value = ''
    assert 'image alone' in explorer.words()


def test_before_and_after_of_settings_and_of_epochs(explorer):
    c = explorer.controls
    c['pin'].click()
    assert '→' in explorer.numbers.value and explorer.before_side.box.layout.display == ''
    c['percentile'].value = .6
    assert '(+25.0 points)' in explorer.numbers.value or 'points)' in explorer.numbers.value
    assert explorer.before_side.places['mask'].value != explorer.now_side.places['mask'].value
    old = explorer.before, explorer.choice
    c['swap'].click(); assert (explorer.choice, explorer.before) == old and c['percentile'].value == old[0].percentile
    c['epoch'].value = '0'
    assert explorer.choice.model.endswith('epoch_000.safetensors') and 'before training' in explorer.words()
    assert 'epoch 0' in explorer.epochs.value and 'film, attention' in explorer.epochs.value
    c['unpin'].click(); assert '→' not in explorer.numbers.value and explorer.before is None
    c['model'].value = 'untrained'
    assert 'Random weights' in explorer.words() and c['epoch'].disabled


def test_bad_input_never_ends_the_app(explorer, large_dicom, tmp_path):
    first = explorer.places()
    explorer.send('broken.png', b'rubbish')
    assert 'broken.png was not opened' in explorer.words() and 'bad' in explorer.status.value and explorer.places() == first
    explorer.controls['kernel_size'].value = 31
    explorer.controls['path'].value = str(tmp_path/'absent.dcm')
    assert 'absent' in explorer.words()
    explorer.send('<b>x</b>.png', b'')
    assert '<b>' not in explorer.status.value
    explorer.session.model = lambda key: 1/0
    explorer.controls['percentile'].value = .66
    assert 'ZeroDivisionError' in explorer.words()
    del explorer.session.model
    photo = np.zeros((90, 90, 3), np.uint8); photo[..., 0] = 200
    explorer.send('flower.jpg', save(photo, 'JPEG'))
    assert 'colour photograph' in explorer.words() and 'flower.jpg' in explorer.now_side.places['film'].value
    explorer.controls['path'].value = str(large_dicom)
    assert '6000 x 6000' in explorer.words() and 'large.dcm' in explorer.now_side.places['film'].value
    paths = explorer.export('row')
    assert 'was a file' in paths[0].read_text() and all(p.parent.name == 'explorer' for p in paths)


def test_every_control_has_a_label_and_a_tooltip(explorer):
    for name, widget in explorer.controls.items(): assert widget.description and widget.tooltip, name


def test_a_wanted_checkpoint_that_is_broken_gives_way(home, tmp_path):
    from g2d.explorer import Explorer
    e = Explorer(checkpoint=tmp_path/'no', wait=True)
    assert 'There is no checkpoint' in e.status.value and e.choice.model != 'untrained'
    e = Explorer(store=str(tmp_path/'no_store'), wait=True)
    assert 'no_store' in e.status.value and len(e.session.store) == 40 and e.ready


def test_without_any_checkpoint_nothing_is_called_trained(home, tmp_path, monkeypatch):
    import g2d.settings
    from g2d.explorer import Explorer
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    e = Explorer(wait=True)
    assert [key for _, key in e.controls['model'].options] == ['untrained'] and 'Random weights' in e.status.value


def test_the_notebook_of_the_app_is_the_one_in_the_repository(tmp_path):
    from g2d.explorer import write_app
    ours, theirs = (json.loads(p.read_text())['cells'] for p in (write_app(tmp_path/'a.ipynb'), TOP/'nbs'/'explorer_app.ipynb'))
    assert [''.join(c['source']) for c in ours] == [''.join(c['source']) for c in theirs]


def test_command_line_refuses_before_it_starts(tmp_path):
    import socket
    run = lambda *words: subprocess.run([sys.executable, '-c', 'from g2d.cli import main; main()', 'explore', '--no-browser', *map(str, words)], capture_output=True, text=True, timeout=120)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        for words, match in ((('--checkpoint', tmp_path/'no'), 'There is no checkpoint'), (('--image', tmp_path/'no.png'), 'There is no file'), (('--port', s.getsockname()[1]), 'is in use')):
            answer = run(*words)
            assert answer.returncode == 2 and match in answer.stderr and answer.stderr.count('\n') == 1, answer.stderr


# in a browser

@pytest.fixture(scope='module')
def chromium():
    "A browser for all tests of the module."
    found = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    playwright = pytest.importorskip('playwright.sync_api')
    pytest.importorskip('voila')
    if found is None: pytest.skip('no Chromium on this machine')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'])
        yield browser
        browser.close()


@pytest.fixture
def xray(request, tmp_path):
    "A real X-ray where there is one, else a phantom as PNG."
    from g2d.data.phantom import phantom
    with contextlib.suppress(pytest.skip.Exception):
        root = request.getfixturevalue('data_root')
        return next((root/'open_cxr'/'nih_cxr14').rglob('*.jpg'))
    Image.fromarray(phantom(9, 300).image).save(tmp_path/'phantom.png')
    return tmp_path/'phantom.png'


@contextlib.contextmanager
def page_of(browser):
    "A page, and what it said on the console that is an error of ours; voila asks a CDN for its icons, which may be out of reach."
    page, said = browser.new_page(viewport=dict(width=1440, height=1250)), []
    page.set_default_timeout(150_000)
    harmless = lambda text, url: 'cdn.jsdelivr.net' in f'{text} {url}'
    page.on('console', lambda m: said.append(m.text) if m.type == 'error' and not harmless(m.text, m.location.get('url', '')) else None)
    page.on('pageerror', lambda error: said.append(str(error)))
    yield page, said
    page.close()


@contextlib.contextmanager
def server(command, home, ready):
    "A server that is gone afterwards, whatever happened."
    environment = os.environ | dict(G2D_OUTPUTS=str(home), HF_HUB_OFFLINE='1', PYTHONUNBUFFERED='1', JUPYTER_CONFIG_DIR=str(home/'jupyter'), JUPYTERLAB_SETTINGS_DIR=str(home/'jupyter'/'settings'),
                                    JUPYTERLAB_WORKSPACES_DIR=str(home/'jupyter'/'workspaces'))
    process = subprocess.Popen(command, env=environment, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try: yield ready(process)
    finally:
        process.terminate()
        try: process.wait(20)
        except subprocess.TimeoutExpired: process.kill()


SHOTS = os.environ.get('G2D_SHOTS')   # a folder for screenshots to look at

def use(page, said, xray, name):
    "What a user does, and what must come of it."
    shot = lambda step: page.screenshot(path=f'{SHOTS}/{name}_{step}.png') if SHOTS else None
    source = lambda what: page.evaluate('([k, i]) => document.querySelectorAll(k)[i].src', list(what))
    mask, film, attention, phrase = ((f'.g2d-two .g2d-mask img, .g2d-mask img', -1), *(('.g2d-smalls img', i) for i in (0, 1, 3)))
    at = lambda what: (what[0], page.locator(what[0]).count() + what[1]) if what[1] < 0 else (what[0], what[1] + max(page.locator('.g2d-smalls img').count() - 6, 0))
    number = lambda what: page.locator(f'[data-name="{what}"] b').inner_text()
    def changed(what, work):
        "Do it, and wait until this picture is another one."
        before = source(at(what))
        work()
        page.wait_for_function('([k, i, old]) => document.querySelectorAll(k)[i]?.src !== old', arg=[*at(what), before])
    app = page.locator('.g2d-app')
    page.wait_for_selector('.g2d-steps img', state='attached')
    page.wait_for_function('() => /ms\\./.test(document.querySelector(".g2d-status")?.innerText || "")')
    shot(1)
    assert all(page.locator('.g2d-app img').evaluate_all('images => images.map(i => i.alt.length > 15)'))
    area, kept = number('mask area'), source(attention)
    handle = page.locator('.widget-hslider:has(label:text-is("Percentile")) .noUi-handle')
    handle.focus()
    changed(mask, lambda: [page.keyboard.press('ArrowLeft') for _ in range(5)])
    page.wait_for_function('() => /0.80/.test([...document.querySelectorAll(".widget-hslider")].find(s => s.innerText.includes("Percentile")).innerText)')
    page.wait_for_function('old => document.querySelector(\'[data-name="mask area"] b\').innerText !== old', arg=area)
    assert float(number('mask area')[:-1]) > float(area[:-1]) and source(attention) == kept
    changed(attention, lambda: app.get_by_label('Head', exact=True).select_option(label='head 2'))
    def type_phrase(): app.get_by_label('Phrase', exact=True).click(); page.keyboard.type('right lower lobe opacity'); page.keyboard.press('Enter')
    changed(phrase, type_phrase)
    app.get_by_role('button', name='Keep as').click()
    page.wait_for_selector('.g2d-two')
    page.wait_for_function('() => document.querySelectorAll(".g2d-mask img").length === 2')
    changed(mask, lambda: app.get_by_label('Up-sampling', exact=True).select_option('nearest'))
    page.wait_for_function('() => document.querySelector(\'[data-name="mask area"] b\').innerText.includes("→")')
    shot(2)
    def upload(path):
        with page.expect_file_chooser() as chooser: app.get_by_role('button', name='Upload').click()
        chooser.value.set_files(path)
    app.get_by_role('button', name='End comparison').click()
    page.wait_for_selector('.g2d-two', state='detached')
    film_alt = '() => [...document.querySelectorAll(".g2d-smalls img")].map(i => i.alt).join(" ")'
    upload(xray)
    page.wait_for_function(f'name => ({film_alt})().includes(name)', arg=Path(xray).name)
    page.wait_for_function('() => document.querySelector(".g2d-status").innerText.includes("No truth is known")')
    assert page.locator('[data-name="IoU mask"]').count() == 0
    shot(3)
    upload(dict(name='broken.png', mimeType='image/png', buffer=b'this is no picture'))
    page.wait_for_selector('.g2d-status.bad')
    assert 'broken.png was not opened' in page.locator('.g2d-status').inner_text() and Path(xray).name in page.evaluate(film_alt)
    files = {}
    for button, endings in (('PNG', ['png']), ('SVG', ['svg']), ('Run row', ['yaml', 'csv'])):
        app.get_by_role('button', name=button).click()
        for ending in endings:
            link = page.wait_for_selector(f'.g2d-export a[download$=".{ending}"]')
            files[ending] = base64.b64decode(link.get_attribute('href').partition('base64,')[2])
    assert files['png'].startswith(b'\x89PNG') and b'<svg' in files['svg'] and b'pseudo_mask_gallery' in files['yaml'] and b'head' in files['csv']
    shot(4)
    # nothing is clipped and nothing scrolls inside
    inside = '''() => [...document.querySelectorAll('.g2d-app *')].filter(e => e.tagName !== 'SELECT' && e.tagName !== 'INPUT' && ['auto', 'scroll'].includes(getComputedStyle(e).overflowY) && e.scrollHeight > e.clientHeight + 2).map(e => e.className)'''
    assert page.evaluate(inside) == []
    assert not said, said


@pytest.mark.timeout(400)
def test_voila(chromium, home, xray):
    "`g2d explore` as a user starts it."
    def ready(process): return re.search(r'http\S+', process.stdout.readline())[0]
    with server([sys.executable, '-c', 'from g2d.cli import main; main()', 'explore', '--no-browser'], home, ready) as address, page_of(chromium) as (page, said):
        page.goto(address)
        use(page, said, xray, 'voila')


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_jupyterlab(chromium, home, xray):
    "The same notebook in JupyterLab: open, run all, use."
    import socket, time
    pytest.importorskip('jupyterlab')
    from g2d.explorer import _free_port, serve_command, write_app
    app, port, token = write_app(home/'explorer'/'explorer_app.ipynb'), _free_port(None), 'a-token-for-the-test'
    news = home/'jupyter'/'settings'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    news.parent.mkdir(parents=True, exist_ok=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    def ready(process):
        for _ in range(600):
            with socket.socket() as s:
                if s.connect_ex(('127.0.0.1', port)) == 0: return f'http://127.0.0.1:{port}/lab/tree/{app.name}?token={token}&reset'
            time.sleep(.1)
    with server([*serve_command(app, port, token, lab=True), '--expose-app-in-browser'], home, ready) as address, page_of(chromium) as (page, said):
        page.goto(address)
        page.wait_for_function('() => window.jupyterapp?.shell?.currentWidget?.sessionContext')
        page.evaluate('''async () => { const a = window.jupyterapp, s = a.shell.currentWidget.sessionContext;
            await s.ready; await s.session.kernel.info; await a.commands.execute("notebook:run-all-cells") }''')
        use(page, said, xray, 'lab')
