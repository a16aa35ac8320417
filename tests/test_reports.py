"Reports: headings, sentences, cleaning, Open-I. Every text in this file is invented; real ones are only read where they lie."
import random, re, string, tarfile, io
from collections import Counter
import numpy as np
import pandas as pd
import pytest
from g2d.settings import G2DError
from g2d.data.reports import (MIT_LCP, clean_report, clean_text, last_paragraph, mgca_text, normalise_text, parse_open_i, parse_sections,
                              read_open_i, released_text, section_name, sentences)


def words(text): return Counter(re.findall(r'\w+', text.lower()))


# ------------------------------------------------------------------------------------------------------------ headings
VARIANTS = dict(
    impression='IMPRESSION IMPRESSIONS CONCLUSION SUMMARY OPINION IMPRESSSION IMPRESION IMPRESSON IMPRRESSION IMORESSION IMPRSSION IMPERSSION MPRESSION IMPESSION '
               'IMPRESSOIN FINDINGS/IMPRESSION FINDINGS&IMPRESSION CONCLUSIONS'.split() + ['FINDINGS AND IMPRESSION', 'Findings / impression', 'Impression and Recommendation(s)'],
    findings='FINDINGS FINDING FINDNGS FINDINS FINDINDGS FINDGINGS FINDNINGS FINIDNGS Findings'.split(),
    comparison='COMPARISON COMPARISONS COMPARISION COMPARSION COMPARRISON'.split() + ['COMPARISON FILM'],
    indication='INDICATION IDICATION NDICATION'.split() + ['REASON FOR EXAM', 'Reason for examination'],
    history=['HISTORY', 'CLINICAL HISTORY', 'CLINICAL INFORMATION'], recommendations=['RECOMMENDATION(S)', 'RECOMMENDATIONS', 'RECOMENDATIONS'],
    wet_read=['WET READ', 'WETREAD'], addendum=['ADDENDUM'], technique=['TECHNIQUE'], examination=['EXAM', 'EXAMINATION'])


@pytest.mark.parametrize('name,typed', [(n, t) for n, ts in VARIANTS.items() for t in ts])
def test_variants_of_headings(name, typed):
    assert section_name(typed) == name
    text = f' EXAM:  CHEST\n {typed}:  The quick fox.\n'
    expected = name.replace('_', ' ')
    assert parse_sections(text)[expected].endswith('The quick fox.')


@pytest.mark.parametrize('typed', ['COMPRESSION', 'DEPRESSION', 'EXPRESSION', 'LUNGS', 'HEART', 'INFECTION', 'INJECTION', 'EXAMPLE', 'NOTED', 'HISTOLOGY', 'PINION', '', ' ', '___'])
def test_other_words_are_no_headings(typed):
    assert section_name(typed) is None


def damaged(word, rng):
    k = rng.randrange(len(word))
    return rng.choice([word[:k] + word[k+1:], word[:k] + word[k] + word[k:], word[:k] + rng.choice(string.ascii_uppercase) + word[k+1:],
                       word[:k] + word[k:k+2][::-1] + word[k+2:]])


def test_any_single_slip_is_forgiven():
    rng = random.Random(0)
    for word in ('IMPRESSION', 'FINDINGS', 'CONCLUSION', 'COMPARISON'):
        known = section_name(word)
        for _ in range(200): assert section_name(damaged(word, rng)) == known


