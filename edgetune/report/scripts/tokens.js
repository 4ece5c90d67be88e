// The worst rows of a file: each token a button, the chosen one explained below its row.
const RTL = /\p{Script=Arabic}|\p{Script=Hebrew}|\p{Script=Syriac}|\p{Script=Thaana}|\p{Script=Nko}/gu;
const LETTER = /\p{L}/gu;
const HEX = /^⟨[0-9A-F ]+⟩$/;

// A token as it can be seen: spaces alone, line breaks, and characters without a shape of their own.
function visible(text) {
  if (text === '') return '∅';
  if (/^ +$/.test(text)) return '␣'.repeat(text.length);
  const shown = text.replaceAll('\n', '↵').replaceAll('\r', '␍').replaceAll('\t', '⇥');
  if (/^[\p{Cf}\p{Cc}\p{Zs}\p{Mn}]+$/u.test(shown)) {
    return [...shown].map((each) => `U+${each.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}`).join(' ');
  }
  return shown.replace(/[\u0000-\u001f\u007f]/g, '�');
}

const isRightToLeft = (texts) => {
  const all = texts.join('');
  return 2 * (all.match(RTL) ?? []).length > (all.match(LETTER) ?? []).length;
};

function candidatesAt(row, place) {
  return row.candidates?.[String(place)];
}

const isFlip = (row, place) => {
  const both = candidatesAt(row, place);
  return both != null && both.trained[0]?.[0] !== both.file[0]?.[0];
};

function tokenElement(row, place) {
  const [text, kld] = [row.texts[place], row.kld[place]];
  const hex = HEX.test(text) ? ' hex' : '';
  if (kld == null) return element('span', { class: `token${hex}`, dir: 'auto' }, visible(text));
  const words = `${visible(text)}: ${short(kld)} nats${isFlip(row, place) ? ', different top token' : ''}`;
  return element('button', {
    type: 'button', class: `token k${classOf(kld)}${isFlip(row, place) ? ' flip' : ''}${hex}`, dir: 'auto',
    tabindex: '-1', 'data-place': place, 'aria-label': words, 'aria-pressed': 'false',
  }, visible(text));
}

function sideOf(title, list, actual) {
  const items = list.map(([text, share]) => element('li', { class: text === actual ? 'actual' : null },
    element('span', { class: 'text', dir: 'auto' }, visible(text)),
    element('span', { class: 'bar', style: `width: ${Math.max(0, Math.min(100, 100 * share)).toFixed(1)}%` }),
    element('span', { class: 'share' }, percent(share))));
  return element('div', {}, element('h4', {}, title), element('ol', { class: 'bars' }, ...items));
}

function explanation(row, place) {
  const text = row.texts[place];
  const both = candidatesAt(row, place);
  const said = element('p', {}, 'At ', element('q', { dir: 'auto' }, visible(text)),
    ` (token ${row.first + place}) the divergence is ${short(row.kld[place])} nats. Probability of this token: ${percent(row.p_trained[place])} in the trained model, ${percent(row.p_file[place])} in the file.`);
  const sides = both
    ? element('div', { class: 'sides' }, sideOf('Trained model', both.trained, text), sideOf('This file', both.file, text))
    : element('p', { class: 'note' }, 'Candidates are stored for the worst tokens of a row only.');
  return [said, sides];
}

function worstPlace(row) {
  return row.kld.reduce((worst, kld, place) => (kld != null && (worst < 0 || kld > row.kld[worst]) ? place : worst), -1);
}

function rowElement(row, number) {
  const direction = isRightToLeft(row.texts) ? 'rtl' : 'ltr';
  const strip = element('div', { class: 'strip', dir: direction, role: 'group', 'aria-label': `Tokens of row ${row.row}; arrow keys move between them` },
    ...row.texts.map((_, place) => tokenElement(row, place)));
  const panel = element('div', { class: 'panel', 'aria-live': 'polite' });
  const buttons = [...strip.querySelectorAll('button')];
  const show = (button) => {
    for (const each of buttons) {
      each.setAttribute('aria-pressed', String(each === button));
      each.tabIndex = each === button ? 0 : -1;
    }
    panel.replaceChildren(...explanation(row, Number(button.dataset.place)));
  };
  for (const type of ['mouseover', 'click', 'focusin']) {
    strip.addEventListener(type, (event) => { const button = event.target.closest('button'); if (button) show(button); });
  }
  strip.addEventListener('keydown', (event) => moveFocus(event, buttons, direction));
  const first = buttons.find((button) => Number(button.dataset.place) === worstPlace(row));
  if (first) show(first);
  const shown = row.texts.length < row.length ? `tokens ${row.first} to ${row.first + row.texts.length - 1} of ${row.length}` : `${row.length} tokens`;
  const title = element('h3', {}, element('b', {}, `${number}. Row ${row.row}`), `mean ${short(row.mean_kld)}, worst ${short(row.max_kld)} nats, ${shown}`);
  return element('div', { class: 'row' }, title, strip, panel);
}

function moveFocus(event, buttons, direction) {
  const forward = direction === 'rtl' ? 'ArrowLeft' : 'ArrowRight';
  const steps = { [forward]: 1, [forward === 'ArrowLeft' ? 'ArrowRight' : 'ArrowLeft']: -1, Home: -Infinity, End: Infinity };
  const at = buttons.indexOf(document.activeElement);
  if (!(event.key in steps) || at < 0) return;
  event.preventDefault();
  buttons[Math.max(0, Math.min(buttons.length - 1, at + steps[event.key]))].focus();
}

function heatLegend() {
  const items = CLASSES.map((each, index) => element('li', {}, element('i', { class: `k${index}` }), each.name));
  const flip = element('li', {}, element('i', { class: 'token flip k1' }), 'underlined: different top token');
  byId('heat-legend').replaceChildren(...items, flip);
}

function heatMap() {
  const rows = chosenFile().rows;
  byId('heat').hidden = !rows.length;
  byId('heat-rows').replaceChildren(...rows.map((row, index) => rowElement(row, index + 1)));
}
