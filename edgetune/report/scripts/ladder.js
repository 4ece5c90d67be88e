// One line a rung, the figure along it.
function ladderChart(width) {
  const metric = DATA.metrics.find((each) => each.key === state.metric);
  if (!metric) return null;
  const form = FORMS[metric.form];
  const rungs = DATA.rungs.map((rung) => ({ ...rung, value: rung.values[metric.key]?.[0], error: rung.values[metric.key]?.[1] }));
  const known = rungs.filter((rung) => rung.value != null && (!metric.log || rung.value > 0));
  if (!known.length) return null;
  const values = withLimit(known, metric);
  const scale = metric.log ? logarithmic(values, 3) : linear(values);
  const left = Math.min(Math.max(...rungs.map((rung) => textWidth(rung.name, 13))) + 18, width * 0.4);
  return Plot.plot({
    width,
    height: rungs.length * 34 + 84,
    marginLeft: left,
    marginRight: 76,
    marginTop: 30,
    marginBottom: 42,
    insetTop: 4,
    insetBottom: 8,
    x: { ...scale, label: null, grid: true },
    y: { domain: rungs.map((rung) => rung.name), label: null, padding: 0 },
    symbol: { type: 'identity' },
    marks: [
      Plot.axisY({ tickSize: 0, tickPadding: 10, fontSize: 13, fill: 'var(--ink)', tickFormat: (name) => clipped(name, left - 18) }),
      Plot.axisX({ tickSize: 0, label: `${metric.title}${metric.unit ? `, ${metric.unit}` : ''}`, labelArrow: 'none', labelAnchor: 'left', labelOffset: 34, tickFormat: scale.tickFormat, ticks: scale.ticks }),
      Plot.line(known, { x: 'value', y: 'name', stroke: 'var(--quiet)', strokeWidth: 1.5 }),
      ...limitMark(metric),
      Plot.ruleY(known.filter((rung) => rung.error > 0), whisker(scale)),
      Plot.dot(known, { x: 'value', y: 'name', r: 6, symbol: symbolOf, fill: (rung) => (symbolOf(rung) === 'times' ? 'none' : colorOf(rung)), stroke: colorOf, strokeWidth: 2 }),
      Plot.text(known, { x: (rung) => Math.min(rung.value + (rung.error ?? 0), scale.domain[1]), y: 'name', text: (rung) => form(rung.value), dx: 11, textAnchor: 'start', fill: 'var(--ink)', fontSize: 13, stroke: 'var(--page)', strokeWidth: 4 }),
    ],
  });
}

function whisker(scale) {
  const low = (rung) => Math.max(rung.value - rung.error, scale.domain[0]);
  return { y: 'name', x1: low, x2: (rung) => Math.min(rung.value + rung.error, scale.domain[1]), stroke: colorOf, strokeWidth: 2 };
}

function limitMark(metric) {
  if (metric.limit == null || (metric.log && metric.limit <= 0)) return [];
  const limit = [metric.limit];
  return [
    Plot.ruleX(limit, { stroke: 'var(--fail)', strokeDasharray: '4 3', strokeWidth: 1.5 }),
    Plot.text(limit, { x: (value) => value, frameAnchor: 'top', dy: -14, text: (value) => `gate ${metric.log ? plain(value) : FORMS[metric.form](value)}`, fill: 'var(--fail)', fontSize: 12 }),
  ];
}

const withLimit = (known, metric) => [...known.map((rung) => rung.value), ...(metric.limit > 0 ? [metric.limit] : [])];

function linear(values) {
  const domain = [Math.min(0, ...values), Math.max(1, ...values)];
  return { type: 'linear', domain, ticks: 5, tickFormat: (value) => `${Math.round(100 * value)} %` };
}

function clipped(text, room) {
  let shown = text;
  while (shown.length > 4 && textWidth(shown, 13) > room) shown = `…${shown.slice(2)}`;
  return shown;
}

// The buttons that choose the figure.
function ladderChoice() {
  const group = byId('ladder-metrics');
  const buttons = DATA.metrics.map((metric) => {
    const button = element('button', { type: 'button', 'aria-pressed': String(metric.key === state.metric) }, metric.title);
    button.addEventListener('click', () => {
      state.metric = metric.key;
      for (const each of buttons) each.setAttribute('aria-pressed', String(each === button));
      redraw(true);
    });
    return button;
  });
  group.append(...buttons);
}