@pytest.mark.parametrize('text,expected', [
    ('FINDINGS: Clear. IMPRESSION: Normal.', dict(findings='Clear.', impression='Normal.')),                     # all on one line
    ('Cough. Findings: Clear. Impression: Normal.', dict(preamble='Cough.', findings='Clear.', impression='Normal.')),
    ('IMPRESSION:1. Normal.', dict(impression='1. Normal.')),                                                    # no blank after the colon
    ('FINDINGS\nClear.\nIMPRESSION\nNormal.', dict(findings='Clear.', impression='Normal.')),                    # no colon at all
    ('FINDINGS:\nLUNGS: Clear.\nHEART: Normal.\nIMPRESSION: Fine.', dict(findings='LUNGS: Clear.\nHEART: Normal.', impression='Fine.')),
    ('LUNGS: Clear.\nIMPRESSION: Fine.', dict(lungs='Clear.', impression='Fine.')),                               # unknown before findings: its own
    ('FINDINGS: Seen at 9:15 a.m. ratio 1:2.', dict(findings='Seen at 9:15 a.m. ratio 1:2.')),
    ('FINDINGS: A.\nFINDINGS: B.\nFINDINGS: A.', dict(findings='A.\n\nB.')),
    ('FINDINGS:\nIMPRESSION: Normal.', dict(impression='Normal.')),                                              # empty is absent
    ('PA AND LATERAL CHEST:\nINDICATION: Cough.\nFINDINGS: Clear.', dict(indication='Cough.', findings='Clear.')),
    ('CHEST, TWO VIEWS: Clear.', dict(findings='Clear.')),
    ('CHEST, TWO VIEWS: of today.\nFINDINGS: Clear.', dict(views='of today.', findings='Clear.')),
    ('XXXX IMPRESSION: Normal.', dict(impression='Normal.')),
    ('WET READ: ___ ___ 9:28 PM\n No change.\n ______\n FINAL REPORT\n Portable film.\n IMPRESSION: Stable.',
     {'wet read': '___ ___ 9:28 PM\n No change.\n ______', 'preamble': 'Portable film.', 'impression': 'Stable.'}),
    ('Lungs are clear', dict(text='Lungs are clear')), ('', {}), (' \n ', {}), (None, {}), (float('nan'), {}), (pd.NA, {}),
    ('FINDINGS:\r\n Clear.\r\nIMPRESSION:\r\n Normal.', dict(findings='Clear.', impression='Normal.')),
    ('findings are clear and impression: none', dict(text='findings are clear and impression: none')),
    ('CONCLUSION: Fine.\nSUMMARY: Well.', dict(impression='Fine.\n\nWell.')),
])
def test_sections(text, expected):
    assert parse_sections(text) == expected


def test_repeated_headings():
    text = 'ADDENDUM: Late.\nIMPRESSION: One.\nFINDINGS: F.\nIMPRESSION: Two.'
    assert [parse_sections(text, r)['impression'] for r in ('join', 'first', 'last')] == ['One.\n\nTwo.', 'One.', 'Two.']
    with pytest.raises(G2DError, match='repeated="all"'): parse_sections(text, 'all')
    for bad in (3, b'x', ['x']):
        with pytest.raises(G2DError, match='must be text'): parse_sections(bad)


def test_no_word_of_a_report_is_lost_or_doubled():
    "Headings and texts put together at random come apart again into the same words."
    rng = random.Random(1)
    names = ['FINDINGS', 'IMPRESSION', 'COMPARISON', 'INDICATION', 'HISTORY', 'TECHNIQUE', 'LUNGS', 'HEART', 'PORTABLE CHEST']
    for _ in range(300):
        chosen = [rng.choice(names) for _ in range(rng.randint(1, 6))]
        bodies = [f'word{i} and more{i}.' for i in range(len(chosen))]
        text = 'before0.\n' + '\n'.join(f' {n}: {b}' for n, b in zip(chosen, bodies))
        parsed = parse_sections(text)
        found = Counter(w for t in parsed.values() for w in re.findall(r'\w+\d', t))
        assert found == Counter(re.findall(r'\b[a-z]+\d', text))
        for n, b in zip(chosen, bodies):
            if n in ('FINDINGS', 'IMPRESSION', 'COMPARISON'): assert b in parsed[n.lower()]


