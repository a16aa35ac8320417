"""Draws images/design.svg: python docs/make_design.py. Text stays text, so that it can be searched and scaled."""
from html import escape
from pathlib import Path

INK, LINE = '#1b2733', '#52616f'
FILL = dict(data='#dcebf7', model='#fde8c8', mask='#f7d9c4', loss='#e9e3f5', task='#d8efe3', out='#eceff1')   # pastel, told apart by place and words too
A, B, C, W = 50, 340, 630, 180
BOXES = {  # name: x, y, w, h, kind, lines
    'raw': (A, 14, W, 84, 'data', ['raw data set', 'DICOM, JPG, PNG,', 'CSV, XML, reports']),
    'store': (B, 14, W, 84, 'data', ['RadiographStore', 'images.npy, index,', 'manifest with hashes']),
    'batches': (C, 14, W, 84, 'data', ['batches', 'film: crop, augment', 'report: as text']),
    'image': (A, 168, W, 60, 'model', ['image encoder', 'any network of timm']),
    'pool': (B, 168, W, 60, 'model', ['attention pooling', 'one vector, h maps']),
    'mask': (C, 156, W, 84, 'mask', ['pseudo-mask', 'average, enlarge, body,', 'top 15 %, smooth']),
    'text': (A, 268, W, 60, 'model', ['text encoder', 'BERT, hub or folder']),
    'global': (B, 268, W, 60, 'loss', ['global loss (Eq. 1)', 'film against report']),
    'decoder': (A, 378, W, 60, 'model', ['U-Net decoder', 'predicts the mask']),
    'dense': (C, 378, W, 60, 'loss', ['dense loss (Eq. 4)', 'Dice + cross-entropy']),
    'checkpoint': (A, 508, W, 84, 'out', ['Checkpoint', 'safetensors,', 'resumable']),
    'tasks': (B, 508, W, 84, 'task', ['tasks, protocols', 'segment, detect, probe,', 'zero-shot, ground, find']),
    'results': (C, 508, W, 84, 'out', ['runs and results', 'metrics.json, tables,', 'figures, this site'])}
ARROWS = [  # path, label, label place
    ('M230 56 H337', 'data_prep', (284, 48)), ('M520 56 H627', 'loading', (574, 48)), ('M720 98 V122 H24 V198 H47', '', None), ('M24 198 V298 H47', '', None),
    ('M230 190 H337', 'features', (284, 182)), ('M430 228 V265', 'film vector', (470, 251)), ('M230 298 H337', 'report vector', (299, 318)), ('M520 198 H627', 'attention', (574, 190)),
    ('M720 240 V375', 'target, no gradient', (783, 312)), ('M230 208 H256 V352 H140 V375', 'feature pyramid', (204, 345)), ('M230 408 H627', 'mask logits', (430, 400)),
    ('M140 438 V505', '', None), ('M230 550 H337', 'start', (284, 542)), ('M520 550 H627', 'batch', (574, 542))]


def box(x, y, w, h, kind, lines):
    head = f'<text x="{x + w/2}" y="{y + 24}" font-weight="600" font-size="15">{escape(lines[0])}</text>'
    rest = ''.join(f'<text x="{x + w/2}" y="{y + 44 + 18*i}" font-size="13">{escape(line)}</text>' for i, line in enumerate(lines[1:]))
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{FILL[kind]}" stroke="{LINE}"/>{head}{rest}'


def main():
    arrows = ''.join(f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.6" marker-end="url(#tip)"/>' + (f'<text x="{at[0]}" y="{at[1]}" font-size="12" font-style="italic">{escape(label)}</text>' if label else '')
                     for path, label, at in ARROWS)
    frames = ('<rect x="10" y="138" width="850" height="332" rx="12" fill="none" stroke="#9aa7b2" stroke-dasharray="6 5"/>'
              '<text x="850" y="460" font-size="13" text-anchor="end">pre-training: films and reports, no labels, boxes or masks</text>')
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 870 606" role="img" font-family="system-ui, DejaVu Sans, sans-serif" fill="{INK}" text-anchor="middle">'
           '<title>The way of the data through g2d</title>'
           f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>'
           '<rect width="870" height="606" fill="#ffffff"/>' + frames + arrows + ''.join(box(*b) for b in BOXES.values()) + '</svg>\n')
    (Path(__file__).parent/'images'/'design.svg').write_text(svg, encoding='utf-8')


if __name__ == '__main__': main()
