"The command line: help without heavy imports, one sentence and exit code 2 for a mistake, and the commands end to end."
import os, subprocess, sys
from pathlib import Path
import pytest

TOP = Path(__file__).parents[1]


def g2d(*words, cwd=TOP, **environment):
    "Run the command as a user would, in a process of its own."
    return subprocess.run([sys.executable, '-c', 'from g2d.cli import main; main()', *map(str, words)], capture_output=True, text=True, cwd=cwd,
                          env=os.environ | dict(COLUMNS='200', HF_HUB_OFFLINE='1') | environment, timeout=500)


def one_sentence(answer, *parts):
    assert answer.returncode == 2, answer.stdout + answer.stderr
    assert 'Traceback' not in answer.stderr and answer.stderr.startswith('g2d: ') and answer.stderr.count('\n') == 1, answer.stderr
    for part in parts: assert part in answer.stderr, answer.stderr


@pytest.mark.parametrize('command', ['prepare', 'pretrain', 'demo', 'doctor', None])
def test_help(command):
    answer = g2d(*([command] if command else []), '--help')
    assert answer.returncode == 0 and 'Usage' in answer.stdout


def test_help_and_import_load_nothing_heavy():
    "Import time itself is measured by hand; what makes it slow is tested here."
    code = 'import sys\nimport g2d, g2d.cli\nheavy = {"torch", "numpy", "pandas", "transformers", "timm", "matplotlib", "papermill"} & set(sys.modules)\nassert not heavy, heavy'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=TOP)


def test_version_is_the_one_of_pyproject():
    import tomllib
    version = tomllib.loads((TOP/'pyproject.toml').read_text())['project']['version']
    assert g2d('--version').stdout.strip() == f'g2d {version}'


def test_doctor():
    answer = g2d('doctor', G2D_DATA='')
    assert answer.returncode == 0 and 'torch' in answer.stdout and 'output_root' in answer.stdout


def test_mistakes_give_one_sentence(tmp_path):
    one_sentence(g2d('pretrain', tmp_path/'none'), str(tmp_path/'none'))
    one_sentence(g2d('pretrain', tmp_path/'none', '--profile', 'best'), 'Unknown profile "best"', 'as_paper')
    one_sentence(g2d('pretrain', tmp_path/'none', '--set', 'learning_rate=1'), 'Unknown setting "learning_rate"')
    one_sentence(g2d('pretrain', tmp_path/'none', '--set', 'lr'), 'expected name=value')
    one_sentence(g2d('prepare', 'mimik', '--source', tmp_path, '--out', tmp_path/'o'), 'mimik', 'tidy')
    one_sentence(g2d('prepare', 'tidy'), '--source and --out')
    (tmp_path/'settings.ini').write_text('[g2d]\ndata_rot = /x\n')
    one_sentence(g2d('doctor', cwd=tmp_path), 'unknown key "data_rot"')


def test_prepare_and_pretrain_end_to_end(tmp_path):
    "A hospital's own CSV with own column names, one broken film, and the pre-training of it."
    import numpy as np, pandas as pd
    from PIL import Image
    from g2d.data.phantom import phantom
    films = [phantom(s, 64) for s in range(24)]
    for i, p in enumerate(films): Image.fromarray(p.image).save(tmp_path/f'{i}.png')
    (tmp_path/'broken.jpg').write_bytes(b'\xff\xd8\xff\xe0 cut short')
    table = pd.DataFrame(dict(datei=[f'{i}.png' for i in range(24)] + ['broken.jpg'], befund=[p.text for p in films] + ['No finding.'], patient=[f'p{i}' for i in range(25)],
                              satz=['train']*16 + ['val']*9))
    table.to_csv(tmp_path/'films.csv', index=False)
    answer = g2d('prepare', 'tidy', '--source', tmp_path/'films.csv', '--out', tmp_path/'store', '--size', '64', *sum((['--column', c] for c in ('image=datei', 'text=befund', 'patient_id=patient', 'split=satz')), []))
    assert answer.returncode == 0, answer.stderr
    assert '24 images' in answer.stdout and '1 rows were rejected' in answer.stdout
    assert 'broken.jpg' in (tmp_path/'store'/'rejected.csv').read_text()
    small = ['image_encoder=resnet18', 'pretrained=false', 'text_encoder=tiny', 'frozen_layers=0', 'image_size=64', 'crop_size=64', 'batch_size=8', 'epochs=1', 'global_only_steps=1']
    answer = g2d('pretrain', tmp_path/'store', '--profile', 'demo', '--out', tmp_path/'run', '--device', 'cpu', *sum((['--set', s] for s in small), []))
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert '2 steps done' in answer.stdout and (tmp_path/'run'/'checkpoint.safetensors').exists()


def test_finetune_and_evaluate(tmp_path, monkeypatch, capsys):
    "A task from the command line: numbers with intervals, a folder with the result, one sentence for what is wrong."
    import json
    from g2d.cli import main
    monkeypatch.setenv('G2D_OUTPUTS', str(tmp_path))
    import g2d.settings
    monkeypatch.setattr(g2d.settings, 'settings', g2d.settings.load_settings(), raising=False)
    from g2d.data.phantom import make_phantom_store
    store = str(make_phantom_store(tmp_path/'store', 90, size=64, split=dict(train=.6, val=.2, test=.2)).path)
    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['g2d', *words])
        with pytest.raises(SystemExit) as stop: main()
        found = capsys.readouterr()
        return stop.value.code, found.out, found.err
    tiny = tmp_path/'weights.safetensors'
    import timm
    from safetensors.torch import save_file
    save_file(timm.create_model('tf_efficientnet_lite0', in_chans=1).state_dict(), tiny)
    code, out, err = call('finetune', 'linear', store, '--protocol', 'demo', '--start', str(tiny), '--steps', '3', '--out', str(tmp_path/'probe'), '--option', 'draws=20')
    assert code == 0 and 'auroc' in out and json.loads((tmp_path/'probe'/'result.json').read_text())['about']['start'] == 'weights', err
    code, out, err = call('evaluate', 'linear', store, '--checkpoint', str(tmp_path/'probe'), '--option', 'draws=20')
    assert code == 0 and 'auroc' in out, err
    for words, sentence in ((('finetune', 'juggling', store), 'There is no task "juggling"'), (('finetune', 'linear', store, '--option', 'colour=red'), 'no option "colour"'),
                            (('finetune', 'linear', str(tmp_path/'nowhere')), 'nowhere'), (('evaluate', 'retrieval', store, '--checkpoint', str(tmp_path/'nothing')), 'nothing')):
        code, out, err = call(*words)
        assert code == 2 and sentence in err and 'Traceback' not in err