# ----------------------------------------------------------------------------------------------------------- sentences
@pytest.mark.parametrize('text,expected', [
    ('A 2.5 cm nodule. It grew by 0.5 mm.', ['A 2.5 cm nodule.', 'It grew by 0.5 mm.']),
    ('Collapse at T4. The heart is large.', ['Collapse at T4.', 'The heart is large.']),
    ('Told Dr. Smith. He agreed.', ['Told Dr. Smith.', 'He agreed.']),
    ('Rib No. 3 is broken. No. 4 is not.', ['Rib No. 3 is broken.', 'No. 4 is not.']),
    ('Is there effusion? No. The lungs are clear.', ['Is there effusion?', 'No.', 'The lungs are clear.']),
    ('Seen at 8 a.m. by phone. Read at 9 p.m. Lungs clear.', ['Seen at 8 a.m. by phone.', 'Read at 9 p.m.', 'Lungs clear.']),
    ('Scar vs. nodule, e.g. granuloma (approx. 3 mm).', ['Scar vs. nodule, e.g. granuloma (approx. 3 mm).']),
    ('1. Clear. 2. Normal.', ['Clear.', 'Normal.']), ('1) Clear\n2) Normal', ['Clear', 'Normal']), ('1. Clear 2. Normal', ['Clear', 'Normal']),
    ('1.Clear\n2.Normal', ['Clear', 'Normal']), ('- clear\n- normal', ['clear', 'normal']), ('(1) Clear. (2) Normal.', ['Clear.', 'Normal.']),
    ('Fracture of rib 5. Left lung clear.', ['Fracture of rib 5.', 'Left lung clear.']),
    ('1. Fracture of rib 2. Left lung clear.', ['Fracture of rib 2.', 'Left lung clear.']),
    ('Compared with 2009. 2. Stable.', ['Compared with 2009.', 'Stable.']),
    ('Measures 2. 5 cm.', ['Measures 2. 5 cm.']),                                           # a decimal typed with a blank stays together
    ('1. 8 mm nodule.', ['1. 8 mm nodule.']),
    ('No effusion.Heart normal.', ['No effusion.', 'Heart normal.']),
    ('no effusion. no pneumothorax.', ['no effusion.', 'no pneumothorax.']),
    ('A line that\nis wrapped. And\nanother.', ['A line that is wrapped.', 'And another.']),
    ('First paragraph\n\nSecond', ['First paragraph', 'Second']),
    ('He said "clear." Then left.', ['He said "clear."', 'Then left.']),
    ('Read by Dr. J. Smith and K. Jones. Hepatitis B. Clear.', ['Read by Dr. J. Smith and K. Jones.', 'Hepatitis B.', 'Clear.']),
    ('. . .', []), ('', []), ('\n', []),
])
def test_sentences(text, expected):
    assert sentences(text) == expected


VOCABULARY = ('the heart is normal size no effusion pneumothorax stable nodule in right upper lobe measuring 2.5 cm 12 mm T4 L1 Dr. Smith vs. Rib No. 3 a.m. e.g. '
              '( ) "quoted" The Lungs are Clear Heart 0.5 1.25 2009 ___ XXXX x-XXXX é cm² – naïve ; , : LUNGS: FINDINGS: - • 1. 2. 3) & / ? ! [<see>] &lt;1 <BR>').split(' ')


def random_text(rng, n=40):
    ends = [' ', ' ', ' ', ' ', '. ', '.', '\n', '\n\n', ', ']
    return ''.join(rng.choice(VOCABULARY) + rng.choice(ends) for _ in range(rng.randint(0, n)))


def random_noise(rng, n=80):
    return ''.join(rng.choice(string.printable + 'é²–“”’\u00a0\u200b\ufffd\u2028Åµ½e\u0301') for _ in range(rng.randint(0, n)))


@pytest.mark.parametrize('make', [random_text, random_noise])
def test_cleaning_is_idempotent_and_invents_nothing(make):
    rng = random.Random(0)
    for _ in range(1500):
        text = make(rng)
        plain = normalise_text(text)
        assert normalise_text(plain) == plain
        cleaned = clean_text(text)
        assert clean_text(cleaned) == cleaned, text
        assert '\n' not in cleaned and '  ' not in cleaned and cleaned == cleaned.strip()
        assert '__' not in cleaned and 'XXXX' not in cleaned
        kept = clean_text(text, blank=None)
        assert clean_text(kept, blank=None) == kept
        assert not words(kept) - words(plain), text                       # nothing invented
        made = words(cleaned) - words(plain)
        assert all('__' in plain or 'XXXX' in plain for _ in made)


def test_joined_sentences_hold_the_words_of_the_text():
    rng = random.Random(0)
    plain = [v for v in VOCABULARY if not re.fullmatch(r'\(?\d{1,2}[.)]|[-•]|&.*|<.*|\[.*', v)]      # without list markers
    for _ in range(1500):
        text = ''.join(rng.choice(plain) + rng.choice([' ', ' ', '. ', '\n']) for _ in range(rng.randint(0, 40)))
        text = re.sub(r'(?<![\w.])\(?\d{1,2}[.)](?=\s)', '', text)
        assert words(' '.join(sentences(text))) == words(text), text


def test_decimals_survive():
    rng = random.Random(3)
    for _ in range(500):
        numbers = [f'{rng.randint(0, 30)}.{rng.randint(0, 99)}' for _ in range(4)]
        text = '1. ' + ' '.join(f'{rng.choice(["Nodule of", "measures", "It is", "."])} {n} {rng.choice(["cm", "mm.", "cm. 2.", "x"])}' for n in numbers)
        assert [n for n in re.findall(r'\d+\.\d+', clean_text(text))] == numbers


