// What all charts share: the data, elements, numbers, sizes.
const DATA = JSON.parse(document.getElementById('data').textContent);
const byId = (id) => document.getElementById(id);
const NOTHING = '–';

// An element with attributes and children; text only ever becomes a text node.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(key, '');
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const SUPERSCRIPT = { '-': '⁻', 0: '⁰', 1: '¹', 2: '²', 3: '³', 4: '⁴', 5: '⁵', 6: '⁶', 7: '⁷', 8: '⁸', 9: '⁹' };
const raised = (text) => [...String(text)].map((character) => SUPERSCRIPT[character] ?? character).join('');

// Three figures, as numbers.py writes them.
function short(value, figures = 3) {
  if (value == null) return NOTHING;
  if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e6)) {
    const [mantissa, exponent] = value.toExponential(Math.max(figures - 2, 0)).split('e');
    return `${mantissa}×10${raised(Number(exponent))}`;
  }
  if (Math.abs(value) >= 10 ** (figures - 1)) return Math.round(value).toLocaleString('en');
  return value === 0 ? '0' : value.toPrecision(figures);
}

// 97.3 %; the whole and nothing only for just that.
function percent(value, places = 1) {
  if (value == null) return NOTHING;
  const text = (100 * value).toFixed(places);
  if (value < 1 && Number(text) === 100) return `> 99.${'9'.repeat(places)}\u00a0%`;
  if (value > 0 && Number(text) === 0) return `< ${(10 ** -places).toFixed(places)}\u00a0%`;
  return `${text}\u00a0%`;
}

// Ticks of linear scales: 0.0005, 20, 2×10⁻⁵.
const plain = (value) => (value !== 0 && Math.abs(value) < 1e-4 ? short(value) : String(Number(value.toPrecision(3))));

const FORMS = { short, short4: (value) => short(value, 4), percent: (value) => percent(value, 2) };

// Ticks of logarithmic scales: 0.0001, 0.02, 10⁻⁵, 2×10⁻⁵.
function power(value) {
  const exponent = Math.floor(Math.log10(value) + 1e-9);
  if (exponent >= -4 && exponent <= 4) return String(Number(value.toPrecision(1)));
  const mantissa = Math.round(value / 10 ** exponent);
  return `${mantissa === 1 ? '' : `${mantissa}×`}10${raised(exponent)}`;
}

// A logarithmic scale around positive values: room on both sides, and ticks at powers of ten or, where these are few,
// also at their double and fivefold.
function logarithmic(values, room = 1.7) {
  const domain = [Math.min(...values) / room, Math.max(...values) * room];
  const [low, high] = domain.map(Math.log10);
  const exponents = d3.range(Math.floor(low), Math.ceil(high) + 1);
  const within = (ticks) => ticks.filter((tick) => tick >= domain[0] && tick <= domain[1]);
  const powers = within(exponents.map((exponent) => 10 ** exponent));
  const finer = [[1, 2, 5], [1, 2, 3, 4, 5, 6, 8]].map((digits) =>
    within(exponents.flatMap((exponent) => digits.map((digit) => digit * 10 ** exponent))));
  const step = Math.ceil(powers.length / 6);
  const ticks = [powers.filter((_, index) => index % step === 0), ...finer].find((each) => each.length > 2) ?? finer[1];
  return { type: 'log', domain, ticks, tickFormat: power };
}

// Draws a chart into an element, now and whenever its width changes or the file is another. `draw` may return null.
const drawings = [];
function chart(id, draw) {
  const place = byId(id);
  if (place) drawings.push({ place, draw, width: 0 });
}

const PAPER = 680; // pixels between the margins of A4

function redraw(all) {
  const whole = document.querySelector('main').clientWidth;
  for (const drawing of drawings) {
    const figure = drawing.place.closest('figure');
    if (all) figure.hidden = false;
    const width = Math.floor(drawing.place.clientWidth * (state.paper ? PAPER / whole : 1));
    if (!width || (!all && width === drawing.width)) continue;
    drawing.width = width;
    const drawn = drawing.draw(width);
    drawing.place.replaceChildren(...(drawn ? [drawn] : []));
    figure.hidden = !drawn;
  }
}

const state = { file: DATA.chosen, metric: DATA.metrics[0]?.key, paper: false };
const chosenFile = () => DATA.files[state.file];

const KIND_COLOR = { base: 'var(--base)', trained: 'var(--trained)', merged: 'var(--merged)' };
const colorOf = (rung) => KIND_COLOR[rung.kind] ?? (rung.passed ? 'var(--pass)' : rung.passed === false ? 'var(--fail)' : 'var(--soft)');
const symbolOf = (rung) => (rung.kind !== 'file' ? 'diamond2' : rung.passed !== false ? 'circle' : 'times');

// Widths of labels, so that margins fit them.
const ruler = document.createElement('canvas').getContext('2d');
function textWidth(text, size = 12) {
  ruler.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
  return ruler.measureText(text).width;
}