def test_long_texts_take_no_long_time():
    for text in ('a' * 50_000, '. ' * 25_000, '1. ' * 20_000, ', ' * 20_000, '_' * 50_000, 'XXXX' * 10_000, '[**' * 10_000, '<' * 50_000, 'A: ' * 15_000, '\n' * 50_000,
                 'A ' * 20_000, '-' * 50_000, '(' * 50_000, '&lt;' * 5_000, '&amp;' * 5_000 + 'lt;'):
        clean_report(text)
        clean_text(text)


@pytest.mark.parametrize('text,expected', [
    ('Seen by ___ on ___.', 'Seen by on.'), ('___.', ''), ('Dated [**2013-1-2**], stable.', 'Dated, stable.'),
    ('12. 7/8. Clear lungs', 'Clear lungs.'), ('No change (___).', 'No change.'), ('Dual-XXXX pacer and cyst/XXXX.', 'Dual pacer and cyst.'),
    ('A ratio of .5 cm.', 'A ratio of .5 cm.'), ('Stable... clear', 'Stable. clear.'), ('HEART: Large.', 'Heart: Large.'),
])
def test_blanks_and_scraps(text, expected):
    assert clean_text(text) == expected


def test_blank_token():
    assert clean_text('Dr. ___, at ___.', blank='[MASK]') == 'Dr. [MASK], at [MASK].'
    assert clean_text('Dr. ___, at ___.', blank=None) == 'Dr. ___, at ___.'


# -------------------------------------------------------------------------------------------------------- clean_report
REPORT = ' FINDINGS:  The lungs are clear.\n\n IMPRESSION:\n 1. No acute\n disease.\n'

def test_order_length_and_fallback():
    assert clean_report(REPORT) == 'The lungs are clear. No acute disease.'
    assert clean_report(REPORT, sections=('impression', 'findings')) == 'No acute disease. The lungs are clear.'
    assert clean_report(REPORT, sections=['impression']) == 'No acute disease.'
    assert clean_report(REPORT, sections=['impression'], min_tokens=4) is None
    assert clean_report(parse_sections(REPORT)) == clean_report(REPORT)
    for nothing in (None, '', ' \n', float('nan'), pd.NA, 'FINDINGS:\nIMPRESSION: ___', '12 34 56', {}): assert clean_report(nothing) is None
    assert clean_report('A caption of an X-ray.') == 'A caption of an X-ray.'
    assert clean_report('A caption of an X-ray.', fallback=()) is None
    assert clean_report('x', min_tokens=0) == 'x.' and clean_report('', min_tokens=0) is None
    history = ' HISTORY: Cough.\n\n The lungs are clear today.\n'
    assert last_paragraph(parse_sections(history)) == 'The lungs are clear today.'
    assert clean_report(history) is None
    assert clean_report(history, fallback=MIT_LCP) == 'The lungs are clear today.'
    assert clean_report(' COMPARISON: None was available.', fallback=MIT_LCP) == 'None was available.'
    assert clean_report(REPORT, sections=('technique',), fallback=MIT_LCP) == 'No acute disease.'
    for bad in (dict(sections='findings'), dict(fallback='text'), dict(style='mine')):
        with pytest.raises(G2DError): clean_report(REPORT, **bad)


def test_released_cleaning_with_its_errors():
    "Facts of the reference sheet 6.1: triple S, no blank between, decimals cut, digits dropped, headings only with findings."
    assert released_text('clear lungs', 'normal heart') == 'normal heartclear lungs'
    assert released_text('clear', 'IMPRESSION: normal. ') == 'IMPRESSION: normal. clear'
    assert released_text('clear', 'IMPRESSSION: normal. ') == 'normal. clear'
    assert released_text('2.5 cm nodule.', '1. Mass. ') == 'Mass. 5 cm nodule. '
    assert released_text('A 2.5 cm nodule.', '1. Mass. ') == 'Mass. A 2. 5 cm nodule. '
    assert released_text(None, '1. FINDINGS: x.') == '1. FINDINGS: x.'
    assert released_text(' ', '1. FINDINGS: x.') == 'x. '                  # MGCA's blank for absent findings switches the cleaning on
    assert released_text('COMPARISON:  ___ none.', None) == 'none. '
    assert clean_report(dict(findings='Lungs are clear.', impression='Normal.'), style='as_released') == 'Normal. Lungs are clear. '
    assert clean_report(dict(impression='1. A 2.5 cm nodule.'), style='as_released') == 'A 2. 5 cm nodule. '


def test_mgca_tokens():
    assert mgca_text('No effusion. Clear.', '1. Size 2.5 cm.\n2. NAÏVE text') == '5 cm nave text no effusion'      # "size" and "clear" stand alone and go
    assert mgca_text('A 2.5 cm mass at T4.', None) == '5 cm mass at t'                  # "a" goes, T4 loses its 4
    assert mgca_text('Clear lungs', None) is None and mgca_text(None, None) is None
    assert clean_report(dict(findings='No acute disease'), style='mgca') == 'no acute disease'


# -------------------------------------------------------------------------------------------------------------- Open-I
def open_i(uid='CXR7', findings='Clear.', extra=''):
    return (f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="{uid}"/><licenseURL>http://example.org</licenseURL><Abstract>'
            f'<AbstractText Label="COMPARISON"/><AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText Label="IMPRESSION">Normal.</AbstractText></Abstract>'
            f'<MeSH><major>normal</major><automatic>x</automatic></MeSH><parentImage id="{uid}_1"><caption> PA </caption></parentImage><parentImage id="{uid}_2"/>{extra}</eCitation>').encode()


def test_open_i(tmp_path):
    (tmp_path/'a.xml').write_bytes(open_i())
    got = parse_open_i(tmp_path/'a.xml')
    assert got == dict(uid='CXR7', sections=dict(findings='Clear.', impression='Normal.'), labels=['normal'], automatic=['x'], licence='http://example.org',
                       images=[dict(id='CXR7_1', caption='PA'), dict(id='CXR7_2', caption=None)])
    assert parse_open_i(open_i(findings='a &amp;lt; b &#233;'))['sections']['findings'] == 'a < b é'


@pytest.mark.parametrize('content', [open_i()[:-30], b'', b'\x00\xff', b'not xml', open_i().replace(b'utf-8', b'nosuch'), b'<a/>', b'<eCitation><uId/></eCitation>'])
def test_broken_xml_names_its_file(tmp_path, content):
    (tmp_path/'4711.xml').write_bytes(content)
    with pytest.raises(G2DError, match='4711.xml'): parse_open_i(tmp_path/'4711.xml')
    with pytest.raises(G2DError, match='4711.xml'): read_open_i(tmp_path)
    with pytest.raises(G2DError, match='no readable Open-I report'): read_open_i(tmp_path, errors='skip')


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16'])
def test_entities_are_refused_before_they_expand(tmp_path, encoding):
    laughs = '<!DOCTYPE a [<!ENTITY b0 "ha">' + ''.join(f'<!ENTITY b{i} "{f"&b{i-1};" * 10}">' for i in range(1, 10)) + ']>'
    secret = tmp_path/'secret.txt'; secret.write_text('secret words')
    for bomb in (laughs + '<a>&b9;</a>', f'<!DOCTYPE a [<!ENTITY s SYSTEM "{secret.as_uri()}">]><a>&s;</a>'):
        with pytest.raises(G2DError, match='document type') as error: parse_open_i(bomb.encode(encoding))
        assert 'secret words' not in str(error.value)


def test_folder_and_archive_read_the_same(tmp_path):
    folder = tmp_path/'reports'; folder.mkdir()
    for i in (10, 9, 1): (folder/f'{i}.xml').write_bytes(open_i(f'CXR{i}', findings='' if i == 9 else f'Lung {i}.'))
    archive = tmp_path/'reports.tgz'
    with tarfile.open(archive, 'w:gz') as tar:
        for file in sorted(folder.iterdir()): tar.add(file, f'ecgen-radiology/{file.name}')
        link = tarfile.TarInfo('ecgen-radiology/evil.xml'); link.type = tarfile.SYMTYPE; link.linkname = '/etc/passwd'; tar.addfile(link)
    a, b = read_open_i(folder), read_open_i(archive)
    assert a.uid.tolist() == ['CXR1', 'CXR9', 'CXR10'] and a.findings.isna().tolist() == [False, True, False]
    pd.testing.assert_frame_equal(a.drop(columns='file'), b.drop(columns='file'))
    assert b.file[0] == 'reports.tgz/ecgen-radiology/1.xml'
    (folder/'5.xml').write_bytes(b'<half')
    assert [r['file'] for r in read_open_i(folder, errors='skip').attrs['rejected']] == [str(folder/'5.xml')]
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(G2DError, match='not a readable tar archive'): read_open_i(archive)
    with pytest.raises(G2DError, match='neither a folder nor a file'): read_open_i(tmp_path/'none')
    with pytest.raises(G2DError, match='errors="quiet"'): read_open_i(folder, errors='quiet')


# ----------------------------------------------------------------------------------------------------------- real data
@pytest.fixture(scope='module')
def open_i_table(data_root):
    path = data_root/'noncommercial/iu_reports_verbatim_ccbyncnd/NLMCXR_reports.tgz'
    if not path.is_file(): pytest.skip('the Open-I archive is not in the data root')
    return read_open_i(path)


def test_open_i_counts(open_i_table):
    "Counts of the reference sheet 1.9, computed there on the XML files themselves."
    t = open_i_table
    images = t.images.map(len)
    assert (len(t), t.uid.nunique()) == (3955, 3955)
    assert (t.findings.isna().sum(), t.impression.isna().sum(), (t.findings.isna() & t.impression.isna()).sum()) == (530, 34, 28)
    assert (images.sum(), (images == 0).sum()) == (7470, 104)
    assert t.images.explode().dropna().map(lambda i: i['id']).is_unique and t.licence.notna().all()


def test_open_i_cleaning(open_i_table):
    parts = [{k: v for k, v in row.items() if pd.notna(v)} for row in open_i_table[['findings', 'impression']].to_dict('records')]
    made = [clean_report(p) for p in parts]
    assert sum(m is not None for m in made) == 3927
    again = [clean_report(m) == m for m in made if m]
    assert sum(again) >= len(again) - 1                                  # one report holds a whole second report inside its impression
    lost = Counter()
    for part, text in zip(parts, made):
        if text is None: continue
        before, after = words(' '.join(part.values())), words(text)
        assert not after - before                                        # not one word that was not there
        assert '__' not in text and 'XXXX' not in text and '\n' not in text
        lost += before - after
        decimals = re.findall(r'(?<![\w.])\d+\.\d+(?![\w.])', ' '.join(part.values()))
        assert Counter(decimals) == Counter(re.findall(r'(?<![\w.])\d+\.\d+(?![\w.])', text))
    letters = {w: n for w, n in lost.items() if w.isalpha() and len(w) > 1 and not set(w) <= {'x'}}
    assert sum(letters.values()) <= 5, letters                           # only blanks, list numbers and what is glued to a blank go
    lengths = np.array([len(m.split()) for m in made if m])
    assert 20 < np.median(lengths) < 60 and lengths.max() < 400


def test_open_i_reports_put_together_parse_back(open_i_table):
    "Written in the manner of MIMIC-CXR, a report comes apart into the same two sections."
    exact = total = 0
    for row in open_i_table.dropna(subset=['findings', 'impression'])[['findings', 'impression']].to_dict('records')[:1500]:
        text = f'{"":33}FINAL REPORT\n INDICATION:  Cough.\n\n FINDINGS:\n\n {row["findings"]}\n\n IMPRESSION:  {row["impression"]}\n'
        parsed = parse_sections(text)
        exact += parsed.get('findings') == row['findings'].strip() and parsed.get('impression') == row['impression'].strip()
        total += 1
    assert total == 1500 and exact >= 1497, f'{exact} of {total}'


def test_notes_and_captions(data_root):
    "Clinical notes and figure captions: no exception, no invented word, sane lengths."
    paths = [p for p in data_root.glob('*/*/*.csv') if 'text' in pd.read_csv(p, nrows=0)]
    texts = pd.concat([pd.read_csv(p, usecols=['text']).text for p in paths]).dropna().unique()
    if not len(texts): pytest.skip('no texts in the data root')
    missing = 0
    for text in texts:
        made = clean_report(text)
        parse_sections(text)
        if made is None: missing += 1; continue
        assert not words(made) - words(normalise_text(text))
        assert clean_text(made) == made
        if parse_sections(text).keys() == {'text'}: assert .5 * len(text.split()) - 4 <= len(made.split()) <= 1.3 * len(text.split()) + 2, text[:80]
    assert missing < .05 * len(texts), f'{missing} of {len(texts)}'
